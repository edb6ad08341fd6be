"""What the tables of README.md and docs are made of: result files, Markdown, and where a figure was measured.

A table has the project's words of today. Committed results keep the words of the commit that wrote them, so `load_csv`
translates old names first.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Columns of result files that have another name now.
RENAMED_COLUMNS = {"provider": "backend", "product": "gemm", "roof_us": "roofline_us", "roof_gbs": "roofline_gbs"}


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
    where, commits = all_of(r["device"] for r in records), all_of(c for r in records for c in r["commit"].split(", "))
    dates = all_of(r["date"][:10] for r in records)
    return f"{where}; {versions}; commit {commits}; {dates}; `bench/results/{file}`.\n"
