"""Runs the whole test suite on this GPU and keeps the outcome of every test. Writes tests.json.

    python bench/gpu_tests.py --out bench/results/h100 [--jobs 14] [FILE ...]

Compiling kernels is most of the time, so every file is dealt out to several processes. Exit status 0 only if nothing
failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import provenance

from bi_ops._common.files import write_json

ROOT = Path(__file__).resolve().parents[1]

#: Files that start vLLM engines. An engine measures free memory as it starts, so nothing else may run beside it.
ALONE = ("tests/test_vllm_plugin.py", "tests/test_rl_end_to_end.py")


def deal(files: list[str], hand: int) -> list[tuple[str, list[str]]]:
    """(file, tests) for each process: the tests of a file are dealt out one by one to processes of about `hand`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    shards = []
    for file in files:
        tests = [line for line in listed.stdout.splitlines() if line.startswith(f"{file}::")]
        if not tests:
            raise SystemExit(f"{file}: no tests collected\n{listed.stdout[-2000:]}")
        hands = 1 if file in ALONE else min(8, -(-len(tests) // hand))
        shards += [(file, tests[i::hands]) for i in range(hands)]
    return shards


def run(file: str, tests: list[str], limit: float, report: Path) -> list[dict[str, object]]:
    """One record per test."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        tail = done.stdout[-6000:] if done.returncode != 0 else ""
    except subprocess.TimeoutExpired as e:
        tail = f"timed out after {limit:.0f} s\n{(e.stdout or b'')[-2000:].decode()}"
    print(f"{file} ({len(tests)} tests): {time.monotonic() - start:.0f} s\n{tail}", end="", flush=True)
    if not report.exists():
        return [{"file": file, "test": "", "outcome": "failed", "seconds": limit, "message": "did not finish"}]
    records = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        message = next((c.get("message") or "" for c in case if c.tag != "system-out"), "")
        message = message.replace(str(ROOT), ".")[:300]
        records.append(
            {
                "file": file,
                "test": case.get("name"),
                "outcome": outcome,
                "seconds": float(case.get("time") or 0),
                "message": message,
            }
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that tests.json is written to")
    parser.add_argument("--jobs", type=int, default=14, help="processes at a time")
    parser.add_argument("--hand", type=int, default=12, help="tests per process, about")
    parser.add_argument("--limit", type=float, default=500, help="seconds for one process")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("files", nargs="*", help="test files; all of them by default")
    args = parser.parse_args()
    files = args.files or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))
    shards = deal(files, args.hand)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        reports = [Path(scratch) / f"{i}.xml" for i in range(len(shards))]
        jobs = [(file, tests, args.limit, report) for (file, tests), report in zip(shards, reports, strict=True)]
        together = pool.map(lambda job: run(*job), [job for job in jobs if job[0] not in ALONE])
        records = [r for rs in together for r in rs]
        records += [r for job in jobs if job[0] in ALONE for r in run(*job)]
    count = {o: sum(r["outcome"] == o for r in records) for o in ("passed", "failed", "skipped")}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "tests.json", {**provenance(args.commit), **count, "tests": records})
    print(count)
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
