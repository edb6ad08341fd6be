"""Runs the whole test suite on this GPU and keeps the outcome of every test. Writes tests.json.

    python bench/gpu_tests.py --out bench/results/h100 [--jobs 14] [FILE ...]

Compiling kernels is most of the time, so the tests are cut into parts that took equally long the last time, two for
every process. Neighbours stay together, for they compile the same kernels. Tests that start vLLM engines come last, one
after the other. Exit status 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import provenance

from bi_ops._common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
DURATIONS = ROOT / "bench" / "results" / "h100" / "tests.json"


def collect(files: Sequence[str], marks: str) -> list[str]:
    """The tests of `files` that `marks` selects, as pytest names them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-m", marks, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 5):  # 5: none selected
        raise SystemExit(f"pytest could not collect the tests\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if line.split("::")[0] in files]


def seconds_of(results: Path) -> dict[str, float]:
    """How long each test took, by its name, where `results` tells."""
    if not results.exists():
        return {}
    return {f"{t['file']}::{t['test']}": t["seconds"] for t in json.loads(results.read_text())["tests"]}


def cut(tests: Sequence[str], parts: int, known: Mapping[str, float]) -> list[list[str]]:
    """`tests`, in order, in at most so many parts of about the same time. A test not known takes what others take."""
    usual = statistics.mean(known.values()) if known else 1.0
    ends = list(itertools.accumulate(known.get(t, usual) for t in tests))
    cuts: list[list[str]] = [[] for _ in range(parts)]
    for test, end in zip(tests, ends, strict=True):
        cuts[min(int(end / (ends[-1] + 1e-9) * parts), parts - 1)].append(test)
    return [part for part in cuts if part]


def run(tests: Sequence[str], limit: float, report: Path) -> list[dict[str, object]]:
    """One record per test, of one process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        tail = done.stdout[-6000:] if done.returncode != 0 else ""
    except subprocess.TimeoutExpired as e:
        tail = f"timed out after {limit:.0f} s\n{(e.stdout or b'')[-2000:].decode()}"
    files = sorted({t.split("::")[0] for t in tests})
    print(f"{len(tests)} tests of {', '.join(files)}: {time.monotonic() - start:.0f} s\n{tail}", end="", flush=True)
    if not report.exists():
        lost = {"outcome": "failed", "seconds": limit, "message": "did not finish"}
        return [{"file": file, "test": test, **lost} for file, test in (t.split("::", 1) for t in tests)]
    records = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        message = next((c.get("message") or "" for c in case if c.tag != "system-out"), "")
        records.append(
            {
                "file": (case.get("classname") or "").replace(".", "/") + ".py",
                "test": case.get("name"),
                "outcome": outcome,
                "seconds": float(case.get("time") or 0),
                "message": message.replace(str(ROOT), ".")[:300],
            }
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that tests.json is written to")
    parser.add_argument("--jobs", type=int, default=14, help="processes at a time")
    parser.add_argument("--limit", type=float, default=500, help="seconds for one process")
    parser.add_argument(
        "--durations", type=Path, default=DURATIONS, help="tests.json of an earlier run (default: %(default)s)"
    )
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("files", nargs="*", help="test files; all of them by default")
    args = parser.parse_args()
    files = args.files or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))
    known = seconds_of(args.durations)
    alone = collect(files, "engine")
    parts = cut(collect(files, "not engine"), 2 * args.jobs, known)
    last = [list(tests) for _, tests in itertools.groupby(alone, lambda t: t.split("::")[0])]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        reports = [Path(scratch) / f"{i}.xml" for i in range(len(parts) + len(last))]
        together = pool.map(lambda part, report: run(part, args.limit, report), parts, reports)
        records = [r for rs in together for r in rs]
        records += [
            r for part, report in zip(last, reports[len(parts) :], strict=True) for r in run(part, args.limit, report)
        ]
    count = {o: sum(r["outcome"] == o for r in records) for o in ("passed", "failed", "skipped")}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "tests.json", {**provenance(args.commit), **count, "tests": records})
    print(count)
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
