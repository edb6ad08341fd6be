"""Blocks of whole engines and of experts, each beside the fastest inexact one: from bench/results to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, str]]
Table = Callable[[Sequence[str], Any], str]

#: The modes of bench/rollout.py that bi_ops is compared with.
STOCK, INVARIANT, OURS = ("stock", "stock graphs"), "invariant", "plugin"


def beside_stock(rows: Rows) -> dict[str, list[float]]:
    """Of each release: how many times as many tokens a second as stock vLLM's faster mode, cell by cell."""
    speed = {(r["release"], r["model"], r["batch"], r["mode"]): float(r["decode_tok_s"]) for r in rows}
    found: dict[str, list[float]] = {}
    for (release, model, batch, mode), ours in speed.items():
        of = [speed[key] for other in STOCK if (key := (release, model, batch, other)) in speed]
        if mode == OURS and of:
            found.setdefault(release, []).append(ours / max(of))
    return found


def rollout(rows: Rows, table: Table, geometric_mean: Callable[[Sequence[float]], float]) -> str:
    """Tokens a second while decoding, and how many times as many as vLLM without and in its batch-invariant mode."""
    speed = {(r["release"], r["model"], int(r["batch"]), r["mode"]): float(r["decode_tok_s"]) for r in rows}
    first = {(r["release"], r["model"], r["mode"]): r["ttft_512_ms"] + " / " + r["ttft_8192_ms"] for r in rows}
    lines = []
    for release, model in dict.fromkeys((r["release"], r["model"]) for r in rows):
        of = {(batch, mode): rate for (*it, batch, mode), rate in speed.items() if it == [release, model]}
        cells = []
        for batch in sorted({b for b, mode in of if mode == OURS}):
            ours = of[batch, OURS]
            best = max((of[batch, mode] for mode in STOCK if (batch, mode) in of), default=None)
            ratio = {"stock": best and ours / best, "invariant": ours / of.get((batch, INVARIANT), float("nan"))}
            cells.append(f"{ours:,.0f} ({', '.join(f'{v:.2f}' if v else '-' for v in ratio.values())})")
        tokens = [first[release, model, mode] for mode in (OURS, "stock graphs") if (release, model, mode) in first]
        lines.append((f"{release}, {model}", *cells, "; ".join(tokens)))
    batches = sorted({int(r["batch"]) for r in rows})
    head = ("vLLM, Qwen3", *(f"batch {b}" for b in batches), "first token after 512 / 8,192, ms (stock)")
    means = [f"{release}: {geometric_mean(v):.2f} over {len(v)} cells" for release, v in beside_stock(rows).items()]
    return table(head, lines) + f"\nTimes as fast as stock vLLM, geometric mean: {'; '.join(means)}.\n\n"


def experts(rows: Rows, table: Table) -> str:
    """TFLOP/s of every pass of a layer of experts, and the ratio to the fastest other one."""
    timed = [r for r in rows if r["ours_tflops"]]
    sizes = sorted({int(r["tokens"]) for r in timed})
    routings = list(dict.fromkeys(r["routing"] for r in timed))
    lines = []
    for name in dict.fromkeys(r["pass"] for r in timed):
        cells = []
        for routing in routings:
            for tokens in sizes:
                key = (name, str(tokens), routing)
                row = next((r for r in timed if (r["pass"], r["tokens"], r["routing"]) == key), None)
                ours, best = (float(row[c]) for c in ("ours_tflops", "best_tflops")) if row else (0.0, 1.0)
                cells.append(f"{ours:.0f} ({ours / best:.2f})" if row else "-")
        lines.append((name, *cells))
    head = ("pass", *(f"{tokens:,} tokens, {routing}" for routing in routings for tokens in sizes))
    checks = ("bits_equal_vllm", "reruns_equal", "batch_invariant")
    said = ", ".join(f"{c} {sum(r[c] == 'True' for r in rows)} of {sum(r[c] != '' for r in rows)}" for c in checks)
    return table(head, lines) + f"\nBits: {said}.\n\n"
