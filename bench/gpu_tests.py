"""Runs the whole test suite on this GPU and keeps the outcome of every test. Writes tests.json.

    python bench/gpu_tests.py --out bench/results/h100 [--jobs 6] [FILE ...]

Each test file runs in a process of its own (compiling kernels is most of the time, and vLLM sets its mode once per
process). Exit status 0 only if nothing failed.
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


def run(file: str, limit: float, scratch: Path) -> list[dict[str, object]]:
    """One record per test of `file`."""
    report = scratch / f"{Path(file).stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        tail = done.stdout[-6000:] if done.returncode not in (0, 5) else ""
    except subprocess.TimeoutExpired as e:
        tail = f"timed out after {limit:.0f} s\n{(e.stdout or b'')[-2000:].decode()}"
    print(f"{file}: {time.monotonic() - start:.0f} s\n{tail}", flush=True)
    if not report.exists():
        return [{"file": file, "test": "", "outcome": "failed", "seconds": limit, "message": "did not finish"}]
    records = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        message = next((c.get("message") or "" for c in case if c.tag != "system-out"), "")[:300]
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
    parser.add_argument("--jobs", type=int, default=6, help="test files at a time")
    parser.add_argument("--limit", type=float, default=500, help="seconds for one file")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("files", nargs="*", help="test files; all of them by default")
    args = parser.parse_args()
    files = args.files or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        together = pool.map(lambda f: run(f, args.limit, Path(scratch)), [f for f in files if f not in ALONE])
        records = [r for rs in together for r in rs]
        records += [r for f in files if f in ALONE for r in run(f, args.limit, Path(scratch))]
    count = {o: sum(r["outcome"] == o for r in records) for o in ("passed", "failed", "skipped")}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "tests.json", {**provenance(args.commit), **count, "tests": records})
    print(count)
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
