"""What every benchmark shares: where it ran, and result files that are whole or not there."""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import bi_ops  # noqa: F401  (before triton)
from bi_ops.core import runtime
from bi_ops.core.files import write_atomically
from bi_ops.core.provenance import device_name, now, versions


def find_commit(given: str | None = None) -> str:
    """The commit that is measured: `given`, else the checkout's."""
    if given is not None:
        return given
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    return "unknown"


def provenance(commit: str | None = None) -> dict[str, object]:
    """device, versions, commit and date: what a figure needs to be reproduced."""
    return {"device": device_name(), "versions": versions(), "commit": find_commit(commit), "date": now()}


def row_provenance(commit: str | None = None) -> dict[str, object]:
    """`provenance` for a row of a CSV file: the versions are one text."""
    return provenance(commit) | {"versions": " ".join(f"{name}={version}" for name, version in versions().items())}


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """`rows` with the columns of all of them, written atomically."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def write(partial: Path) -> None:
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def kept(path: Path, rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> list[dict[str, object]]:
    """The rows of an existing file that `rows` do not replace: those with other values of `keys`."""
    if not (rows and path.exists()):
        return []
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    with path.open(newline="") as file:
        return [{**row} for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in new]


def offer_plugin(folder: Path) -> Path:
    """`folder`, by which processes that have it in their path find the vLLM plugin where it is not installed."""
    info = folder / "bi_ops-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bi-ops\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbi_ops = bi_ops.vllm_plugin:register\n")
    return folder


def take_shortcuts() -> None:
    """Through Triton's interpreter, as tests do; they change no bit. Nothing on a GPU."""
    if runtime.INTERPRET:
        tests = str(Path(__file__).resolve().parents[1] / "tests")
        if tests not in sys.path:
            sys.path.append(tests)
        import fast_interpreter

        fast_interpreter.install()
