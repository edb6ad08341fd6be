"""Has every layout on the GPUs of one host the bits of one GPU? Writes layouts.json, a row as soon as it is known.

    python bench/layouts.py --out bench/results/h100 [--gpus 4] [--model 0.6B] [--beside 2] [--seconds 240] [--only ...]
    python bench/layouts.py --out bench/results/h200 --share-gpu 4       as many ranks on one GPU, none in shards
    python bench/layouts.py --out bench/results/h200 --model 30B-A3B --layers 4       with experts: moe_layouts.json

Three questions, each a job in processes of its own, several at once where GPUs are free:

    sample   vLLM with the plugin at tensor-parallel sizes 1, 2, 4 (torchrun), and 2 in processes that vLLM starts:
             tokens and log-probabilities of the same requests
    train    three updates on what was sampled at that size, by 1, 2 and 4 ranks, whole on each or in shards (fsdp),
             each with two cuts into micro-batches: log-probabilities against the rollout's; gradients of every update
             and weights against one rank's
             with segments: the same, a model shared by 1, 2 and 4 ranks (train_tp), 1 or 2 groups of them; against one
             rank of as many segments, log-probabilities too
    loop     `bi_ops train` of a tiny model, sampling and training on the same ranks, whole or in shards, or from
             CUDA graphs: the final weights

Controls, which have to differ: partial outputs that vLLM adds over ranks; gradients that NCCL adds over ranks, in
shards by a reduce-scatter; partial outputs that NCCL adds over the ranks of a model. With --share-gpu rows
say "shared": bench/share_gpu.py says what they are evidence of, and nothing in them is a time. Exit status 0 only if
all of that held that the GPUs allow. The model has random weights. Jobs that did not run are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import offer_plugin, provenance
from step_sides import EXPERTS, SHAPES, expert_shape, shape
from table_parts import load
from torchrun import environment, launcher, stop

from bi_ops.core.files import write_json
from bi_ops.parallel.ranks import SHARED_GPU
from bi_ops.rollout.base import Completion

HERE = Path(__file__).resolve().parent
LOOP = ["--preset", "h100", "--steps", "3", "--atoms", "4", "--save-every", "0"]


@dataclass(frozen=True)
class Job:
    """tp: of the rollout. dp x train_tp: ranks that train. fsdp: in shards. needs: jobs that must have ended well.

    ep: ranks have whole experts while sampling. train_ep: neighbours that share experts in training. collectives: ranks
    that sample gather by these, not over each other's memory. graphs: training replays its micro-batches.
    """

    kind: str
    tp: int = 1
    dp: int = 0
    executor: str | None = None
    control: bool = False
    needs: tuple[str, ...] = ()
    fsdp: bool = False
    ep: bool = False
    train_ep: int = 1
    collectives: bool = False
    train_tp: int = 1
    segments: int = 1
    graphs: bool = False

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        parts = [self.kind, f"tp{self.tp}", f"dp{self.dp}" if self.dp else "", self.executor or ""]
        parts += [
            "fsdp" if self.fsdp else "",
            "graphs" if self.graphs else "",
            "ep" if self.ep else "",
            "collectives" if self.collectives else "",
            "control" if self.control else "",
        ]
        parts += [f"experts{self.train_ep}" if self.train_ep > 1 else ""]
        parts += [f"segments{self.segments}-shared{self.train_tp}" if self.segments > 1 else ""]
        return "-".join(filter(None, parts))

    @property
    def gpus(self) -> int:
        """That it occupies."""
        return max(self.tp, self.dp) if self.kind != "train" else self.dp * self.train_tp


#: What those that share a model are compared with.
SHARED = "train-tp1-dp1-segments4-shared1"

#: In the order in which they start.
JOBS = (
    Job("sample", 1),
    Job("sample", 2),
    Job("train", 1, 1, needs=("sample-tp1",)),
    Job("sample", 4),
    Job("sample", 2, control=True),
    Job("sample", 2, collectives=True),
    Job("train", 2, 2, needs=("sample-tp2",)),
    Job("train", 2, 2, needs=("sample-tp2",), fsdp=True),
    Job("train", 4, 4, needs=("sample-tp4",)),
    Job("train", 4, 4, needs=("sample-tp4",), fsdp=True),
    Job("train", 1, 1, needs=("sample-tp1",), segments=4),
    Job("train", 1, 1, needs=(SHARED,), segments=4, train_tp=2),
    Job("train", 1, 2, needs=(SHARED,), segments=4, train_tp=2),
    Job("train", 1, 1, needs=(SHARED,), segments=4, train_tp=4),
    Job("loop", 1, 1),
    Job("loop", 2, 2),
    Job("loop", 2, 2, fsdp=True),
    Job("loop", 2, 2, graphs=True),
    Job("loop", 4, 4),
    Job("sample", 2, executor="mp"),
    Job("loop", 2, 4),
    Job("loop", 2, 4, fsdp=True),
)
#: Of mixtures of experts.
EXPERT_JOBS = (
    Job("sample", 1),
    Job("sample", 2),
    Job("sample", 2, ep=True),
    Job("train", 1, 1, needs=("sample-tp1",)),
    Job("sample", 2, ep=True, control=True),
    Job("sample", 2, control=True),
    Job("train", 2, 2, needs=("sample-tp2-ep",), ep=True, train_ep=2),
    Job("train", 2, 2, needs=("sample-tp2-ep",), ep=True),
    Job("sample", 4, ep=True),
    Job("sample", 4),
)


@dataclass
class Run:
    """A job in progress."""

    job: Job
    process: subprocess.Popen[bytes]
    devices: list[str]
    log: Path
    began: float = field(default_factory=time.monotonic)


#: Columns that say what a row is of.
OF = (
    *("what", "model", "engine", "executor", "rollout_tp", "train_tp", "dp", "fsdp", "ep", "train_ep", "segments"),
    *("step_graphs", "peer_memory", "control", "shared", "microbatches"),
)


def merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows`, and those of before that are of something else; by model, then as jobs start."""

    def of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(column) or None for column in OF)

    new = {of(row) for row in rows}
    kinds = ("sample", "train", "loop")
    every = [*(row for row in before if of(row) not in new), *rows]
    return sorted(every, key=lambda row: (row["model"], kinds.index(row["what"]), row["segments"], row["control"]))


