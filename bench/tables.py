"""The marked blocks of README.md and docs/results.md: one function per block, from bench/results to Markdown.

A table has the project's words of today. Committed results keep the words of the commit that wrote them, so `load` and
`load_csv` translate old names first.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cost_tables
import fault_tables
import limit_tables
import speed_tables

# --------------------------------------------------------------------------------------------------------------
# what blocks are made of

#: Columns of result files that have another name now.
RENAMED_COLUMNS = {"provider": "backend", "product": "gemm", "roof_us": "roofline_us", "roof_gbs": "roofline_gbs"}
#: Batch compositions of `bi-ops parity` that have another name now.
RENAMED_COMPOSITIONS = {"strangers": "distractors"}


def load(results: Path, name: str) -> Any:
    """`results`/`name` parsed; None where nothing was measured yet."""
    path = results / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every column after the first is right-aligned where all its cells are numbers."""
    cells = [[str(c) for c in row] for row in rows]
    numeric = [all(re.fullmatch(r"[\d,.e+-]+", row[i]) for row in cells) for i in range(len(header))]
    lines = [header, ["---:" if n else "---" for n in numeric], *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def load_csv(results: Path, name: str) -> list[dict[str, str]]:
    """The rows of `results`/`name`, columns by their names of today; empty where nothing was measured yet."""
    path = results / name
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{RENAMED_COLUMNS.get(k, k): v for k, v in row.items()} for row in csv.DictReader(file)]


def csv_provenance(rows: Sequence[Mapping[str, str]], file: str) -> str:
    """`provenance` of CSV rows, whose versions are one text: a dict as Python writes it, or a few `name=version`."""

    def versions(text: str) -> dict[str, str]:
        return ast.literal_eval(text) if text.startswith("{") else dict(v.split("=", 1) for v in text.split())

    return provenance([{**r, "versions": versions(r["versions"])} for r in rows], file)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def ratios(rows: Iterable[Mapping[str, str]], baseline: str) -> list[float]:
    """The speed of bi_ops relative to `baseline`, per row that has both; above 1, bi_ops is faster."""
    return [float(r[baseline]) / float(r["ours_us"]) for r in rows if r[baseline]]


#: Libraries whose versions are named, of those that a record has.
LIBRARIES = ("vllm", "torch", "triton", "flash-attn-4", "transformers")


