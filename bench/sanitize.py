"""Every kernel under compute-sanitizer: memcheck, racecheck, initcheck, synccheck. Writes sanitizer.json.

    python bench/sanitize.py --out bench/results/h200 [--seconds 180] [--tools memcheck ...] [--only norm ...]

A family of kernels (bench/sanitize_drivers.py) runs in a process of its own, first by itself, which compiles its
kernels, then under each tool. Memory is torch's but not cached, so the tools know where each tensor ends. Processes run
in parallel and take the visible GPUs in turn. Each tool also watches a kernel with the fault that it looks for: if it
finds nothing there, nothing it says counts. And it watches kernels that are right (bench/sanitize_right.py): what it
reports of these as well is no finding, but something that the tool does not understand.

sanitizer.json has a table, kernel by tool: clean; errors, with the first; unsupported; timeout; or failed. It is
written after each process, and a later run goes on with what is missing, unless the commit is another one. Exit status
0 if all is clean and every control was found, 4 if a control was not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import provenance
from sanitize_drivers import DRIVERS, PLANTED, kernels_in_the_code, launches, plant
from sanitize_right import RIGHT, explained
from table_parts import load

from bi_ops.core import runtime
from bi_ops.core.files import write_json

TOOLS = tuple(PLANTED)
ALONE = "alone"  # without a tool
CONTROL = "control"
FILE = "sanitizer.json"
#: How bad a status is: a kernel that several families launch has the worst.
WORST = ("errors", "failed", "timeout", "unsupported", "clean")


@dataclass
class Outcome:
    """Of one process. status: of `WORST`. message: the first error, or why nothing was found out. by_kernel: the first
    error in each kernel that has one; "" is not a kernel of bi_ops. reports: the first ones, whole. launched: kernels.
    """

    status: str
    message: str = ""
    errors: int = 0
    by_kernel: dict[str, str] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    seconds: float = 0.0


#: Kept of a kernel, of those that differ in more than threads, blocks and addresses.
REPORTS = 20
_PLACE = re.compile(r"\((?:\d+,)+\d+\)|0x[0-9a-f]{6,}|\d+ hazards?")
_TITLE = re.compile(r"^========= (?! )(.+)$")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
_UNSUPPORTED = ("not supported", "Internal Sanitizer Error", "Unable to find injection", "Failed to initialize")


def parse(log: str, kernels: Sequence[str]) -> Outcome:
    """What a tool's log says. An error is a line that begins a block, and the lines under it say where."""
    blocks: list[list[str]] = []
    for line in log.splitlines():
        if title := _TITLE.match(line):
            blocks.append([title[1]])
        elif blocks and line.startswith("========="):
            blocks[-1].append(line)
    summary = _SUMMARY.search(log)
    if trouble := next((b[0] for b in blocks if any(u in b[0] for u in _UNSUPPORTED)), ""):
        return Outcome("unsupported", trouble)
    if summary is None:
        return Outcome("failed", "the tool wrote no summary")
    known = re.compile("|".join(sorted(map(re.escape, kernels), key=len, reverse=True)) or "$^")
    found = Outcome("clean", errors=int(summary[1]))
    for block in blocks:
        if block[0].startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application")):
            continue
        where = known.search(block[0]) or known.search("\n".join(block))
        report = "\n".join(" ".join(line.removeprefix("=========").split()) for line in block)
        report = _PLACE.sub("", report)
        name = where[0] if where else ""
        if report not in found.reports and sum(name in r for r in found.reports) < REPORTS:
            found.reports.append(report)
        found.by_kernel.setdefault(name, " ".join(block[0].split())[:200])
        found.message = found.message or next(iter(found.by_kernel.values()))
    if found.errors:
        found.status = "errors"
    return found


# --------------------------------------------------------------------------------------------------------------
# one process


def command(family: str, tool: str, log: Path) -> list[str]:
    drive = [sys.executable, str(Path(__file__).resolve()), "--drive", family]
    if tool == ALONE:
        return drive
    if family == CONTROL:
        drive += ["--plant", tool]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--target-processes", "application-only", "--print-limit", "200", "--log-file", str(log)]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [sanitizer, "--tool", tool, *options, *drive]


