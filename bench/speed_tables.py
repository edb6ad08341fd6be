"""Blocks of engines, experts and training steps beside the fastest inexact ones: from bench/results to Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from table_parts import csv_provenance, geometric_mean, load_csv, table

Rows = Sequence[Mapping[str, str]]

#: The modes of bench/rollout.py that bi_ops is compared with.
STOCK, INVARIANT, OURS = ("stock", "stock graphs"), "invariant", "plugin"


def beside_stock(rows: Rows) -> dict[str, list[float]]:
    """Of each release: how many times as many tokens a second as stock vLLM's faster mode, cell by cell."""
    keys = ("release", "model", "batch", "in_process", "mode")
    speed = {tuple(r[key] for key in keys): float(r["decode_tok_s"]) for r in rows}
    found: dict[str, list[float]] = {}
    for (*cell, mode), ours in speed.items():
        of = [speed[key] for other in STOCK if (key := (*cell, other)) in speed]
        if mode == OURS and of:
            found.setdefault(cell[0], []).append(ours / max(of))
    return found


def engine_lines(rows: Rows) -> list[tuple[str, ...]]:
    """A line of each model: tokens a second of each batch with the ratios to stock vLLM, first tokens, and starts."""
    batches = sorted({int(r["batch"]) for r in rows})
    lines = []
    for release, model in dict.fromkeys((r["release"], r["model"]) for r in rows):
        of = {(r["mode"], int(r["batch"])): r for r in rows if (r["release"], r["model"]) == (release, model)}
        speed = {key: float(r["decode_tok_s"]) for key, r in of.items()}
        cells = []
        for batch in batches:
            if (ours := speed.get((OURS, batch))) is None:
                cells.append("-")
                continue
            best = max((speed[mode, batch] for mode in STOCK if (mode, batch) in speed), default=None)
            ratios = (best and ours / best, (own := speed.get((INVARIANT, batch))) and ours / own)
            cells.append(f"{ours:,.0f} ({', '.join(f'{v:.2f}' if v else '-' for v in ratios)})")
        shown = [of[mode, batches[0]] for mode in (OURS, *STOCK, INVARIANT) if (mode, batches[0]) in of]
        names = {OURS: "plugin", "stock": "default", "stock graphs": "graphs", INVARIANT: "invariant"}
        first = [f"{names[r['mode']]} {float(r['ttft_512_ms']):.0f} / {float(r['ttft_8192_ms']):.0f}" for r in shown]
        starts = [f"{names[r['mode']]} {float(r['start_s']):.0f}" for r in shown if r["start_s"]]
        lines.append((f"{release}, {model}", *cells, ", ".join(first), ", ".join(starts) or "-"))
    return lines


def rollout(results: Path) -> str:
    """Tokens a second while decoding, and how many times as many as vLLM without and in its batch-invariant mode."""
    rows = load_csv(results, "h200/rollout.csv")
    if not rows:
        return "Not measured yet.\n"
    batches = sorted({int(r["batch"]) for r in rows})
    head = ("vLLM, Qwen3", *(f"batch {b}" for b in batches), "first token after 512 / 8,192, ms", "start, s")
    out = ""
    for in_process, where in (("False", "a process of its own, vLLM's default"), ("True", "the caller's process")):
        if not (of := [r for r in rows if r["in_process"] == in_process]):
            continue
        means = [f"{release}: {geometric_mean(v):.2f} over {len(v)} cells" for release, v in beside_stock(of).items()]
        out += f"The engine in {where}:\n\n{table(head, engine_lines(of))}"
        out += f"\nTimes as fast as stock vLLM, geometric mean: {'; '.join(means)}.\n\n"
        out += csv_provenance(of, "h200/rollout.csv") + "\n"
    return out.removesuffix("\n")


#: The sides of a whole RL step, and what the table calls them.
RL_SIDES = {
    "bi_ops": "bi_ops: vLLM with the plugin, the trainer over fp32 master weights",
    "stock": "vLLM's defaults, compiled transformers over bf16 weights",
    "stock graphs": "vLLM's full CUDA graphs, compiled transformers over bf16 weights",
    "earlier": "bi_ops before its kernels ran in vLLM",
}


#: Where a whole RL step's seconds go.
RL_PARTS = ("sampling_s", "training_s", "update_s", "weights_s", "total_s")