def provenance(records: Sequence[Mapping[str, Any]], file: str) -> str:
    """One line: where `records` of `file` were measured, with what, of which commit, when."""

    def all_of(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    def named(versions: Mapping[str, str | None]) -> str:
        return " ".join(f"{name} {found.split('+')[0]}" for name in LIBRARIES if (found := versions.get(name)))

    versions = all_of(named(r["versions"]) for r in records)
    where, commits = all_of(r["device"] for r in records), all_of(r["commit"] for r in records)
    dates = all_of(r["date"][:10] for r in records)
    return f"{where}; {versions}; commit {commits}; {dates}; `bench/results/{file}`.\n"


def delta(value: float) -> str:
    """A difference of log-probabilities, to three digits."""
    return "0" if value == 0 else f"{value:.3g}"


# --------------------------------------------------------------------------------------------------------------
# one function per block: bench/results -> Markdown


def parity(results: Path) -> str:
    """Per engine run, its compositions added up."""
    records = load(results, "h100/parity.json")
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        runs.setdefault((not r["plugin"], r["model"], not r["cuda_graphs"]), []).append(r)
    rows = []
    for (no_plugin, model, eager), group in sorted(runs.items()):
        rows.append(
            (
                f"Qwen3-{model}",
                "stock vLLM (control)" if no_plugin else "with the bi_ops plugin",
                "eager" if eager else "full CUDA graphs",
                f"{sum(r['tokens_checked'] for r in group):,}",
                f"{sum(r['tokens_different'] for r in group):,}",
                delta(max(r["max_delta"] for r in group)),
            )
        )
    head = ("shape", "vLLM, batch-invariant", "run", "log-probabilities compared", "with other bits", "largest gap")
    names = (RENAMED_COMPOSITIONS.get(r["composition"], r["composition"]) for r in records)
    compositions = ", ".join(dict.fromkeys(names))
    sizes = sorted({f"{r['prompts']} prompts x {r['new_tokens']} sampled tokens" for r in records})
    note = f"{', '.join(sizes)}, each scored again by the training model in these batch compositions: {compositions}. "
    return table(head, rows) + "\n" + note + provenance(records, "h100/parity.json")


def train(results: Path) -> str:
    """The runs of the training benchmark, one row each."""
    record = load(results, "h100/train.json")
    rows = [
        (
            i,
            f"{r['reward_first']:.3f}",
            f"{r['reward_last']:.3f}",
            f"{r['tokens_checked']:,}",
            f"{r['tokens_different']:,}",
            f"`{r['weights_sha256'][:16]}`",
        )
        for i, r in enumerate(record["runs"], 1)
    ]
    head = (
        *("run", "reward, first 5 steps", "last 5 steps", "log-probabilities compared"),
        *("with other bits", "SHA-256 of the final weights"),
    )
    config = record["config"]
    what = (
        f"`bi-ops train --preset {record['preset']}`: {record['runs'][0]['steps']} steps of GRPO on task "
        f"{config['task']!r}, {config['prompts_per_step']} prompts x {config['group_size']} samples a step, seed "
        f"{config['seed']}, every run in a process of its own. "
    )
    return table(head, rows) + "\n" + what + provenance([record], "h100/train.json")


NAMED = 10  # failed tests that are named, at most; the file names all


def tests(results: Path) -> str:
    """The outcome of the test suite, a row per GPU; and of the tests that ran after it."""
    rows, lines = [], []
    for gpu, file in (("h200", "tests"), ("h200", "tests_since"), ("h100", "tests")):
        record = load(results, f"{gpu}/{file}.json")
        if record is None:
            continue
        who = gpu.upper() if file == "tests" else f"{gpu.upper()}, tests that ran since"
        not_run = record.get("not_run", 0)
        rows.append((who, record["commit"], record["passed"], record["failed"], record["skipped"], not_run))
        failed = [f"`{t['file']}::{t['test']}`" for t in record["tests"] if t["outcome"] == "failed"]
        what = f"Failed: {', '.join(failed)}. " if 0 < len(failed) <= NAMED else ""
        lines.append(f"- {what}{provenance([record], f'{gpu}/{file}.json')}")
    if not rows:
        return "No run of the test suite on a GPU is committed yet.\n"
    return table(("GPU", "commit", "passed", "failed", "skipped", "not run"), rows) + "\n" + "".join(lines)


def conditions(results: Path) -> str:
    """Rollout against training under every condition of vLLM that was run, beside the stock control."""
    rows, lines = [], []
    for gpu in ("h100", "h200"):
        found = load(results, f"{gpu}/conditions.json")
        for r in found or ():
            rows.append((r["release"], r["condition"], *(outcome(r[side]) for side in ("plugin", "stock"))))
        if found:
            lines.append(provenance(found, f"{gpu}/conditions.json"))
    if not rows:
        return "Not measured yet.\n"
    head = ("vLLM", "condition", "other bits with the plugin", "other bits of stock vLLM")
    return table(head, sorted(rows)) + "\n" + "".join(lines)


def models(results: Path) -> str:
    """Which models are batch-invariant in vLLM with the plugin, beside the stock control."""
    rows, lines = [], []
    for gpu in ("h100", "h200"):
        found = load(results, f"{gpu}/models.json")
        for r in found or ():
            own = r["plugin"].get("operators", {})
            counted = ", ".join(f"{n} {op}" for op, n in own.items()) or "-"
            said = r["verdict"] if r["verdict"] != "wrong" else f"wrong: {r['why'][:120]}"
            differ = (composed(r[side]) for side in ("plugin", "stock"))
            rows.append((r["release"], r["model"], said, *differ, counted))
        if found:
            lines.append(provenance(found, f"{gpu}/models.json"))
    if not rows:
        return "Not measured yet.\n"
    head = ("vLLM", "model", "verdict", "other bits with the plugin", "other bits of stock vLLM", "computed by bi_ops")
    return table(head, rows) + "\n" + "".join(lines)


def decode_layer(results: Path) -> str:
    """A decoder layer while decoding, beside vLLM's kernels without the batch-invariant mode."""
    rows = load_csv(results, "h200/decode_layer.csv")
    if not rows:
        return "Not measured yet.\n"
    order = {"0.6B": 0, "1.7B": 1, "4B": 2, "8B": 3}
    rows.sort(key=lambda r: (order[r["model"]], int(r["batch"])))
    faster = [f"{float(r['speedup']):.2f}" for r in rows]
    cells = [
        (f"{r['model']}, batch {r['batch']}", r["ours_us"], r["stock_us"], ratio, r["bits_equal"])
        for r, ratio in zip(rows, faster, strict=True)
    ]
    head = ("Qwen3", "bi_ops, us", "stock vLLM, us", "times as fast", "bits of calls one by one")
    return table(head, cells) + "\n" + csv_provenance(rows, "h200/decode_layer.csv")


def rollout(results: Path) -> str:
    """Whole engines: decoding and first tokens, beside stock vLLM and its batch-invariant mode."""
    rows = load_csv(results, "h200/rollout.csv")
    if not rows:
        return "Not measured yet.\n"
    return speed_tables.rollout(rows, table, geometric_mean) + csv_provenance(rows, "h200/rollout.csv")


def experts(results: Path) -> str:
    """A layer of experts, pass by pass, beside the fastest inexact ones."""
    rows = load_csv(results, "h200/moe.csv")
    if not rows:
        return "Not measured yet.\n"
    return speed_tables.experts(rows, table) + csv_provenance(rows, "h200/moe.csv")


def composed(side: dict[str, Any] | None) -> str:
    """How many log-probabilities differ from those of the batch, alone and scored again as a prompt."""
    if side is None or "tokens" not in side:
        return outcome(side)
    alone = f"{side['alone_different']:,} of {side['alone']:,} alone"
    return f"{alone}, {side['rescored_different']:,} of {side['tokens']:,} rescored"


def outcome(side: dict[str, Any] | None) -> str:
    """What a condition ended in: how many log-probabilities differ, or that it was refused or did not run."""
    if side is None:
        return "-"
    if "failed" in side:
        return f"did not run: {side['failed'][:80]}"
    if "refused" in side:
        return "refused by name"
    return f"{side['different']:,} of {side['tokens']:,}"


def bits(results: Path) -> str:
    """The same operators on another GPU of the architecture."""
    one, other = (load(results, f"{gpu}/bits.json") for gpu in ("h100", "h200"))
    if one is None or other is None:
        return "Not compared yet.\n"
    shared = one["bits"].keys() & other["bits"].keys()
    differ = sum(one["bits"][name] != other["bits"][name] for name in shared)
    what = f"{len(shared)} fingerprints of outputs and gradients; {differ} differ between an H100 and an H200.\n\n"
    return what + "- " + provenance([one], "h100/bits.json") + "- " + provenance([other], "h200/bits.json")


def gemm(results: Path) -> str:
    """GEMMs against cuBLAS and vLLM: the forward by row count, then the backward."""
    rows = load_csv(results, "h100/products.csv")
    if not rows:
        return "Not measured yet.\n"
    out = []
    buckets = ((1, 1), (2, 16), (32, 64), (128, 512), (1024, 16384))
    parts = [
        (
            f"forward, {low} row{'s' * (high > 1)}" + (f" to {high:,}" if high > low else ""),
            [r for r in rows if r["pass"] == "fwd" and low <= int(r["m"]) <= high],
        )
        for low, high in buckets
    ]
    names = {"dx": "dX", "dw": "dW", "dw_fp32": "dW accumulated into fp32 `main_grad`"}
    parts += [(f"{label}, 8,192 tokens", [r for r in rows if r["pass"] == key]) for key, label in names.items()]
    for label, part in parts:
        if not part:
            continue
        cublas, vllm = ratios(part, "cublas_us"), ratios(part, "vllm_us")
        exact = all(r["m_invariant"] == "True" and r["bits_equal_vllm"] in ("True", "") for r in part)
        out.append(
            (
                label,
                len(part),
                f"{geometric_mean(cublas):.2f}x",
                f"{min(cublas):.2f}x",
                f"{geometric_mean(vllm):.2f}x" if vllm else "",
                f"{geometric_mean(ratios(part, 'roofline_us')):.0%}",
                "yes" if exact else "NO",
            )
        )
    head = (
        *("pass", "shapes", "speed against cuBLAS", "slowest shape", "against vLLM's batch-invariant kernel"),
        *("of the roofline", "bits hold"),
    )
    what = "Every GEMM of six Qwen3 sizes, LM head included; geometric means. "
    return table(head, out) + "\n" + what + csv_provenance(rows, "h100/products.csv")


#: The head size whose cases are listed; of the others the table says the geometric mean against each baseline.
MAIN_HEAD_DIM = "128"
#: What a table calls a pass, in the order of its tables.
PASSES = {"fwd": "forward", "bwd": "backward", "decode": "decode, GB/s"}
#: A pass, a baseline's columns, its name.
Comparison = tuple[str, str, str]


def by_pass(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Forwards first; within a pass the order of the file."""
    return sorted(rows, key=lambda r: list(PASSES).index(r["pass"]))


def sequences(row: Mapping[str, str]) -> str:
    """The sequences of a case of attention."""
    longest = f"{int(row['seqlen']):,}"
    return f"packed, longest {longest}" if row["packed"] == "True" else f"{row['batch']} x {longest}"


def rounded(figures: Iterable[str]) -> list[str]:
    """Figures without decimals; a dash where there is none."""
    return [f"{float(f):,.0f}" if f else "-" for f in figures]


def attention(results: Path) -> str:
    """Attention against its baselines: every case of the main head size, then the means of every head size."""
    rows = load_csv(results, "h100/attention.csv")
    if not rows:
        return "Not measured yet.\n"
    sides = ("ours", "fa3", "cudnn", "cudnn_deterministic", "fa2")
    out = []
    for r in by_pass([r for r in rows if r["head_dim"] == MAIN_HEAD_DIM]):
        unit = "gbs" if r["pass"] == "decode" else "tflops"
        bits = "yes" if r["reruns_equal"] == r["batch_invariant"] == "True" else "NO"
        figures = rounded(r.get(f"{side}_{unit}", "") for side in sides)
        out.append((PASSES[r["pass"]], sequences(r), *figures, f"{r['reruns']}, {bits}"))
    head = (
        *("pass, TFLOP/s", "sequences", "bi_ops", "FlashAttention 3", "cuDNN"),
        *("cuDNN deterministic", "FlashAttention 2", "reruns, bits hold"),
    )
    comparisons = (
        ("fwd", "fa3", "FlashAttention 3"),
        ("bwd", "cudnn_deterministic", "cuDNN, deterministic"),
        ("bwd", "fa2", "FlashAttention 2"),
    )
    return "\n".join(
        (
            table(head, out),
            f"head_dim {MAIN_HEAD_DIM}, causal, four query heads to a key head. " + HEAD_SIZES + "\n",
            head_sizes(rows, comparisons),
            csv_provenance(rows, "h100/attention.csv"),
        )
    )


def flash_attention_4(results: Path) -> str:
    """Attention against FlashAttention 4: one row per case, its head sizes side by side."""
    rows = load_csv(results, "h100/flash_attention_4.csv")
    if not rows:
        return "Not measured yet.\n"
    sizes = sorted({r["head_dim"] for r in rows}, key=int)
    cases: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for r in by_pass(rows):
        cases.setdefault((PASSES[r["pass"]], sequences(r)), []).append(r)

    def hold(case: Sequence[Mapping[str, str]], column: str) -> str:
        seen = {r[column] for r in case} - {""}
        return ("yes" if seen == {"True"} else "NO") if seen else "-"

    out = []
    for names, case in cases.items():
        by_size = {r["head_dim"]: r for r in case}
        sides = [f"{side}_tflops" for side in ("ours", "fa4", "fa4_deterministic")]
        figures = rounded(by_size[d][side] if d in by_size else "" for d in sizes for side in sides)
        batched = [r for r in case if int(r["batch"]) > 1]  # one sequence alone cannot depend on a batch
        out.append((*names, *figures, hold(case, "fa4_reruns_equal"), hold(batched, "fa4_batch_invariant")))
    named = ("bi_ops", "FlashAttention 4", "FlashAttention 4 deterministic")
    head = (
        *("pass, TFLOP/s", "sequences", *(f"{side}, {d}" for d in sizes for side in named)),
        *("deterministic: reruns equal", "the same bits in a batch and alone"),
    )
    comparisons = (
        ("fwd", "fa4", "FlashAttention 4"),
        ("bwd", "fa4", "FlashAttention 4"),
        ("bwd", "fa4_deterministic", "FlashAttention 4, deterministic"),
    )
    return "\n".join(
        (
            table(head, out),
            f"head_dim {' and '.join(sizes)}, causal, four query heads to a key head. " + HEAD_SIZES + "\n",
            head_sizes(rows, comparisons),
            csv_provenance(rows, "h100/flash_attention_4.csv"),
        )
    )


HEAD_SIZES = "Every head size, geometric means over the lengths:"


def attention_ratios(rows: Sequence[Mapping[str, str]], kind: str, head_dim: str, baseline: str) -> dict[str, float]:
    """The speed of bi_ops relative to `baseline`, by length, where both have the case."""
    return {
        f"{int(r['seqlen']):,}{', packed' if r['packed'] == 'True' else ''}": float(r["ours_tflops"])
        / float(r[f"{baseline}_tflops"])
        for r in rows
        if r["pass"] == kind and r["head_dim"] == head_dim and r[f"{baseline}_tflops"]
    }


def headline(results: Path) -> str:
    """What batch invariance costs in speed, in one table."""
    names = ("products", "attention", "flash_attention_4")
    gemms, attention, fa4 = (load_csv(results, f"h100/{name}.csv") for name in names)
    if not gemms or not attention:
        return "Not measured yet.\n"
    rows = [
        (label, baseline, f"{geometric_mean(ratios([r for r in gemms if r['pass'] == kind], 'cublas_us')):.2f}x")
        for kind, label, baseline in (
            ("fwd", "GEMM, forward", "cuBLAS"),
            ("dx", "GEMM, dX", "cuBLAS"),
            ("dw", "GEMM, dW", "cuBLAS"),
            ("dw_fp32", "GEMM, dW accumulated into fp32 `main_grad`", "cuBLAS, dW in bf16"),
        )
    ]
    for cases, kind, baseline, name in (
        (attention, "fwd", "fa3", "FlashAttention 3"),
        (attention, "bwd", "cudnn_deterministic", "cuDNN, deterministic"),
        (fa4, "bwd", "fa4_deterministic", "FlashAttention 4, deterministic"),
    ):
        if by_length := attention_ratios(cases, kind, MAIN_HEAD_DIM, baseline):
            speed = geometric_mean(list(by_length.values()))
            rows.append((f"attention, {PASSES[kind]}, head_dim {MAIN_HEAD_DIM}", name, f"{speed:.2f}x"))
    for model, speed in step_speed(results, "torch, compiled").items():
        rows.append((f"a training step of Qwen3-{model}", "transformers, `torch.compile`, bf16", f"{speed:.2f}x"))
    engines = speed_tables.beside_stock(load_csv(results, "h200/rollout.csv"))
    if faster := [r for of_release in engines.values() for r in of_release]:
        label = f"vLLM {', '.join(engines)} decoding Qwen3, models by batch sizes: {len(faster)} (H200)"
        rows.append(
            (label, "the same vLLM with full CUDA graphs, not batch-invariant", f"{geometric_mean(faster):.2f}x")
        )
    for name in ("forward", "backward"):
        layers = [r for r in load_csv(results, "h200/moe.csv") if r["pass"] == f"layer {name}"]
        if faster := [float(r["ours_tflops"]) / float(r["best_tflops"]) for r in layers]:
            best = {"grouped_mm": "torch._grouped_mm", "vllm": "vLLM's tuned MoE"}
            beside = " or ".join(best[b] for b in dict.fromkeys(r["best"] for r in layers))
            rows.append((f"a layer of 128 experts, {name} (H200)", beside, f"{geometric_mean(faster):.2f}x"))
    what = "\nNVIDIA H100. Above 1x, bi_ops is faster. Operators and layers: geometric means over shapes.\n"
    return table(("bi_ops, bitwise batch-invariant", "baseline", "speed"), rows) + what


def head_sizes(rows: Sequence[Mapping[str, str]], comparisons: Iterable[Comparison]) -> str:
    """Per comparison and head size: the speed relative to the baseline, where it has any case."""
    out = []
    for kind, baseline, name in comparisons:
        for d in sorted({int(r["head_dim"]) for r in rows}):
            if by_length := attention_ratios(rows, kind, str(d), baseline):
                worst = min(by_length, key=by_length.__getitem__)
                speed = f"{geometric_mean(list(by_length.values())):.2f}x"
                out.append((PASSES[kind], d, name, speed, f"{by_length[worst]:.2f}x at {worst}"))
    return table(("pass", "head_dim", "baseline", "speed", "slowest case"), out)


def host(results: Path) -> str:
    """Host time of an eager call."""
    rows = load_csv(results, "h100/products_host.csv")
    if not rows:
        return "Not measured yet.\n"
    out = [(f"`{r['call']}`", "yes" if r["requires_grad"] == "True" else "no", r["host_us"]) for r in rows]
    return table(("eager call", "with a gradient", "host, us"), out)


#: The sides of a training step's measurement, and what the table calls them.
STEP_SIDES = {
    "bi_ops": "bi_ops: batch-invariant, fp32 master weights, fp32 gradients",
    "bi_ops, none": "the same, nothing recomputed",
    "bi_ops, layer": "the same, whole layers recomputed",
    "torch, compiled": "transformers, bf16 weights, `torch.compile`",
    "torch": "transformers, bf16 weights, eager",
    "torch, autocast": "transformers, fp32 master weights under autocast, eager",
    "torch, checkpoint": "transformers, bf16 weights, `torch.compile`, layers checkpointed",
    "liger": "transformers, bf16 weights, Liger's kernels",
}


#: The size of step that is compared in one line.
STEP_TOKENS = 8192


def step_speed(results: Path, side: str) -> dict[str, float]:
    """The speed of bi_ops' training step relative to `side`'s, by model, where both ran."""
    rows = [r for r in load_csv(results, "h100/step.csv") if int(r["tokens"]) == STEP_TOKENS]
    ms = {(r["model"], r["side"]): float(r["step_ms"]) for r in rows}
    return {m: t / ms[m, "bi_ops"] for (m, s), t in ms.items() if s == side and (m, "bi_ops") in ms}


def step(results: Path) -> str:
    """A training step beside plain PyTorch's."""
    rows = load_csv(results, "h100/step.csv")
    if not rows:
        return "Not measured yet.\n"
    out = [
        (
            r["model"],
            f"{int(r['tokens']):,}",
            STEP_SIDES[r["side"]],
            *(f"{float(r[f'{part}_ms']):.1f}" for part in ("forward", "backward", "step")),
            f"{float(r['captured_ms']):.1f}" if r.get("captured_ms") else "-",
            f"{int(r['tokens_per_s']):,}",
            f"{int(r['peak_bytes']) / 2**30:.1f}",
        )
        for r in sorted(rows, key=lambda r: (r["model"], int(r["tokens"]), list(STEP_SIDES).index(r["side"])))
    ]
    head = (
        "Qwen3",
        "tokens",
        "what",
        "forward, ms",
        "backward, ms",
        "step, ms",
        "in a CUDA graph, ms",
        "tokens/s",
        "peak, GiB",
    )
    seqlen = rows[0]["seqlen"]
    what = f"Sequences {'as an RL step has them' if seqlen == 'rl' else f'of {int(seqlen):,} tokens'}, medians. "
    return table(head, out) + "\n" + what + csv_provenance(rows, "h100/step.csv")


def limits(results: Path) -> str:
    """Every operator of torch under the mode, counted."""
    return limit_tables.limits(load, provenance, table, results)


def operators(results: Path) -> str:
    """Every operator of torch under the mode, by name."""
    return limit_tables.operators(load, table, results)


def families(results: Path) -> str:
    """Per family of transformers and its attention, what each check found; refusals and faults below the table."""
    record = load(results, "cpu/families.json")
    if record is None:
        return ""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in record["rows"]:
        cells = found.setdefault((row["family"], row["attention"]), {})
        for check, result in row["results"].items():
            cells.setdefault(check, []).append(result)
    checks = ("forward", "backward", "left padding", "generate", "converted")
    notes: dict[str, int] = {}

    def cell(verdicts: Sequence[str]) -> str:
        words = []
        for verdict in dict.fromkeys(verdicts):
            word, _, why = verdict.partition(": ")
            why = re.sub(r" on \w+\[[\d, ]*\] on \w+(, \w+\[[\d, ]*\] on \w+)*", "", why)  # shapes are the script's
            words.append(f"{word} [{notes.setdefault(why, len(notes) + 1)}]" if why else word)
        return ", ".join(dict.fromkeys(words)) or "-"

    rows = [(name, attention, *(cell(cells.get(c, ())) for c in checks)) for (name, attention), cells in found.items()]
    made = table(("family", "attention", *checks), rows)
    listed = "".join(f"{i}. {why}\n" for why, i in notes.items())
    return f"{made}\n{listed}\n{provenance([record], 'cpu/families.json')}"


def faults(results: Path) -> str:
    """Training killed and resumed."""
    return fault_tables.faults(load, provenance, table, results)


def bisect(results: Path) -> str:
    """Bits that were planted."""
    return fault_tables.bisect(load, provenance, table, results)


def audit(results: Path) -> str:
    """Operators that were planted."""
    return fault_tables.audit(load, provenance, table, results)


def tree_cost(results: Path) -> str:
    """The sum of gradients across hosts."""
    return cost_tables.tree_cost(load_csv, table, results)


#: Every block that a page may have. A further benchmark adds a function above and its name here.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "parity": parity,
    "train": train,
    "tests": tests,
    "gemm": gemm,
    "host": host,
    "attention": attention,
    "flash_attention_4": flash_attention_4,
    "bits": bits,
    "step": step,
    "limits": limits,
    "operators": operators,
    "conditions": conditions,
    "models": models,
    "decode_layer": decode_layer,
    "rollout": rollout,
    "experts": experts,
    "families": families,
    "faults": faults,
    "bisect": bisect,
    "audit": audit,
    "tree_cost": tree_cost,
}
