"""Blocks of kernels, each beside its baselines: from bench/results to Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from table_parts import csv_provenance, geometric_mean, load_csv, ratios, table


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


def attention(results: Path, file: str = "h100/attention.csv") -> str:
    """Attention against its baselines: every case of the main head size, then the means of every head size."""
    rows = load_csv(results, file)
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
            csv_provenance(rows, file),
        )
    )


def attention_h200(results: Path) -> str:
    """`attention` on an H200."""
    return attention(results, "h200/attention.csv")


def flash_attention_4_h200(results: Path) -> str:
    """`flash_attention_4` on an H200."""
    return flash_attention_4(results, "h200/flash_attention_4.csv")


def flash_attention_4(results: Path, file: str = "h100/flash_attention_4.csv") -> str:
    """Attention against FlashAttention 4: one row per case, its head sizes side by side."""
    rows = load_csv(results, file)
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
            csv_provenance(rows, file),
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
