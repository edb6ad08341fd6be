"""Blocks of what has the same bits: rollouts, training, vLLM, families of models, tests. From results to Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table_parts import load, provenance, table

#: Batch compositions of `bi-ops parity` that have another name now.
RENAMED_COMPOSITIONS = {"strangers": "distractors"}


def parity(results: Path) -> str:
    """Per engine run, its compositions added up. The row of the draws compares tokens, not log-probabilities."""
    records = [r for r in load(results, "h100/parity.json") if r["composition"] != "draws"]
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
                _delta(max(r["max_delta"] for r in group)),
            )
        )
    head = ("shape", "vLLM, batch-invariant", "run", "log-probabilities compared", "with other bits", "largest gap")
    names = (RENAMED_COMPOSITIONS.get(r["composition"], r["composition"]) for r in records)
    compositions = ", ".join(dict.fromkeys(names))
    sizes = sorted({f"{r['prompts']} prompts x {r['new_tokens']} sampled tokens" for r in records})
    note = f"{', '.join(sizes)}, each scored again by the training model in these batch compositions: {compositions}. "
    return table(head, rows) + "\n" + note + provenance(records, "h100/parity.json")


def train(results: Path, file: str = "h100/train.json") -> str:
    """The runs of the training benchmark, one row each."""
    record = load(results, file)
    rows = [
        (
            f"{i}, killed after {r['killed_after']} steps and resumed" if "killed_after" in r else i,
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
    return table(head, rows) + "\n" + what + provenance([record], file)


def train_experts(results: Path) -> str:
    """`train` of a mixture of experts."""
    return train(results, "h200/moe_train.json")


#: Runs of the tests: the GPU, the file, and which tests, if not all.
RUNS = (
    ("h200", "tests", ""),
    ("h200", "tests_since", "tests that ran since"),
    ("h200", "tests_kernels", "kernels since"),
    ("h200", "tests_training", "training since"),
    ("h200", "tests_parallel", "ranks since"),
    ("h200", "tests_flash_attn", "with flash-attn 2.8"),
    ("h100", "tests", ""),
)
NAMED = 10  # failed tests that are named, at most; the file names all


def tests(results: Path) -> str:
    """The outcome of the test suite, a row per GPU; and of the tests that ran after it."""
    rows, lines = [], []
    for gpu, file, what in RUNS:
        record = load(results, f"{gpu}/{file}.json")
        if record is None:
            continue
        who = f"{gpu.upper()}, {what}" if what else gpu.upper()
        not_run = record.get("not_run", 0)
        rows.append((who, record["commit"], record["passed"], record["failed"], record["skipped"], not_run))
        failed = [f"`{t['file']}::{t['test']}`" for t in record["tests"] if t["outcome"] == "failed"]
        what = f"Failed: {', '.join(failed)}. " if 0 < len(failed) <= NAMED else ""
        note = f"{record['note']} " if "note" in record else ""
        lines.append(f"- {what}{note}{provenance([record], f'{gpu}/{file}.json')}")
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
        for release in sorted({r["release"] for r in found or ()}):
            of_release = [r for r in found if r["release"] == release]
            commits = Counter(r["commit"] for r in of_release).most_common()
            counts = ", ".join(f"{n} rows of {commit}" for commit, n in commits)
            lines.append(f"- {release}, {counts}: {provenance(of_release, f'{gpu}/conditions.json')}")
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


def _delta(value: float) -> str:
    """A difference of log-probabilities, to three digits."""
    return "0" if value == 0 else f"{value:.3g}"
