"""What bi_ops shows on GPUs, benchmark after benchmark; a later call goes on. Writes every.json.

    python bench/every.py --list
    python bench/every.py --out bench/results/h200 --seconds 560 [--only verify faults] [--commit HASH]

Jobs that compare bits run beside each other as far as cores allow, for compiling kernels is most of their time. Those
that time something come after them, one on each GPU, and nothing beside. A job writes its own files into OUT, and what
it prints into OUT/log. One that ended well at this commit is not run again. What the GPUs or the time did not allow is
named. Exit status 0 only if every job that ran ended well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import find_commit
from table_parts import load

from bi_ops.core.files import write_json

HERE = Path(__file__).resolve().parent
CACHE = ("--kv-cache-memory-bytes", str(1 << 30))
MODES = ("plugin", "stock graphs", "invariant", "stock")
SIDES = ("bi_ops", "torch, compiled")


@dataclass(frozen=True)
class Job:
    """command: of a benchmark, without --out. cpus: processes that it keeps busy. seconds: that it is expected to take.

    gpus: that it needs. quiet: it times something. limited: it takes --seconds. torchrun: ranks that it is started on.
    """

    name: str
    command: tuple[str, ...]
    cpus: int
    seconds: int
    gpus: int = 1
    quiet: bool = False
    limited: bool = False
    torchrun: int = 0


FAULTS = ("faults.py", "--preset", "h100", "--eager", "--kills", "20", "--of-a-run", "10", "--per-gpu", "4")
JOBS = (
    Job("layouts", ("layouts.py", "--gpus", "2"), 8, 420, gpus=2, limited=True),
    Job(
        "layouts of experts",
        ("layouts.py", "--gpus", "2", "--model", "30B-A3B", "--layers", "4"),
        8,
        400,
        2,
        limited=True,
    ),
    Job("verify", ("verify.py", "--level", "full", "--jobs", "12"), 12, 260, limited=True),
    Job("faults", (*FAULTS, "--preload", "vllm", *CACHE), 6, 320),
    Job("sanitize", ("sanitize.py", "--jobs", "12"), 12, 330, limited=True),
    Job("train experts", ("train.py", "--preset", "h100-moe", *CACHE), 2, 150),
    Job("whole experts", ("moe_whole.py",), 2, 180, limited=True),
    Job("weight transfer", ("weight_transfer.py", "--model", "0.6B"), 4, 180, gpus=2, limited=True),
    Job("conditions", ("conditions.py", "--jobs", "6"), 8, 500),
    Job("models", ("models.py", "--jobs", "6"), 8, 300),
    Job("peer", ("peer.py",), 2, 20, gpus=2, quiet=True, torchrun=2),
    Job("exchange", ("exchange.py",), 2, 30, gpus=2, quiet=True, torchrun=2),
    Job(
        "layout costs", ("layout_costs.py", "--gpus", "2", "--models", "1.7B"), 4, 480, gpus=2, quiet=True, limited=True
    ),
    Job("segment configs", ("segment_configs.py",), 2, 70, quiet=True, limited=True),
    Job(
        "rollout",
        ("rollout.py", "--together", "--starts", "4", "--models", "0.6B", "4B", "--rounds", "3", "--modes", *MODES),
        8,
        420,
        quiet=True,
    ),
    Job(
        "rollout profiles",
        ("rollout.py", "--profile", "--models", "0.6B", "4B", "--modes", *MODES[:2], "--batches", "256"),
        4,
        180,
        quiet=True,
    ),
    Job("layer's host", ("layer_host.py", "--models", "0.6B", "8B"), 1, 60, quiet=True),
    Job("RL step", ("rl_step.py",), 4, 200, quiet=True),
    Job(
        "step",
        ("step.py", "--models", "1.7B", "--tokens", "8192", "32768", "--update"),
        4,
        300,
        quiet=True,
        limited=True,
    ),
    Job(
        "step of experts",
        ("step.py", "--models", "30B-A3B", "--layers", "8", "--sides", *SIDES),
        4,
        400,
        quiet=True,
        limited=True,
    ),
    Job("start", ("start.py", "--models", "0.6B"), 16, 180, quiet=True, limited=True),
    Job("experts decoding", ("moe.py", "--tokens", "1", "64", "256"), 2, 120, quiet=True, limited=True),
)


@dataclass
class Run:
    """A job in progress, on these GPUs."""

    job: Job
    process: subprocess.Popen[bytes]
    gpus: list[str]
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.began


def may_start(job: Job, running: list[Run], gpus: list[str], cores: int) -> list[str]:
    """The GPUs that the job can start on now; none where it has to wait."""
    if len(gpus) < job.gpus or any(run.job.quiet != job.quiet for run in running):
        return []
    if running and sum(run.job.cpus for run in running) + job.cpus > cores:
        return []
    load = {gpu: sum(gpu in run.gpus for run in running) for gpu in gpus}
    chosen = sorted(gpus, key=load.__getitem__)[: job.gpus]
    return [] if job.quiet and any(load[gpu] for gpu in chosen) else sorted(chosen, key=gpus.index)


class Every:
    """Starts jobs as they fit, and writes down how they ended."""

    def __init__(self, args: argparse.Namespace, gpus: list[str]) -> None:
        self.args, self.gpus, self.cores = args, gpus, os.cpu_count() or 1
        self.until, self.commit = time.monotonic() + args.seconds, find_commit(args.commit)
        self.ended: dict[str, dict[str, Any]] = load(args.out, "every.json") or {}
        self.failed: list[str] = []

    def command(self, job: Job, left: float) -> list[str]:
        ranks = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.torchrun}"] if job.torchrun else []
        )
        script, *options = job.command
        options += ["--out", str(self.args.out), "--commit", self.commit]
        options += ["--seconds", str(max(round(min(left - 15, 1.5 * job.seconds)), 1))] if job.limited else []
        return [sys.executable, *ranks, str(HERE / script), *options]

    def start(self, job: Job, gpus: list[str]) -> Run:
        log = self.args.out / "log" / f"{job.name.replace(' ', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command(job, self.until - time.monotonic()),
                **{"stdout": out, "stderr": out, "env": environment, "start_new_session": True},
            )
        print(f"{job.name}: on GPU {', '.join(gpus)}", flush=True)
        return Run(job, process, gpus)

    def end(self, run: Run) -> None:
        """Write down how it ended; if it has not, end it."""
        late = run.process.poll() is None
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        code = run.process.wait()
        status = "the time was over" if late else code
        self.failed += [run.job.name] if status != 0 else []
        self.ended[run.job.name] = {"status": status, "seconds": round(run.seconds()), "commit": self.commit}
        write_json(self.args.out / "every.json", self.ended)
        print(f"{run.job.name}: {status if late else f'exit status {code}'}, {run.seconds():.0f} s", flush=True)

    def run(self, jobs: list[Job]) -> int:
        running: list[Run] = []
        while jobs or running:
            over = time.monotonic() > self.until
            for run in [r for r in running if r.process.poll() is not None or over]:
                running.remove(run)
                self.end(run)
            for job in [] if over else list(jobs):
                if gpus := may_start(job, running, self.gpus, self.cores):
                    jobs.remove(job)
                    running.append(self.start(job, gpus))
            if over or not running:
                break
            time.sleep(0.2)
        for job in jobs:
            print(f"{job.name}: not begun; it needs {job.gpus} GPU and about {job.seconds} s")
        return 1 if self.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=560, help="everything has ended then")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[job.name for job in JOBS])
    parser.add_argument("--again", action="store_true", help="also what has ended well at this commit")
    parser.add_argument("--list", action="store_true", help="print the jobs, and run nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if args.list:
        for job in JOBS:
            kind = "quiet" if job.quiet else "bits"
            print(f"{job.name:20} {kind:5} {job.gpus} GPU {job.seconds:4} s  {' '.join(job.command)}")
        return 0
    if args.out is None:
        parser.error("--out is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = Every(args, visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())])
    well = {name for name, e in every.ended.items() if e["status"] == 0 and e["commit"] == every.commit}
    return every.run([j for j in JOBS if (not args.only or j.name in args.only) and (args.again or j.name not in well)])


if __name__ == "__main__":
    sys.exit(main())