def rl_seconds(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the parts of a whole RL step: by release, newest first, then by side."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for release in sorted({r["release"] for r in rows}, reverse=True):
        for side in RL_SIDES:
            of = [r for r in rows if (r["release"], r["side"]) == (release, side)]
            if of:
                middle = {part: statistics.median(float(r[part]) for r in of) for part in RL_PARTS}
                found.setdefault(release, {})[side] = middle
    return found


def rl_step(results: Path) -> str:
    """Seconds of the parts of a whole RL step, beside the other sides under the same release of vLLM."""
    rows = load_csv(results, "h200/rl_step.csv")
    if not rows:
        return "Not measured yet.\n"
    lines = []
    for release, sides in rl_seconds(rows).items():
        for side, seconds in sides.items():
            ratio = seconds["total_s"] / sides["bi_ops"]["total_s"]
            of = [r for r in rows if (r["release"], r["side"]) == (release, side)]
            differ = f"{max(int(r['different']) for r in of):,} of {int(of[0]['tokens']):,}"
            shown = [f"{seconds[part]:.2f}" for part in RL_PARTS]
            lines.append((f"{release}, {RL_SIDES[side]}", *shown, "1" if side == "bi_ops" else f"{ratio:.2f}", differ))
    parts = ("sampling, s", "training", "update", "weights", "all", "times bi_ops'")
    head = ("vLLM, side", *parts, "log-probabilities that differ")
    return table(head, lines) + "\n" + csv_provenance(rows, "h200/rl_step.csv")


def experts(results: Path) -> str:
    """TFLOP/s of every pass of a layer of experts, and the ratio to the fastest other one."""
    rows = load_csv(results, "h200/moe.csv")
    if not rows:
        return "Not measured yet.\n"
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
    return table(head, lines) + f"\nBits: {said}.\n\n" + csv_provenance(rows, "h200/moe.csv")


#: The sides of a training step's measurement, and what the table calls them.
STEP_SIDES = {
    "bi_ops": "bi_ops: batch-invariant, fp32 master weights, fp32 gradients",
    "bi_ops, graphs": "bi_ops, replayed from a CUDA graph as training does",
    "bi_ops, none": "bi_ops, nothing recomputed",
    "bi_ops, layer": "bi_ops, whole layers recomputed",
    "torch, compiled": "transformers, bf16 weights, `torch.compile`",
    "torch, cudnn": "transformers, bf16 weights, `torch.compile`, cuDNN's attention",
    "torch": "transformers, bf16 weights, eager",
    "torch, autocast": "transformers, fp32 master weights under autocast, eager",
    "torch, checkpoint": "transformers, bf16 weights, `torch.compile`, layers checkpointed",
    "liger": "transformers, bf16 weights, Liger's kernels",
}


#: The size of step that is compared in one line.
STEP_TOKENS = 8192
#: The side of it that training takes.
STEP_OURS = "bi_ops, graphs"


def step_speed(results: Path) -> dict[str, float]:
    """By model, the speed of bi_ops' training step relative to the fastest that is not exact, in one run on an H200."""
    rows = [r for r in load_csv(results, "h200/step.csv") if int(r["tokens"]) == STEP_TOKENS]
    found = {}
    for ours in (r for r in rows if r["side"] == STEP_OURS):
        run = [r for r in rows if (r["model"], r["commit"]) == (ours["model"], ours["commit"])]
        inexact = [r for r in run if not r["side"].startswith("bi_ops")]
        times = [float(r[part]) for r in inexact for part in ("step_ms", "captured_ms") if r[part]]
        if times:
            found[ours["model"]] = min(times) / float(ours["step_ms"])
    return dict(sorted(found.items(), key=lambda of: float(of[0].removesuffix("B"))))


#: Layers of the models that are timed.
LAYERS = {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "30B-A3B": 48}


def _of_layers(row: dict[str, str]) -> str:
    """The model; how many layers of it, if not all."""
    layers = int(row.get("layers") or LAYERS[row["model"]])
    return row["model"] if layers == LAYERS[row["model"]] else f"{row['model']}, {layers} layers"


def step(results: Path, file: str = "h100/step.csv") -> str:
    """A training step beside plain PyTorch's."""
    rows = load_csv(results, file)
    if not rows:
        return "Not measured yet.\n"

    def ms(r: dict[str, str], part: str) -> str:
        return f"{float(r[f'{part}_ms']):.1f}" if r.get(f"{part}_ms") else "-"

    parts = ["forward", "backward", "step", "captured"]
    titles = ["forward, ms", "backward, ms", "step, ms", "in a CUDA graph, ms"]
    if any(r.get("clip_ms") for r in rows):
        parts += ["clip", "optimizer"]
        titles += ["clip, ms", "AdamW, ms"]
    if any(r.get("update_ms") for r in rows):
        parts.append("update")
        titles.append("both behind a step, ms")
    out = [
        (
            _of_layers(r),
            f"{int(r['tokens']):,}",
            STEP_SIDES[r["side"]],
            *(ms(r, part) for part in parts),
            f"{int(r['tokens_per_s']):,}",
            f"{int(r['peak_bytes']) / 2**30:.1f}",
        )
        for r in sorted(rows, key=lambda r: (r["model"], int(r["tokens"]), list(STEP_SIDES).index(r["side"])))
    ]
    head = ("Qwen3", "tokens", "what", *titles, "tokens/s", "peak, GiB")
    seqlen = rows[0]["seqlen"]
    what = f"Sequences {'as an RL step has them' if seqlen == 'rl' else f'of {int(seqlen):,} tokens'}, medians. "
    return table(head, out) + "\n" + what + csv_provenance(rows, file)


def step_h200(results: Path) -> str:
    """`step` on an H200."""
    return step(results, "h200/step.csv")


def moe_step(results: Path) -> str:
    """`step` of some layers of a mixture of experts, on an H200."""
    return step(results, "h200/moe_step.csv")


def start(results: Path) -> str:
    """The first step on a machine: seconds from the loaded weights to its end."""
    rows = load_csv(results, "h200/start.csv")
    out = [
        (
            r["model"],
            r["caches"],
            r["jobs"],
            *(f"{float(r[part]):.1f}" for part in ("import_s", "load_s", "warmup_s", "first_step_s", "after_load_s")),
            f"{r['warmup_compiled']}, {float(r['warmup_longest_s']):.1f} s",
        )
        for r in rows
    ]
    head = ("Qwen3", "caches", "threads", "import, s", "load, s", "warm-up, s", "first step, s", "after loading, s")
    return table((*head, "kernels compiled, the longest"), out) + "\n" + csv_provenance(rows, "h200/start.csv")