def run_one(family: str, tool: str, gpu: str, timeout: float) -> Outcome:
    """A family under a tool, in a process group that ends with its time."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_VISIBLE_DEVICES": gpu}
        process = subprocess.Popen(
            command(family, tool, log),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome("timeout", f"after {timeout:.0f} s", seconds=round(timeout, 1))
        text = log.read_text(errors="replace") if log.exists() else printed
    launched = sorted(set(re.findall(r"^launched (\w+)$", printed, re.MULTILINE)))
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")[:300]
    found = Outcome("clean") if tool == ALONE else parse(text, list(kernels_in_the_code()))
    if found.status in ("clean", "failed") and process.returncode != 0:
        found = Outcome("failed", f"exit status {process.returncode}: {last}", found.errors, found.by_kernel)
    found.launched, found.seconds = launched, round(time.monotonic() - start, 1)
    return found


def drive(family: str, planted: str | None) -> int:
    """What a tool watches."""
    if planted is not None:
        plant(planted)
        return 0
    if family in RIGHT:
        RIGHT[family]()
        torch.cuda.synchronize()
        return 0
    driver = DRIVERS[family]
    with launches() as found:
        driver.run()
    if not runtime.INTERPRET:
        torch.cuda.synchronize()
    print("\n".join(f"launched {name}" for name in sorted(found)), flush=True)
    if missing := set(driver.kernels) - found:
        print(f"{family}: did not launch {', '.join(sorted(missing))}")
        return 1
    return 0


# --------------------------------------------------------------------------------------------------------------
# all of them


def kernel_table(runs: Mapping[str, Mapping[str, Any]], tools: Sequence[str]) -> dict[str, dict[str, str]]:
    """Kernel by tool: the worst that a family which launches it came to, and the first message."""
    table: dict[str, dict[str, str]] = {}
    for kernel in sorted(kernels_in_the_code()):
        for tool in tools:
            cells = []
            for family, driver in DRIVERS.items():
                run = runs.get(f"{family} / {tool}")
                launched = (runs.get(f"{family} / {ALONE}") or {}).get("launched", ())
                if run is None or (kernel not in driver.kernels and kernel not in launched):
                    continue
                status, message = run["status"], run["message"]
                if status == "errors":  # those of other kernels are theirs
                    message = run["by_kernel"].get(kernel, "")
                    status = "errors" if message else "clean"
                if status == "errors" and (why := misjudged(runs, tool, kernel, run)):
                    status, message = "unsupported", f"{tool} reports {why}, which is right"
                cells.append((WORST.index(status), status if status == "clean" else f"{status}: {message}"))
            table.setdefault(kernel, {})[tool] = min(cells)[1] if cells else "not run"
    return table


def misjudged(runs: Mapping[str, Mapping[str, Any]], tool: str, kernel: str, run: Mapping[str, Any]) -> str | None:
    """What the reports on a kernel that were kept are about, if the tool says each of right kernels, too."""
    causes = {explained(tool, r) for r in run.get("reports", ()) if kernel in r}
    known = all(c and (runs.get(f"{c} / {tool}") or {}).get("status") == "errors" for c in causes)
    return " and ".join(sorted(filter(None, causes))) if known and causes else None


def report(runs: Mapping[str, Mapping[str, Any]], tools: Sequence[str]) -> dict[str, Any]:
    controls = {t: runs[f"{CONTROL} / {t}"]["status"] for t in tools if f"{CONTROL} / {t}" in runs}
    found = {t: "found" if status == "errors" else f"NOT FOUND: {status}" for t, status in controls.items()}
    watched = {n: r for n, r in runs.items() if n.rpartition(" / ")[0] not in (CONTROL, *RIGHT)}
    others = {name: r["by_kernel"][""] for name, r in watched.items() if "" in r["by_kernel"]}
    not_understood = {t: [n for n in RIGHT if (runs.get(f"{n} / {t}") or {}).get("status") == "errors"] for t in tools}
    table = kernel_table(runs, tools)
    cells = [cell.partition(":")[0] for row in table.values() for cell in row.values()]
    counts = {status: cells.count(status) for status in (*WORST, "not run") if status in cells}
    return {
        **{"controls": found, "not_understood": {t: names for t, names in not_understood.items() if names}},
        **{"counts": counts, "kernels": table, "errors_elsewhere": others, "runs": dict(runs)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that sanitizer.json is written to")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--only", nargs="+", choices=sorted(DRIVERS), default=sorted(DRIVERS), help="families")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (one for each core)")
    parser.add_argument("--timeout", type=float, default=120, help="of one process, in seconds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="in all; what is left is for a later run")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--drive", choices=[*DRIVERS, *RIGHT, CONTROL], help=argparse.SUPPRESS)
    parser.add_argument("--plant", choices=TOOLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args.drive, args.plant)
    if args.out is None:
        parser.error("--out is missing")
    where, end = provenance(args.commit), time.monotonic() + args.seconds
    before = load(args.out, FILE) or {}
    same = before.get("commit") == where["commit"] and before.get("device") == where["device"]
    runs: dict[str, dict[str, Any]] = dict(before.get("runs", {})) if same else {}
    args.out.mkdir(parents=True, exist_ok=True)
    gpus, lock, started = _gpus(), threading.Lock(), [0]

    def one(family: str, tool: str) -> None:
        with lock:
            gpu, started[0] = gpus[started[0] % len(gpus)], started[0] + 1
        left = end - time.monotonic()
        if left < 5:
            return
        outcome = run_one(family, tool, gpu, min(args.timeout, left))
        with lock:
            if left < args.timeout and outcome.status == "timeout":
                return  # not its own time
            runs[f"{family} / {tool}"] = asdict(outcome)
            write_json(args.out / FILE, {**where, **report(runs, TOOLS)})
            print(f"{family} / {tool}: {outcome.status} {outcome.message} {outcome.seconds} s", flush=True)

    def missing(name: str) -> bool:
        return runs.get(name, {}).get("status") in (None, "timeout", "failed")

    with ThreadPoolExecutor(args.jobs) as pool:
        pending: dict[Future[None], str] = {}
        for tool in args.tools:
            for name in (CONTROL, *RIGHT):
                if missing(f"{name} / {tool}"):
                    pending[pool.submit(one, name, tool)] = ""
        for family in sorted(args.only, key=lambda f: "attention" not in f):  # these compile longest
            pending[pool.submit(one, family, ALONE) if missing(f"{family} / {ALONE}") else pool.submit(_nothing)] = (
                family
            )
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                future.result()
                if family := pending.pop(future):  # its kernels are compiled
                    tools = [t for t in args.tools if missing(f"{family} / {t}")]
                    pending.update(dict.fromkeys([pool.submit(one, family, t) for t in tools], ""))
    found = report(runs, TOOLS)
    print(found["controls"], found["counts"])
    if any(found["controls"].get(t) != "found" for t in args.tools):
        return 4
    return 0 if set(found["counts"]) <= {"clean"} else 1


def _nothing() -> None:
    """A family that has run by itself before."""


def _gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    sys.exit(main())
