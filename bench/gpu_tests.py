"""Runs the whole test suite on this GPU and keeps the outcome of every test. Writes tests.json.

    python bench/gpu_tests.py --out bench/results/h100 [--jobs 14] [--resume] [FILE ...]

Compiling kernels is most of the time, so tests run in many processes (pytest-xdist); those that took longest, by the
results in the repository, start first. Tests that start vLLM engines run beside them, one by one in a process of their
own, for an engine changes what torch does in its process, and so do tests of tens of GiB where the GPU has room; else
these come last, and after them engines that measure what memory is free. Of several GPUs these groups have half to
themselves, and every other process has one; tests that need several have all of them, before the others if the results
in the repository say so, else behind. tests.json is written while they run: what was interrupted goes on with --resume.
With FILEs too it is the tests in these that go on; outcomes of other files stay as they are.
Exit status 0 only if every test has run and none failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
#: By their markers; `alone` has both. An engine comes after what runs in its process.
GROUPS = ("together", "memory", "engine", "alone")
ROOM = 120 * 2**30  # bytes of a GPU on which tests of tens of GiB and all others fit beside each other
EVERY_S = 10  # between two writes of tests.json
FILE = "tests.json"


Beside = tuple["subprocess.Popen[bytes]", Path]


class Collector:
    """A pytest plugin that keeps the names of the tests by their group."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {group: [] for group in GROUPS}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        of = {(False, False): "together", (True, False): "memory", (False, True): "engine", (True, True): "alone"}
        for item in items:
            memory, engine = (item.get_closest_marker(marker) is not None for marker in ("memory", "engine"))
            self.names[of[memory, engine]].append(item.nodeid)


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

    def ask_again(self, names: list[str], n_gpus: int) -> list[str]:
        """Those of `names` that were skipped for want of GPUs, of which there are as many: they have not run."""
        found = []
        for name in names:
            test = self._tests[name]
            if 1 < needed_gpus(test) <= n_gpus:
                test |= {"outcome": "not_run", "message": ""}
                found.append(name)
        return found

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


def needed_gpus(test: dict[str, Any]) -> int:
    """How many a test asked for that was skipped for want of them; else 1."""
    needed = re.search(r"needs (\d+) GPUs", test["message"]) if test["outcome"] == "skipped" else None
    return 1 if needed is None else int(needed[1])


def known_outcomes() -> dict[str, dict[str, Any]]:
    """Of the tests that ran, by the results in the repository."""
    known: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*/tests*.json")):
        tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
        known |= {f"{t['file']}::{t['test']}": t for t in tests if t["outcome"] != "not_run"}
    return known


def longest_first(names: list[str], known: dict[str, dict[str, Any]]) -> list[str]:
    """`names` by the seconds that they took, those that nobody knows first."""
    return sorted(names, key=lambda name: -known[name]["seconds"] if name in known else float("-inf"))


def of_several(names: list[str], known: dict[str, dict[str, Any]], n_gpus: int) -> list[str]:
    """Those of `names` that are known to need more than one GPU, of which there are as many."""
    return [name for name in names if name in known and 1 < needed_gpus(known[name]) <= n_gpus]


def start_beside(args: argparse.Namespace, groups: list[str], gpu: int, part: int = 0, parts: int = 1) -> Beside:
    """One of `parts` of these groups' tests, in a process on this GPU; it and the folder of its outcomes."""
    folder = args.out.resolve() / f"beside{gpu}_{groups[0]}"
    command = [sys.executable, __file__, "--out", str(folder), "--groups", *groups, "--commit", args.commit or ""]
    command += ["--part", str(part), str(parts), "--", *args.files]
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}), folder


def groups_beside(n_gpus: int) -> list[str]:
    """The groups that other processes run, so long as the tests of `together` do."""
    if n_gpus > 1:
        return ["memory", "engine", "alone"]
    room = torch.cuda.get_device_properties(0).total_memory >= ROOM
    return ["memory", "engine"] if room else ["engine"]


