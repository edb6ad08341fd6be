"""The marked blocks of README.md and docs/*.md by name, and the one that has a line of each benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bit_tables import bits, conditions, families, models, parity, tests, train, train_experts
from cost_tables import tree_cost
from fault_tables import audit, bisect, faults, sanitizer, soak, suites, verify
from kernel_tables import (
    MAIN_HEAD_DIM,
    PASSES,
    attention,
    attention_h200,
    attention_ratios,
    decode_layer,
    flash_attention_4,
    flash_attention_4_h200,
    gemm,
    host,
)
from layout_tables import layout_costs, layouts, peer, speed_of_layouts, weight_transfer
from limit_tables import limits, operators
from speed_tables import (
    beside_stock,
    experts,
    moe_step,
    rl_seconds,
    rl_step,
    rollout,
    start,
    step,
    step_h200,
    step_speed,
)
from table_parts import geometric_mean, load_csv, ratios, table


def headline(results: Path) -> str:
    """What batch invariance costs in speed, in one table; of what both GPUs have, the H200's."""
    rows: list[tuple[str, str, str, str]] = []

    def measured(name: str) -> tuple[str, list[dict[str, str]]]:
        gpu = next((gpu for gpu in ("h200", "h100") if load_csv(results, f"{gpu}/{name}.csv")), "h100")
        return gpu.upper(), load_csv(results, f"{gpu}/{name}.csv")

    gpu, gemms = measured("products")
    for kind, label, baseline in (
        ("fwd", "GEMM, forward", "cuBLAS"),
        ("dx", "GEMM, dX", "cuBLAS"),
        ("dw", "GEMM, dW", "cuBLAS"),
        ("dw_fp32", "GEMM, dW accumulated into fp32 `main_grad`", "cuBLAS, dW in bf16"),
    ):
        if of := ratios([r for r in gemms if r["pass"] == kind], "cublas_us"):
            rows.append((label, baseline, gpu, f"{geometric_mean(of):.2f}x"))
    for file, kind, baseline, name in (
        ("attention", "fwd", "fa3", "FlashAttention 3"),
        ("attention", "bwd", "cudnn_deterministic", "cuDNN, deterministic"),
        ("flash_attention_4", "bwd", "fa4", "FlashAttention 4, not deterministic"),
    ):
        gpu, cases = measured(file)
        if by_length := attention_ratios(cases, kind, MAIN_HEAD_DIM, baseline):
            speed = geometric_mean(list(by_length.values()))
            rows.append((f"attention, {PASSES[kind]}, head_dim {MAIN_HEAD_DIM}", name, gpu, f"{speed:.2f}x"))
    if steps := step_speed(results):
        label = f"a training step of Qwen3-{', '.join(steps)}"
        rows.append((label, INEXACT_STEP, "H200", ", ".join(f"{speed:.2f}x" for speed in steps.values())))
    rows_of_engines = [r for r in load_csv(results, "h200/rollout.csv") if r["in_process"] == "False"]
    engines = beside_stock(rows_of_engines)
    if faster := [r for of_release in engines.values() for r in of_release]:
        label = f"vLLM {', '.join(engines)} decoding Qwen3, models by batch sizes: {len(faster)}"
        same = "the same vLLM, not batch-invariant, the faster of Inductor and full CUDA graphs"
        rows.append((label, same, "H200", f"{geometric_mean(faster):.2f}x"))
    for release, sides in rl_seconds(load_csv(results, "h200/rl_step.csv")).items():
        if {"bi_ops", "stock"} <= sides.keys():
            label = f"a whole RL step of Qwen3-1.7B, sampled by vLLM {release}"
            speed = sides["stock"]["total_s"] / sides["bi_ops"]["total_s"]
            rows.append((label, f"the same vLLM, not batch-invariant, and {INEXACT_STEP}", "H200", f"{speed:.2f}x"))
    for (layout, gpus), of_models in speed_of_layouts(results).items():
        label = f"a training step of Qwen3-{', '.join(of_models)}, {layout}"
        speeds = ", ".join(f"{speed:.2f}x" for speed in of_models.values())
        rows.append((label, f"the same in {INEXACT_STEP}, by torch", f"{gpus} x H200", speeds))
    for name in ("forward", "backward"):
        layers = [r for r in load_csv(results, "h200/moe.csv") if r["pass"] == f"layer {name}"]
        if faster := [float(r["ours_tflops"]) / float(r["best_tflops"]) for r in layers]:
            best = {"grouped_mm": "torch._grouped_mm", "vllm": "vLLM's tuned MoE"}
            beside = " or ".join(best[b] for b in dict.fromkeys(r["best"] for r in layers))
            rows.append((f"a layer of 128 experts, {name}", beside, "H200", f"{geometric_mean(faster):.2f}x"))
    if not rows:
        return "Not measured yet.\n"
    what = "\nAbove 1x, bi_ops is faster. Operators and layers: geometric means over shapes.\n"
    return table(("bi_ops, bitwise batch-invariant", "baseline", "NVIDIA", "speed"), rows) + what


#: What training is compared with, in the headline.
INEXACT_STEP = "transformers, `torch.compile`, bf16"


#: Every block that a page may have. A further benchmark adds a function and its name here.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "parity": parity,
    "train": train,
    "train_experts": train_experts,
    "tests": tests,
    "gemm": gemm,
    "host": host,
    "attention": attention,
    "attention_h200": attention_h200,
    "flash_attention_4": flash_attention_4,
    "flash_attention_4_h200": flash_attention_4_h200,
    "bits": bits,
    "step": step,
    "step_h200": step_h200,
    "moe_step": moe_step,
    "start": start,
    "limits": limits,
    "operators": operators,
    "conditions": conditions,
    "models": models,
    "decode_layer": decode_layer,
    "rollout": rollout,
    "rl_step": rl_step,
    "experts": experts,
    "families": families,
    "faults": faults,
    "verify": verify,
    "sanitizer": sanitizer,
    "soak": soak,
    "suites": suites,
    "bisect": bisect,
    "audit": audit,
    "tree_cost": tree_cost,
    "layouts": layouts,
    "peer": peer,
    "weight_transfer": weight_transfer,
    "layout_costs": layout_costs,
}
