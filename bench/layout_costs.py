"""What does exactness cost in each layout, beside the same layout with sums by NCCL and cuBLAS? Writes layouts.csv.

    python bench/layout_costs.py --out bench/results/h200 [--gpus 2] [--models 1.7B 8B] [--seconds 540] [--only ...]

A row is one of our sides beside one baseline; `fastest` marks the faster baseline. ratio = baseline_ms / ours_ms: above
1, bi_ops is faster. On N GPUs:

    step      forward, backward, gradient sum, clip and AdamW of 8,192 tokens on each rank, sequences of 2,048: N ranks
              whole (dp), in shards (fsdp; kept: weights are gathered once a step, not twice), or sharing a model of N
              segments (tp; all have the same tokens). ours: "ordered", sums in the order over collectives, "peer
              copies" (dp, fsdp), the same over the GPUs' copy engines, or (tp) "peer memory", by a kernel; of tp and dp
              also "..., graphs": forward and backward replayed from a CUDA graph, beside which dp exchanges gradients.
              baseline: "library sums", our model with sums by NCCL; "transformers, compiled", bf16 weights, gradients
              and states, layers under torch.compile, torch's DDP, FSDP2 or tensor parallelism; of dp "ordered, at the
              end" too: all gradients are exchanged behind the backward
    segments  forward and backward on one GPU in 2, 4 and 8 segments, beside one segment, all from CUDA graphs
    decode    vLLM at tensor-parallel size N: a token step of a batch. ours: the plugin, also by
              collectives alone; baseline: stock with full CUDA
              graphs, not batch-invariant
    prefill   the same: the first token of 1 or 4 prompts of 8,192 tokens

transfer_share is measured: the share of our step that is gone when its sums over ranks are replaced by nothing, a rank
going on with its own values: 1 - without / with. What overlaps with computing does not count. Sums over ranks are those
of gradients (dp, fsdp) or of partial outputs (tp); weights that fsdp gathers are no sum.

Every part of a job (our sides; each baseline of other code) is a process on each rank. Our sides take turns in it;
those from graphs follow, and parts follow one another. Times are wall clock, all ranks waited for, medians; the slowest
rank counts, for vLLM the first. Weights and tokens are random. A model that does not fit is tried again with half its
layers, every side then; vLLM has all layers. If compiled layers fail, eager ones are the baseline, and say so. Rows are
written after every part, and those of other layouts in an existing file stay. A job that fails or takes too long is
named in layout_costs.log and stops no other. `--dry` runs a tiny model on the CPU over gloo, without vLLM; collectives
and calls stand in for peer memory and graphs. Its figures mean nothing.

--profile FOLDER: behind the steps that are timed, two more of the first of our sides, and of the baseline of other
code, under torch.profiler on the first rank. FOLDER/JOB.SIDE.txt has the kernels by time; how long each stream is busy;
the longest gaps of the compute stream, with what ran before, after and meanwhile, and how long the kernel behind one
was not launched yet; operators and functions of Python by self time. FOLDER/JOB.SIDE.json.gz is a chrome trace
(ui.perfetto.dev). vLLM is not profiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import kept, row_provenance, write_csv
from rollout import build_binding
from rollout_worker import FIRST_TOKEN
from step_sides import SHAPES
from torchrun import environment, launcher, stop

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

WORKER = Path(__file__).with_name("layout_costs_worker.py")
SEGMENTS = (2, 4, 8)
#: Layers that one GPU holds with 16 bytes a parameter and the sums of a tree, where not all of them.
WHOLE_LAYERS = {"8B": 16}
COMPILED, EAGER = "transformers, compiled", "transformers, eager"
GRAPHS = "peer memory, graphs"
COPIES = "peer copies"
#: Our sides, what they are compared with, and the step without sums; what has graphs is compared with one from graphs.
OURS, WITHOUT = ("ordered", COPIES, "peer memory", GRAPHS, "ordered, graphs", f"{COPIES}, graphs"), "no sums"
BASELINES = ("library sums", "ordered, at the end", COMPILED, EAGER)
#: Milliseconds by side and measure.
Times = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Job:
    """One layout of one model. tp, dp: ranks that share the model, and the batch; one of them is 1.

    reshard: of fsdp: weights are gathered for the forward, and again for the backward.
    """

    kind: str
    model: str
    tp: int = 1
    dp: int = 1
    fsdp: bool = False
    reshard: bool = True

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        layout = f"tp{self.tp}" if self.tp > 1 or self.kind == "engine" else "fsdp" * self.fsdp or f"dp{self.dp}"
        layout += f"{self.dp}{'' if self.reshard else '-kept'}" if self.fsdp else ""
        return "-".join((self.kind, self.model, *([] if self.kind == "segments" else [layout])))

    @property
    def parts(self) -> tuple[str, ...]:
        """What runs in processes of its own, one after the other."""
        engines = ("plugin", "stock graphs", *(["plugin collectives"] if self.tp > 1 else []))
        return {"step": ("ours", COMPILED), "segments": ("segments",), "engine": engines}[self.kind]

    @property
    def layers(self) -> int:
        """To begin with."""
        every = SHAPES[self.model][2]
        whole = self.kind == "step" and self.tp == 1 and not self.fsdp
        return min(every, WHOLE_LAYERS.get(self.model, every)) if whole else every


def jobs_of(models: list[str], gpus: int) -> list[Job]:
    """The most wanted first."""
    found = []
    for model in models:
        if gpus > 1:
            found += [Job("step", model, tp=gpus), Job("step", model, dp=gpus)]
            found += [Job("step", model, dp=gpus, fsdp=True, reshard=reshard) for reshard in (True, False)]
        found += [Job("engine", model, tp=gpus), Job("segments", model)]
    return found


def segments_of(model: str) -> list[int]:
    """Numbers of segments that the model's heads have."""
    return [n for n in SEGMENTS if SHAPES[model][4] % n == 0]


