"""Runs the whole test suite on this GPU and keeps the outcome of every test. Writes tests.json.

    python bench/gpu_tests.py --out bench/results/h100 [--jobs 14] [--resume] [FILE ...]

Compiling kernels is most of the time, so tests run in many processes (pytest-xdist); those that took longest, by the
results in the repository, start first. Tests that start vLLM engines run beside them, one by one in a process of their
own, for an engine changes what torch does in its process. Tests that need the GPU's memory come last, one by one. Of
several GPUs these two groups have half to themselves from the beginning. tests.json is written while they run: what was
interrupted goes on with --resume. With FILEs too it is the tests in these that go on; outcomes of other files stay as
they are.
Exit status 0 only if every test has run and none failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from record import provenance

from bi_ops.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("together", "engine", "memory")  # the last two by their markers, memory before engine
EVERY_S = 10  # between two writes of tests.json


class Collector:
    """A pytest plugin that keeps the names of the tests by their group."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {group: [] for group in GROUPS}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Engines last: who comes after one in its process finds another torch.
        for item in sorted(items, key=lambda item: item.get_closest_marker("engine") is not None):
            group = next((m for m in ("memory", "engine") if item.get_closest_marker(m)), "together")
            self.names[group].append(item.nodeid)


class Recorder:
    """A pytest plugin that keeps the outcome of every test in a file.

    path: the file, written every few seconds. header: what stands before the outcomes. names: the tests that are
    to run. known: outcomes of an earlier run; in the files of `names`, those of tests that failed, or are no more, are
    dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any], names: list[str], known: list[dict[str, Any]]):
        self._path, self._header, self._written = path, header, time.monotonic()
        files = {name.split("::", 1)[0] for name in names}
        self._tests = {f"{t['file']}::{t['test']}": t for t in known if t["file"] not in files}
        done = {f"{t['file']}::{t['test']}": t for t in known if t["outcome"] in ("passed", "skipped")}
        for name in names:
            file, test = name.split("::", 1)
            new = {"file": file, "test": test, "outcome": "not_run", "seconds": 0.0, "message": ""}
            self._tests[name] = done.get(name, new)

    def left(self, names: list[str]) -> list[str]:
        """Those of `names` that have not run to their end."""
        return [name for name in names if self._tests[name]["outcome"] == "not_run"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's setup, call and teardown each; only the last says that it passed."""
        test = self._tests[report.nodeid]
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed" and test["outcome"] != "failed":
            reason: Any = report.longrepr  # of a skip: where, which line and why
            crash = getattr(reason, "reprcrash", None)
            reason = crash.message if crash else reason[2] if isinstance(reason, tuple) else reason
            test |= {"outcome": report.outcome, "message": str(reason).replace(str(ROOT), ".")[:300]}
        elif report.when == "teardown" and test["outcome"] == "not_run":
            test["outcome"] = "passed"
        if time.monotonic() - self._written > EVERY_S:
            self.write()

    def write(self) -> dict[str, int]:
        """How many passed, failed, were skipped and have not run."""
        outcomes = [t["outcome"] for t in self._tests.values()]
        counts = {o: outcomes.count(o) for o in ("passed", "failed", "skipped", "not_run")}
        write_json(self._path, {**self._header, **counts, "tests": list(self._tests.values())})
        self._written = time.monotonic()
        return counts

    def add(self, tests: list[dict[str, Any]]) -> None:
        """Outcomes that another process has seen."""
        self._tests |= {f"{t['file']}::{t['test']}": t for t in tests}


def longest_first(names: list[str]) -> list[str]:
    """`names` by the seconds that they took in the newest results, those that nobody knows first."""
    took: dict[str, float] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*/tests.json")):
        tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
        took |= {f"{t['file']}::{t['test']}": t["seconds"] for t in tests if t["outcome"] != "not_run"}
    return sorted(names, key=lambda name: -took.get(name, float("inf")))


def start_beside(
    args: argparse.Namespace, groups: list[str], gpus: list[int]
) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """These groups' tests, in a process for each of these GPUs, and the folders of their outcomes."""
    found = []
    for i, gpu in enumerate(gpus):
        folder = args.out.resolve() / f"beside{gpu}"
        command = [sys.executable, __file__, "--out", str(folder), "--groups", *groups, "--commit", args.commit or ""]
        command += ["--part", str(i), str(len(gpus)), "--", *args.files]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        found.append((subprocess.Popen(command, env=environment), folder))
    return found


def run(names: list[str], options: list[str], recorder: Recorder, folder: Path) -> int:
    """pytest's exit code for `names`, in this order."""
    order = folder / "order.json"
    write_json(order, names)
    os.environ["BI_OPS_TESTS"] = str(order)
    files = list(dict.fromkeys(name.split("::", 1)[0] for name in names))
    return int(pytest.main(["-p", "no:cacheprovider", "-p", "ordered_tests", "-m", "", *options, *files], [recorder]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that tests.json is written to")
    parser.add_argument("--jobs", type=int, default=14, help="processes at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="only tests that failed or have not run")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=GROUPS, help="only these (default: all of them)")
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)  # which of how many processes
    parser.add_argument("files", nargs="*", help="test files, from the root; all of them by default")
    args = parser.parse_args()
    header, path, known = provenance(args.commit), args.out.resolve() / "tests.json", []
    if args.resume and path.exists():
        earlier = json.loads(path.read_text())
        for key in ("commit", "device", "versions"):
            if earlier[key] != header[key]:
                parser.error(f"{path} is of {key} {earlier[key]}, this is {header[key]}: run without --resume")
        known = earlier["tests"]
    path.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # tests are named from here
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "bench"), os.environ.get("PYTHONPATH"))))
    everything = ["-p", "no:cacheprovider", "-m", ""]  # the slow ones too
    collector = Collector()
    if exit_code := pytest.main([*everything, "--collect-only", "-qq", *(args.files or ["tests"])], [collector]):
        return int(exit_code)
    part, parts = args.part or (0, 1)
    names = {group: collector.names[group][part::parts] if group in args.groups else [] for group in GROUPS}
    names["together"] = longest_first(names["together"])
    recorder = Recorder(path, header, [name for group in names.values() for name in group], known)
    gpus = list(range(torch.cuda.device_count()))
    # Of one GPU an engine takes a part that its test names; whoever needs the memory waits.
    reserved = gpus[(len(gpus) + 1) // 2 :] or gpus
    elsewhere = ["engine", "memory"] if len(gpus) > 1 else ["engine"]
    elsewhere = [group for group in elsewhere if recorder.left(names[group])]
    if args.part or not gpus or not names["together"]:
        elsewhere = []
    beside = start_beside(args, elsewhere, reserved) if elsewhere else []
    if len(gpus) > 1:
        own = [gpu for gpu in gpus if not beside or gpu not in reserved]
        os.environ["BI_OPS_TEST_GPUS"] = ",".join(map(str, own))
    with tempfile.TemporaryDirectory() as folder:
        in_turn = ["-n", str(args.jobs), "--dist", "load", "--maxschedchunk", "1"]
        for group in (group for group in ("together", "memory", "engine") if group not in elsewhere):
            left = recorder.left(names[group])
            options = in_turn if group == "together" else []
            if left and run(left, options, recorder, Path(folder)) == pytest.ExitCode.INTERRUPTED:
                break
    for process, theirs in beside:
        process.wait()
        recorder.add(json.loads((theirs / path.name).read_text(encoding="utf-8"))["tests"])
    counts = recorder.write()
    print(", ".join(f"{n} {outcome.replace('_', ' ')}" for outcome, n in counts.items()))
    return 1 if counts["failed"] or counts["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