class Bench:
    """Starts jobs on free GPUs and turns what they leave into rows."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.began = args, scratch, time.monotonic()
        self.file = "moe_layouts" if args.model in EXPERTS else "layouts"
        self.jobs: tuple[Job, ...] = EXPERT_JOBS if args.model in EXPERTS else JOBS
        self.checkpoint = scratch / "model"
        self.free = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
        if args.share_gpu:
            self.free = self.free[:1] * args.share_gpu
        self.ranks, self.devices = len(self.free), tuple(self.free)
        self.free *= args.beside
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.too_large: set[str] = set()  # of these, for this machine
        self.done: set[str] = set()
        self.provenance = provenance(args.commit)

    def command(self, job: Job) -> list[str]:
        """What a job runs."""
        torchrun = job.gpus > 1 and job.executor is None
        start = launcher(job.gpus) if torchrun else []
        if job.kind == "loop":
            out = str(self.scratch / job.name)
            loop = [*LOOP, *["--fsdp"] * job.fsdp, *["--step-graphs"] * job.graphs, f"--tp-rollout={job.tp}"]
            loop += ["--output", out]
            # Not measured: others give memory back meanwhile.
            loop += ["--gpu-memory-utilization", "0.1", f"--kv-cache-memory-bytes={1 << 30}"]
            program = ["-m", "bi_ops"]
            if self.args.share_gpu:
                program = [str(HERE / "share_gpu.py")]
                loop += ["--no-cuda-graphs"]
            return [sys.executable, *start, *program, "train", *loop]
        out = str(self.scratch / f"{job.name}.{'pt' if job.kind == 'sample' else 'json'}")
        options = [
            "--checkpoint",
            str(self.checkpoint),
            "--engine",
            self.args.engine,
            "--out",
            out,
            "--tp",
            str(job.tp),
        ]
        options += ["--sequences", str(self.args.sequences), "--new-tokens", str(self.args.new_tokens)]
        if job.kind == "train":
            sampled = next((n for n in job.needs if n.startswith("sample")), f"sample-tp{job.tp}")
            options += ["--rollout", str(self.scratch / f"{sampled}.pt")]
            options += ["--train-tp", str(job.train_tp), "--segments", str(job.segments)]
            options += ["--train-ep", str(job.train_ep)]
            options += ["--scores", str(self.scratch / f"{SHARED}.pt")]
        options += ["--ep"] if job.ep and job.kind == "sample" else []
        options += ["--executor", job.executor] if job.executor else []
        options += ["--collectives"] if job.collectives else []
        options += ["--control"] if job.control else []
        options += ["--fsdp"] if job.fsdp else []
        return [sys.executable, *start, str(HERE / "layouts_worker.py"), job.kind, *options]

    def environment(self, devices: list[str]) -> dict[str, str]:
        """The plugin's entry point is there for processes that vLLM starts."""
        return environment(devices, self.scratch) | ({SHARED_GPU: "1"} if self.args.share_gpu else {})

    def prepare(self) -> None:
        """The checkpoint, and metadata by which vLLM's processes find the plugin where it is not installed."""
        offer_plugin(self.scratch)
        config = json.dumps((shape if self.file == "layouts" else expert_shape)(self.args.model, self.args.layers))
        make = [str(HERE / "layouts_worker.py"), "checkpoint", "--checkpoint", str(self.checkpoint), "--config", config]
        subprocess.run([sys.executable, *make], check=True, env=self.environment(self.free[:1]), timeout=120)

    def devices_for(self, job: Job) -> list[str]:
        """Those that have most room; fewer than the job needs where there is none."""
        if self.args.share_gpu:
            return self.free[: job.gpus]
        return sorted(sorted(set(self.free), key=lambda device: (-self.free.count(device), device))[: job.gpus])

    def start(self, job: Job) -> Run:
        devices = self.devices_for(job)
        for device in devices:
            self.free.remove(device)
        log = self.scratch / f"{job.name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command(job), stdout=out, stderr=out, env=self.environment(devices), start_new_session=True
            )
        return Run(job, process, devices, log)

    def end(self, run: Run, why: str | None = None) -> None:
        """Take its GPUs back, and its rows if it ended well."""
        stop(run.process)
        self.free += run.devices
        if why is None and run.process.returncode == 0:
            self.done.add(run.job.name)
        else:
            tail = run.log.read_text(errors="replace").splitlines()[-25:]
            self.failed[run.job.name] = "\n".join([*tail, *([why] if why else [])])
        print(f"{run.job.name}: {time.monotonic() - run.began:.0f} s, {why or 'ended'}", flush=True)
        self.write()

    def left(self) -> float:
        """Seconds."""
        return self.args.seconds - (time.monotonic() - self.began)

    def run(self, jobs: list[Job]) -> None:
        """All jobs, the first first, as GPUs and time allow."""
        running: list[Run] = []
        while jobs or running:
            for run in [r for r in running if (code := r.process.poll()) is not None or self.left() < 0]:
                code = run.process.poll()
                running.remove(run)
                self.end(run, "the time was over" if code is None else None if code == 0 else f"exit status {code}")
            if self.left() < 0:
                self.failed |= {job.name: "the time was over" for job in jobs}
                break
            for job in [j for j in jobs if set(j.needs) & self.failed.keys() or j.gpus > self.ranks]:
                self.failed[job.name] = f"needs {', '.join(job.needs) or 'more GPUs'}"
                if job.gpus > self.ranks or set(job.needs) & self.too_large:
                    self.too_large.add(job.name)
                jobs.remove(job)
            ready = (job for job in jobs if set(job.needs) <= self.done and len(self.devices_for(job)) == job.gpus)
            if (found := next(ready, None)) is not None:
                jobs.remove(found)
                running.append(self.start(found))
                continue
            time.sleep(0.2)
        self.write()

    # What was found.

    def base(self, job: Job, **found: Any) -> dict[str, Any]:
        return {
            **{"what": job.kind, "model": self.args.model, "engine": self.args.engine, "executor": job.executor},
            **{
                "rollout_tp": job.tp,
                "train_tp": job.train_tp,
                "dp": job.dp,
                "fsdp": job.fsdp,
                "ep": job.tp if job.ep else 1,
                "train_ep": job.train_ep,
                "segments": job.segments,
                "step_graphs": job.graphs,
                "peer_memory": job.kind == "sample" and job.tp > 1 and not (job.collectives or self.args.share_gpu),
                "control": job.control,
                "shared": bool(self.args.share_gpu),
            },
            **found,
        }

    def samples(self) -> Iterator[dict[str, Any]]:
        """Each size against one GPU."""
        if "sample-tp1" not in self.done:
            return
        alone = self.load("sample-tp1")
        for job in self.jobs:
            if job.kind == "sample" and job.name in self.done:
                checked = different = other_tokens = 0
                for a, b in zip(alone, self.load(job.name), strict=True):
                    same = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
                    bits = (a.logprobs.view(torch.int32) == b.logprobs.view(torch.int32)).tolist()
                    checked += len(same)
                    other_tokens += same.count(False)
                    different += [x and y for x, y in zip(same, bits, strict=True)].count(False)
                times = json.loads((self.scratch / f"{job.name}.json").read_text())
                numbers = {"tokens_checked": checked, "tokens_different": different, "other_tokens": other_tokens}
                yield self.base(job, **numbers, **times)

    def load(self, name: str) -> list[Completion]:
        """What a job sampled."""
        found: list[Completion] = torch.load(self.scratch / f"{name}.pt", weights_only=False)
        return found

    def trained(self) -> Iterator[dict[str, Any]]:
        """Each number of ranks against one, at its first cut."""
        firsts = {1: self.scratch / "train-tp1-dp1.json", 4: self.scratch / f"{SHARED}.json"}
        for job in self.jobs:
            path = self.scratch / f"{job.name}.json"
            if job.kind == "train" and path.exists() and firsts[job.segments].exists():
                first = json.loads(firsts[job.segments].read_text())[0]
                for found in json.loads(path.read_text()):
                    gradients, weights = found.pop("gradients"), found.pop("weights")
                    # Of the first update, in the order of a backward: where the first one is, bits are lost.
                    ones = first["gradients"][0]
                    differ = [n for n, bits in reversed(gradients[0].items()) if bits != ones.get(n)]
                    yield self.base(
                        job,
                        **found
                        | {"control": found["microbatches"] == "control", "atoms": 4, "updates": len(gradients)},
                        gradients_equal=gradients == first["gradients"],
                        weights_equal=weights == first["weights"],
                        differ=f"{len(differ)} of {len(ones)}: {', '.join(differ[:8])}" if differ else "",
                    )

    def loops(self) -> Iterator[dict[str, Any]]:
        """The final weights of each layout against those of one process."""
        found = {
            j: json.loads((self.scratch / j.name / "summary.json").read_text())
            for j in self.jobs
            if j.kind == "loop" and j.name in self.done
        }
        alone = next((s for j, s in found.items() if j.dp == 1), None)
        for job, summary in found.items():
            yield self.base(
                job,
                model="tiny",
                atoms=4,
                tokens_checked=summary["tokens_checked"],
                tokens_different=summary["tokens_different"],
                weights_equal=None if alone is None else summary["weights_sha256"] == alone["weights_sha256"],
                seconds=round(summary["seconds"], 1),
            )

    def write(self) -> None:
        """Everything that is known now; rows of other jobs in an existing file stay, with their commit."""
        self.rows = [*self.samples(), *self.trained(), *self.loops()]
        here = {"gpus": len(set(self.devices)), **{key: self.provenance[key] for key in ("commit", "date")}}
        rows = merged((load(self.args.out, f"{self.file}.json") or {}).get("rows", []), [r | here for r in self.rows])
        not_run = {name: why.splitlines()[-1] for name, why in self.failed.items()}
        write_json(self.args.out / f"{self.file}.json", {**self.provenance, "rows": rows, "not_run": not_run})

    def verdict(self) -> int:
        """0 where equal rows are equal and controls are not."""
        wrong = [name for name in self.failed if name not in self.too_large]
        for row in self.rows:
            equal = not row["tokens_different"] and row.get("gradients_equal", True) and row.get("weights_equal", True)
            differs = row["tokens_different"] if row["what"] == "sample" else not row.get("gradients_equal", True)
            ok = differs if row["control"] else equal and row.get("ranks_agree", True)
            keys = (
                "what",
                "rollout_tp",
                "ep",
                "train_ep",
                "train_tp",
                "segments",
                "dp",
                "fsdp",
                "executor",
                "microbatches",
                "control",
            )
            where = {k: row[k] for k in keys if row.get(k) is not None}
            numbers = {k: row.get(k) for k in ("tokens_different", "gradients_equal", "weights_equal", "differ")}
            print("ok   " if ok else "WRONG", where, numbers, flush=True)
            wrong += [] if ok else [str(where)]
        for name, why in self.failed.items():
            print(f"{name}: {why}", flush=True)
        return 1 if wrong or not self.rows else 0


