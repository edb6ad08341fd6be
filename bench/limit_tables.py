"""The blocks of docs/limits.md and docs/operators.md: what `bench/limits.py` found, from bench/results to Markdown."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table_parts import load, provenance, table

#: Where results may be, and how the tables call the place; details are of the first that has any.
PLACES = {"h100": "H100", "h200": "H200", "cpu": "Triton's interpreter, CPU"}
VERDICTS = ("right", "partly", "refused", "wrong", "crash")
NAMED = 8  # operators of a row that are named, at most

_TENSORS = re.compile(r" on (\w+\[[\d, ]*\] on \w+(, )?)+")


def records(results: Path) -> dict[str, dict[str, Any]]:
    """Place to what was found there; the pairs that torch computes nothing of are left out."""
    found = {place: load(results, f"{place}/limits.json") for place in PLACES}
    judged: dict[str, dict[str, Any]] = {}
    for place, record in found.items():
        if record is not None:
            judged[place] = record | {"pairs": [p for p in record["pairs"] if p["verdict"] != "none"]}
    return judged


def cause(message: str) -> str:
    """What stands in the way, without the shapes of one sample: "aten::x has no batch-invariant implementation"."""
    text = message.removeprefix("batch-invariant mode: ").partition(" Way out:")[0]
    text = re.sub(r"\[[\d, ]*\]", "[...]", _TENSORS.sub("", text))
    return " ".join(text.split()).rstrip(".").replace("|", "\\|")[:120]


def counts(found: dict[str, dict[str, Any]]) -> str:
    """How many pairs have each verdict, by place."""
    rows = []
    for place, record in found.items():
        number = {v: sum(p["verdict"] == v for p in record["pairs"]) for v in VERDICTS}
        share = f"{100 * number['right'] / len(record['pairs']):.1f}%"
        rows.append((PLACES[place], f"torch {record['versions']['torch'].split('+')[0]}", *number.values(), share))
    return table(("where", "release", *VERDICTS, "right in full"), rows)


def causes(pairs: Sequence[dict[str, Any]]) -> str:
    """What stands in the way of those that are not right, most frequent first."""
    by_cause: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair in pairs:
        for reason in pair["reasons"]:
            by_cause[reason["kind"], cause(reason["message"])].append(pair["op"])
    rows, alone = [], []
    for (kind, text), ops in sorted(by_cause.items(), key=lambda item: (-len(set(item[1])), item[0])):
        names = sorted(set(ops))
        if len(names) == 1 and kind == "refused":
            alone += names
            continue
        more = f", {len(names) - NAMED} more" if len(names) > NAMED else ""
        rows.append((kind, text, ", ".join(f"`{n}`" for n in names[:NAMED]) + more))
    rest = (
        f"\nAnother {len(set(alone))} are each refused for a reason of their own ([all](operators.md)).\n"
        if alone
        else ""
    )
    return table(("verdict", "why", "operators"), rows) + rest


def by_commit(record: dict[str, Any]) -> str:
    """How many verdicts are of which commit, where operators were judged again after others."""
    number = Counter(p.get("commit", record["commit"]) for p in record["pairs"])
    each = " and ".join(f"{n:,} of {commit}" for commit, n in number.most_common())
    return f"Of these verdicts {each}.\n" if len(number) > 1 else ""


def limits(results: Path) -> str:
    """Counts by place, and what stands in the way at the first one."""
    found = records(results)
    if not found:
        return "Not measured yet.\n"
    place, record = next(iter(found.items()))
    lines = "".join(provenance([r], f"{p}/limits.json") + by_commit(r) for p, r in found.items())
    total = f"{len(record['pairs']):,} pairs of an operator and a dtype on {PLACES[place]}"
    return f"{counts(found)}\n{lines}\n{total}; why some are not right:\n\n{causes(record['pairs'])}"


def operators(results: Path) -> str:
    """Every operator: its verdicts, forward and gradient, by dtype, and what stands in its way."""
    found = records(results)
    if not found:
        return "Not measured yet.\n"
    place, record = next(iter(found.items()))
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    why: dict[str, list[str]] = defaultdict(list)
    for pair in record["pairs"]:
        forward, backward = pair["forward"], pair["backward"]
        gradient = "" if backward in ("none", forward) else f", gradient {backward}"
        by_name[pair["op"]][pair["dtype"]] = forward + gradient
        why[pair["op"]] += [cause(reason["message"]) for reason in pair["reasons"]]
    rows = [
        (f"`{name}`", *(v.get(d, "-") for d in ("bfloat16", "float32")), "; ".join(dict.fromkeys(why[name])))
        for name, v in sorted(by_name.items())
    ]
    return f"On {PLACES[place]}.\n\n" + table(("operator", "bf16", "fp32", "why"), rows)