def run(names: list[str], options: list[str], recorder: Recorder, folder: Path) -> int:
    """pytest's exit code for `names`, in this order."""
    order = folder / "order.json"
    write_json(order, names)
    os.environ["BI_OPS_TESTS"] = str(order)
    os.environ["BI_OPS_TEST_LOCKS"] = str(folder)
    files = list(dict.fromkeys(name.split("::", 1)[0] for name in names))
    return int(pytest.main(["-p", "no:cacheprovider", "-p", "ordered_tests", "-m", "", *options, *files], [recorder]))


def in_turn(jobs: int) -> list[str]:
    """pytest-xdist's options: processes get a test whenever they are through with one."""
    return ["-n", str(jobs), "--dist", "load", "--maxschedchunk", "1"]


def by_groups(args: argparse.Namespace, names: dict[str, list[str]], recorder: Recorder, gpus: list[int]) -> bool:
    """Run the tests that are left, a GPU for each process; whether they went on to the end."""
    beside: list[Beside] = []
    elsewhere: list[str] = []
    if gpus and not args.part and names["together"]:
        elsewhere = [group for group in groups_beside(len(gpus)) if recorder.left(names[group])]
    if len(gpus) > 1:
        reserved = gpus[(len(gpus) + 1) // 2 :] if elsewhere else []
        beside = [start_beside(args, elsewhere, gpu, i, len(reserved)) for i, gpu in enumerate(reserved)]
        os.environ["BI_OPS_TEST_GPUS"] = ",".join(str(gpu) for gpu in gpus if gpu not in reserved)
    else:
        beside = [start_beside(args, [group], 0) for group in elsewhere]
    goes_on = True
    with tempfile.TemporaryDirectory() as folder:
        for group in (group for group in GROUPS if group not in elsewhere):
            left = recorder.left(names[group])
            options = in_turn(args.jobs) if group == "together" else []
            if left and run(left, options, recorder, Path(folder)) == pytest.ExitCode.INTERRUPTED:
                goes_on = False
                break
    for process, theirs in beside:
        process.wait()
        recorder.add(json.loads((theirs / FILE).read_text(encoding="utf-8"))["tests"])
    os.environ.pop("BI_OPS_TEST_GPUS", None)
    return goes_on


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
    header, path, known = provenance(args.commit), args.out.resolve() / FILE, []
    if args.resume and path.exists():
        earlier = json.loads(path.read_text())
        for key in ("commit", "device", "versions"):
            if earlier[key] != header[key]:
                parser.error(f"{path} is of {key} {earlier[key]}, this is {header[key]}: run without --resume")
        known = earlier["tests"]
        for other in sorted(path.parent.glob("beside*/tests.json")):  # of processes that outlived that run
            known += [t for t in json.loads(other.read_text())["tests"] if t["outcome"] != "not_run"]
    path.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # tests are named from here
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "bench"), os.environ.get("PYTHONPATH"))))
    everything = ["-p", "no:cacheprovider", "-m", ""]  # the slow ones too
    collector = Collector()
    if exit_code := pytest.main([*everything, "--collect-only", "-qq", *(args.files or ["tests"])], [collector]):
        return int(exit_code)
    part, parts = args.part or (0, 1)
    names = {group: collector.names[group][part::parts] if group in args.groups else [] for group in GROUPS}
    outcomes = known_outcomes()
    names["together"] = longest_first(names["together"], outcomes)
    recorder = Recorder(path, header, [name for group in names.values() for name in group], known)
    gpus = list(range(torch.cuda.device_count()))

    def with_all_gpus(names: list[str]) -> bool:
        """Run them, each process with all GPUs, as many as one GPU has else; whether they went on to the end."""
        with tempfile.TemporaryDirectory() as folder:
            options = in_turn(max(args.jobs // len(gpus), 1))
            return run(names, options, recorder, Path(folder)) != pytest.ExitCode.INTERRUPTED

    several = [] if args.part else of_several(recorder.left(names["together"]), outcomes, len(gpus))
    goes_on = (not several or with_all_gpus(several)) and by_groups(args, names, recorder, gpus)
    if goes_on and not args.part and (again := recorder.ask_again(names["together"], len(gpus))):
        with_all_gpus(again)
    counts = recorder.write()
    print(", ".join(f"{n} {outcome.replace('_', ' ')}" for outcome, n in counts.items()))
    return 1 if counts["failed"] or counts["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