def main() -> int:
    named = dict.fromkeys(job.name for job in (*JOBS, *EXPERT_JOBS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that layouts.json is written to")
    parser.add_argument("--gpus", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument("--share-gpu", type=int, metavar="RANKS", help="as many ranks on the first GPU, without graphs")
    parser.add_argument(
        "--beside", type=int, default=1, metavar="N", help="jobs at a time on a GPU, if they fit; bits alone count (1)"
    )
    parser.add_argument("--model", default="0.6B", choices=[*SHAPES, *EXPERTS])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--engine", default="vllm", help="embedded: on a machine without vLLM, one rank")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=240, help="jobs are ended then")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=" ".join(named))
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if args.beside < 1:
        parser.error(f"--beside is {args.beside}; it must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        bench.prepare()
        # vLLM itself gives each of the processes that it starts a GPU; ranks that share one use collectives; and gloo's
        # reduce-scatter of tensors on a GPU ends the process.
        jobs = [job for job in bench.jobs if not (args.share_gpu and (job.executor or job.collectives or job.fsdp))]
        bench.run([job for job in jobs if args.only is None or job.name in args.only])
        (args.out / f"{bench.file}.log").write_text("\n\n".join(f"{n}\n{why}" for n, why in bench.failed.items()))
        return bench.verdict()


if __name__ == "__main__":
    sys.exit(main())