def rows_of(job: Job, layers: int, tokens: int, seqlen: int, times: Times) -> Iterator[dict[str, Any]]:
    """Each of our sides beside each baseline that was timed; one without any has a row of its own."""
    layout = {"model": job.model, "layers": layers, "tp": job.tp, "dp": job.dp, "fsdp": job.fsdp}
    layout |= {"reshard_after_forward": job.reshard if job.fsdp else ""}
    if job.kind == "step":
        size = {"segments": job.tp, "batch": job.dp * tokens // seqlen, "tokens": job.dp * tokens}
        for side in OURS:
            yield from _beside("step", side, BASELINES, {"what": "step"} | layout | size, times)
    elif job.kind == "segments":
        for n in segments_of(job.model):
            size = {"segments": n, "batch": tokens // seqlen, "tokens": tokens}
            given = {"what": "segments"} | layout | size
            yield from _beside("forward and backward", f"segments {n}", ("segments 1",), given, times)
    else:
        for side, measure in [(s, m) for s in ("plugin", "plugin collectives") for m in times.get(s, {})]:
            what, batch = measure.split()
            size = {
                "segments": 1,
                "batch": int(batch),
                "tokens": int(batch) * (max(FIRST_TOKEN) if what == "prefill" else 1),
            }
            yield from _beside(measure, side, ("stock graphs",), {"what": what} | layout | size, times)


def _beside(
    measure: str, ours: str, baselines: tuple[str, ...], given: dict[str, Any], times: Times
) -> Iterator[dict[str, Any]]:
    """The rows of one side and measure; given: the columns that say what was run."""
    ms = times.get(ours, {}).get(measure)
    if ms is None:
        return
    found = {b: times[b][measure] for b in baselines if measure in times.get(b, {})}
    without = times.get(f"{WITHOUT}, graphs" if ours.endswith(", graphs") else WITHOUT, {}).get(measure)
    for baseline in found or {"": 0.0}:
        other = found.get(baseline)
        yield {
            **given,
            "ours": ours,
            "ours_ms": round(ms, 3),
            "baseline": baseline,
            "baseline_ms": None if other is None else round(other, 3),
            "fastest": other is not None and other == min(found.values()),
            "ratio": None if other is None else round(other / ms, 3),
            "transfer_share": None if without is None else round(1 - without / ms, 3),
        }


class Bench:
    """Runs the parts of jobs one after the other, and writes what they have found."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.end = args, scratch, time.monotonic() + args.seconds
        given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
        self.devices = given.split(",")[: args.gpus]
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.record = row_provenance(args.commit)

    def command(self, job: Job, part: str, layers: int, out: Path) -> list[str]:
        """What a part runs."""
        ranks = job.tp * job.dp
        options = {"out": out, "model": job.model, "layers": layers, "tp": job.tp, "tokens": self.args.tokens}
        options |= {"seqlen": self.args.seqlen, "steps": self.args.steps}
        given = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
        segments = ["--segments", *map(str, segments_of(job.model))] if job.kind == "segments" else []
        start = launcher(ranks) if ranks > 1 else []
        if self.args.profile is not None and job.kind != "engine":
            segments += ["--profile", str(self.args.profile.resolve() / job.name)]
        return [
            sys.executable,
            *start,
            str(WORKER),
            part,
            *given,
            *["--fsdp"] * job.fsdp,
            *["--kept"] * (not job.reshard),
            *segments,
        ]

    def run(self, job: Job) -> None:
        """Every part; again with half the layers if one does not fit."""
        layers = min(self.args.layers or job.layers, job.layers)
        kept = list(self.rows)
        while True:
            times: dict[str, dict[str, float]] = {}
            fits = True
            parts = list(job.parts)
            while parts and fits:
                part = parts.pop(0)
                why = self.part(job, part, layers, times)
                fits = why is None or "OutOfMemoryError" not in why or job.kind == "engine" or layers == 1
                if why is not None and fits:
                    self.failed[f"{job.name}, {part}"] = why
                    print(f"{job.name}, {part}: {why.splitlines()[-1] if why else 'killed'}", flush=True)
                    parts += [EAGER] if part == COMPILED and self.left() > 0 else []
                self.rows = [*kept, *rows_of(job, layers, self.args.tokens, self.args.seqlen, times)]
                self.write()
            if fits:
                break
            layers //= 2
            print(f"{job.name}: out of memory; again with {layers} layers", flush=True)
        for row in self.rows[len(kept) :]:
            print(*(f"{name}={row[name]}" for name in row if row[name] not in (None, "")), flush=True)

    def part(self, job: Job, part: str, layers: int, times: dict[str, dict[str, float]]) -> str | None:
        """Add what a part finds to `times`; why it failed, if it did."""
        if (left := min(self.left(), self.args.job_seconds)) <= 0:
            return "left out, the time was over"
        began = time.monotonic()
        base = self.scratch / f"{job.name}.{part.replace(', ', '-')}.{layers}"
        log, out = base.with_name(base.name + ".log"), base.with_name(base.name + ".json")
        ended = True
        with log.open("wb") as printed:
            process = subprocess.Popen(
                self.command(job, part, layers, out),
                stdout=printed,
                stderr=printed,
                env=environment(self.devices[: job.tp * job.dp]),
                start_new_session=True,
            )
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                stop(process)
        print(f"{job.name}, {part}: {time.monotonic() - began:.0f} s", flush=True)
        if out.exists():
            found = json.loads(out.read_text())
            times |= found["ms"]
            self.failed |= {f"{job.name}, {side}": why for side, why in found["failed"].items()}
        lines = log.read_text(errors="replace").splitlines()
        if not ended:
            return "\n".join([*lines[-10:], f"cut off after {left:.0f} s"])
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line][-3:]
        return "\n".join([*lines[-40:], *errors]) if process.returncode else None

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """Everything that is known now."""
        if self.rows:
            path, keys = self.args.out / "layouts.csv", ("what", "model", "tp", "dp", "fsdp", "reshard_after_forward")
            write_csv(path, [*kept(path, self.rows, keys), *(row | self.record for row in self.rows)])
        log = "\n\n".join(f"{name}\n{why}" for name, why in self.failed.items())
        (self.args.out / "layout_costs.log").write_text(log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that layouts.csv is written to")
    parser.add_argument("--gpus", type=int, default=max(torch.cuda.device_count(), 1), help="1, 2, 4 or 8, all used")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["1.7B", "8B"])
    parser.add_argument("--layers", type=int, help="fewer than the model has, of training")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5, help="steps, or vLLM's rounds, that are timed")
    parser.add_argument("--seconds", type=float, default=540, help="jobs are ended then")
    parser.add_argument("--job-seconds", type=float, default=300, help="a part of a job is ended then")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs; --list shows them")
    parser.add_argument("--list", action="store_true", help="print the jobs in their order, and end")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="profiles of the first of our sides and others'")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if args.dry:
        args.models, args.gpus, args.tokens, args.seqlen, args.steps = ["dry"], 2, 32, 16, 1
    jobs = [job for job in jobs_of(args.models, args.gpus) if args.only is None or job.name in args.only]
    if args.list:
        print(*(job.name for job in jobs), sep="\n")
        return 0
    if unknown := {*(args.only or [])} - {job.name for job in jobs}:
        parser.error(f"no such jobs: {', '.join(sorted(unknown))}; see --list")
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.dry:
        build_binding()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for job in jobs:
            if args.dry and job.kind == "engine":
                print(f"{job.name}: skipped, --dry has no vLLM", flush=True)
            else:
                bench.run(job)
        for name, why in bench.failed.items():
            print(f"FAILED {name}: {why.splitlines()[-1]}", flush=True)
    return 1 if bench.failed or not bench.rows else 0


if __name__ == "__main__":
    sys.exit(main())
