"""What exactness costs a training step: bi_ops' Qwen3 beside transformers' in plain PyTorch. Writes step.csv.

    python bench/step.py --out bench/results/h100 [--models 0.6B 1.7B] [--tokens 8192 32768] [--seqlen 2048 | rl]
        [--sides ...] [--seconds 300] [--starts 4]
    python bench/step.py --out bench/results/h200 --models 30B-A3B --layers 8 --tokens 8192 16384
        --sides bi_ops "torch, compiled"       with experts: moe_step.csv

A step is forward, log-probabilities of every next token, their mean, backward. Sides, all on the same tokens, in bf16:

    bi_ops            its model over fp32 master weights, weight gradients carried on in fp32, as `bi-ops train` does
    bi_ops, graphs    the same as `bi-ops train --step-graphs`: padded to a bucket, replayed from a CUDA graph
    bi_ops, none      as bi_ops with nothing recomputed, and ...
    bi_ops, layer     ... with whole layers recomputed; the first recomputes norms, rotation and silu-and-mul
    torch             transformers' Qwen3, bf16 weights, SDPA, eager
    torch, compiled   the same under torch.compile, and so the loss
    torch, cudnn      as torch, compiled, with cuDNN's attention alone: the faster of the two is the one to compare with
    torch, autocast   as torch over fp32 master weights, eager
    torch, checkpoint as torch, compiled, with torch's activation checkpointing of every layer
    liger             transformers with Liger's fused kernels, fused linear cross-entropy included

torch's sides are not batch-invariant, and round weight gradients to bf16; experts are `torch._grouped_mm`'s. Sequences
of unequal lengths are packed for bi_ops and padded to the longest for torch. Every side runs in a process of its own
and is timed by wall clock, the GPU waited for after each half of a step; medians. Making and handing over the buffers
of gradients counts; going through the objects of the model for garbage does not. Then the whole step is captured in a
CUDA graph and replayed: what it takes where the GPU never waits for Python. `first_step_s` is from the loaded weights
to the end of the first step, compiling included, with the caches that are there. `--update` adds clip and AdamW, each
by itself and then both as training makes them, behind a step that the GPU is not through with. `--offload` keeps
AdamW's states in host memory. `--profile` writes step_profile.csv, the GPU time by kernel. A model that does not fit
the memory is tried again with half its layers, all its sides then (`layers` says so). Rows are written as they come,
and others in an existing file stay; `--seconds` ends it, and names what was left out. `--dry` runs it all on a tiny
model on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import kept, provenance, write_csv
from step_sides import EXPERTS, SEED, SHAPES, Step, config_of, lengths_of, ours, theirs, wait
from turns import Turn, wait_for_turn

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

SIDES = ("bi_ops", "torch", "torch, compiled", "torch, autocast")
RECOMPUTE = {"bi_ops": "selective", "bi_ops, graphs": "selective", "bi_ops, none": "none", "bi_ops, layer": "layer"}
OTHER_SIDES = ("bi_ops, graphs", "bi_ops, none", "bi_ops, layer", "torch, cudnn", "torch, checkpoint", "liger")
#: Exit status of a side that the memory does not hold.
OUT_OF_MEMORY = 3


def clear(made: Step) -> None:
    for p in made.parameters:
        p.grad = None


def replayed(made: Step, steps: int, value: torch.Tensor) -> float | None:
    """Median milliseconds of a step from a CUDA graph; None, and why on stderr, if it cannot be captured.

    Raises:
        RuntimeError: it has another value than `value`, the step's own.
    """
    torch.cuda.empty_cache()  # a graph has memory of its own, as much as a step takes
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            made.before()
            loss = made.forward()
            loss.backward()
            made.after()
            clear(made)
    except RuntimeError as e:
        print(f"not captured: {str(e).splitlines()[0]}", file=sys.stderr)
        return None
    times = []
    for _ in range(steps + 1):
        start = wait()
        graph.replay()
        times.append(wait() - start)
    if not torch.equal(loss, value):
        raise RuntimeError(f"a captured step has the value {loss.item()} and not {value.item()}")
    return 1e3 * statistics.median(times[1:])


def kernels(made: Step) -> list[dict[str, object]]:
    """GPU time of every kernel of a step, the longest first, and of all together."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        made.before()
        made.forward().backward()
        made.after()
        clear(made)
        wait()
    found = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and e.device_time_total]
    rows = [(e.key[:90], e.count, e.device_time_total) for e in sorted(found, key=lambda e: -e.device_time_total)]
    rows.insert(0, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    return [{"kernel": name, "launches": n, "gpu_ms": round(us / 1e3, 3)} for name, n, us in rows]


def digest(made: Step, loss: torch.Tensor) -> str:
    """Of the bits of the value and of every weight's fp32 gradient: equal where recomputation changes none."""
    found = hashlib.sha256(loss.detach().float().cpu().numpy().tobytes())
    for p in made.parameters:
        assert p.grad is not None
        for part in p.grad.flatten().view(torch.int32).split(1 << 24):
            place = torch.arange(1, len(part) + 1, device=part.device)  # or a permutation would go unseen
            found.update(str(int((part * place).sum())).encode())
    return found.hexdigest()[:16]


def measure(
    side: str, model: str, tokens: int, args: argparse.Namespace, turn: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Median milliseconds of forward, backward, both, and the update, behind steps that warm up, and `turn`."""
    torch.manual_seed(SEED)
    seqlen = None if args.seqlen == "rl" else min(int(args.seqlen), tokens)
    vocabulary = config_of(model)["vocab_size"]
    rows = [torch.randint(vocabulary, (n,)).to(runtime.default_device()) for n in lengths_of(tokens, seqlen)]
    own = side in RECOMPUTE
    start = wait()
    if own:
        made = ours(*(model, rows, args.layers, RECOMPUTE[side]), offload=args.offload, graphs=side == "bi_ops, graphs")
    else:
        made = theirs(model, rows, args.layers, side)
    made.warm()
    times: list[tuple[float, float]] = []
    bits, first_step = "", 0.0
    warm = min(args.steps, 2)
    for i in range(args.steps + warm):
        begin = wait()
        if made.whole is None:
            made.before()
            loss = made.forward()
            middle = wait()
            loss.backward()
        else:
            middle, loss = begin, made.whole()
        made.after()
        end = wait()
        if i == 0:
            first_step = end - start
            bits = digest(made, loss) if own else ""
        clear(made)
        if i == warm - 1:
            turn()
        if i == warm - 1 and not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
            gc.freeze()  # or the time of a step depends on how many objects there are to look at
        if i >= warm:
            times.append((middle - begin, end - middle))
    forward_ms, backward_ms, step_ms = (
        1e3 * statistics.median(f(t) for t in times) for f in (lambda t: t[0], lambda t: t[1], sum)
    )
    peak, reserved = (
        (None, None) if runtime.INTERPRET else (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    )
    loss = loss.detach()
    graph = not runtime.INTERPRET and args.graphs and made.whole is None
    captured_ms = replayed(made, args.steps, loss) if graph else None
    profiled = kernels(made) if args.profile else []
    clip_ms, optimizer_ms, update_ms, update_peak = updated(made, args.steps) if args.update else [None] * 4
    return {
        "model": model,
        "layers": config_of(model, args.layers)["num_hidden_layers"],
        "tokens": tokens,
        "seqlen": args.seqlen,
        "side": side,
        "recompute": RECOMPUTE.get(side, "layer" if "checkpoint" in side else "none"),
        "offload": args.offload if own else "none",
        "gemm": made.gemm,
        "first_step_s": round(first_step, 2),
        "forward_ms": None if made.whole else round(forward_ms, 2),
        "backward_ms": None if made.whole else round(backward_ms, 2),
        "step_ms": round(step_ms, 2),
        "captured_ms": captured_ms and round(captured_ms, 2),
        "clip_ms": clip_ms and round(clip_ms, 2),
        "optimizer_ms": optimizer_ms and round(optimizer_ms, 2),
        "update_ms": update_ms and round(update_ms, 2),
        "tokens_per_s": round(tokens / step_ms * 1e3),
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "update_peak_bytes": update_peak,
        "value": round(loss.item(), 5),
        "bits": bits,
        "kernels": profiled,
    }


def behind(*works: Callable[[], object]) -> float:
    """Seconds that `works` take the GPU behind what it still has to do: the host is ahead of it, as in training."""
    if runtime.INTERPRET:
        began = wait()
        for work in works:
            work()
        return wait() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for work in works:
        work()
    end.record()
    wait()
    return start.elapsed_time(end) / 1e3


def updated(made: Step, steps: int) -> tuple[float, float, float, int | None]:
    """(median milliseconds of clip, AdamW, and both behind a step; peak bytes of a step with the states in memory)."""
    apart, together = [], []
    for i in range(max(steps, 2) + 1):
        if made.whole is None:
            made.before()
            made.forward().backward()
        else:
            made.whole()
        made.after()
        if i == 0 and not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
        if i % 2:
            start = wait()
            made.clip()
            middle = wait()
            made.update()
            apart.append((middle - start, wait() - middle))
        else:  # the first makes the states
            seconds = behind(made.clip, made.update)
            together += [seconds] * bool(i)
        clear(made)
    peak = None if runtime.INTERPRET else torch.cuda.max_memory_allocated()
    clip, optimizer, both = (1e3 * statistics.median(t) for t in (*zip(*apart, strict=True), together))
    return clip, optimizer, both, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that step.csv is written to")
    parser.add_argument(
        "--models", nargs="+", choices=[m for m in (*SHAPES, *EXPERTS) if "dry" not in m], default=["0.6B", "1.7B"]
    )
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, *OTHER_SIDES), default=SIDES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="of a step; each is a row")
    parser.add_argument("--seqlen", default="2048", help="of each sequence; rl: lengths as an RL step has them")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="leave out the captured step")
    parser.add_argument("--update", action="store_true", help="time clip and AdamW too, and the peak with its states")
    parser.add_argument(
        "--offload",
        choices=("none", "states", "masters"),
        default="none",
        help="what bi_ops' sides keep in host memory: AdamW's states, or the fp32 master weights too",
    )
    parser.add_argument("--profile", action="store_true", help="write step_profile.csv too: GPU time by kernel")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no side after so long, and end the last one"
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=1,
        help="sides that compile at a time, and are timed one by one: the GPU has to hold them all; their first steps "
        "take longer (1)",
    )
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    if args.starts < 1:
        parser.error(f"--starts is {args.starts}; it must be at least 1")
    if "liger" in args.sides and EXPERTS.keys() & set(args.models):
        parser.error("liger: its kernels are put into the dense Qwen3 only; leave this side out")
    if args.dry:
        args.models = list(dict.fromkeys("dry-moe" if m in EXPERTS else "dry" for m in args.models))
        args.tokens, args.steps = [32], 1
        args.seqlen = args.seqlen if args.seqlen == "rl" else "16"
    if args.one:
        side, model = args.one
        try:
            print(json.dumps(measure(side, model, args.tokens[0], args, wait_for_turn)))
        except torch.OutOfMemoryError as error:
            print(error, file=sys.stderr)
            return OUT_OF_MEMORY
        return 0
    table = Table(args)
    for model, tokens in itertools.product(args.models, args.tokens):
        layers = config_of(model, args.layers)["num_hidden_layers"]
        while not table.sides(model, tokens, layers) and layers > 1:
            layers //= 2
            print(f"{model} {tokens}: out of memory; again with {layers} layers", file=sys.stderr, flush=True)
    return 1 if table.failed else 0


#: What a row is of; a new one replaces that of an existing file.
KEYS = {"step": ("model", "tokens", "seqlen", "side", "offload"), "step_profile": ("model", "side")}


class Table:
    """Runs sides in processes of their own and writes their rows as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end, self.failed = args, time.monotonic() + args.seconds, False
        self.rows: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.record = provenance(args.commit)
        args.out.mkdir(parents=True, exist_ok=True)

    def sides(self, model: str, tokens: int, layers: int) -> bool:
        """Every side of one model; False: one did not fit the memory, and no row was kept."""
        rows, profiles = list(self.rows), list(self.profiles)
        for first in range(0, len(self.args.sides), self.args.starts):
            sides = self.args.sides[first : first + self.args.starts]
            if self._left() == 0:
                self._fails(f"{model} {tokens} {', '.join(sides)}: left out, out of time")
                continue
            turns = {side: Turn(self._command(side, model, tokens, layers)) for side in sides}
            for turn in turns.values():
                turn.wait_ready(self._left())
            statuses = [self._take(f"{model} {tokens} {side}", turn) for side, turn in turns.items()]
            if OUT_OF_MEMORY in statuses:
                self.rows, self.profiles = rows, profiles
                return False
        return True

    def _left(self) -> float | None:
        """Seconds; None: as many as it takes."""
        return None if math.isinf(self.end) else max(self.end - time.monotonic(), 0)

    def _take(self, name: str, turn: Turn) -> int | None:
        """Keep what a side has measured, or say why it did not; its exit status."""
        status = turn.take(self._left())
        for line in turn.errors:
            if line.startswith("not captured"):
                print(f"{name}: {line}", file=sys.stderr)
        if status is None:
            self._fails(f"{name}: cut off, out of time")
        elif status == 0:
            self._add(json.loads(turn.printed[-1]))
        elif status != OUT_OF_MEMORY:
            self._fails(f"{name}: {(turn.errors or [f'exit status {status}'])[-1]}")  # killed, it says nothing
        return status

    def _fails(self, why: str) -> None:
        self.failed = True
        print(why, file=sys.stderr, flush=True)

    def _command(self, side: str, model: str, tokens: int, layers: int) -> list[str]:
        args = self.args
        wanted = {"--dry": args.dry, "--profile": args.profile, "--no-graphs": not args.graphs, "--update": args.update}
        flags = [flag for flag, given in wanted.items() if given]
        sizes = ["--tokens", str(tokens), "--seqlen", str(args.seqlen), "--steps", str(args.steps)]
        sizes += ["--layers", str(layers), "--offload", args.offload]
        return [sys.executable, __file__, "--out", str(args.out), *sizes, *flags, "--one", side, model]

    def _add(self, row: dict[str, Any]) -> None:
        of = {"model": row["model"], "side": row["side"]}
        self.profiles += [of | kernel | self.record for kernel in row.pop("kernels")]
        self.rows.append(row | self.record)
        for name, found in (("step", self.rows), ("step_profile", self.profiles)):
            for prefix, experts in (("", False), ("moe_", True)):
                if rows := [r for r in found if (r["model"] in EXPERTS) == experts]:
                    path = self.args.out / f"{prefix}{name}.csv"
                    write_csv(path, [*rows, *kept(path, rows, KEYS[name])])
        parts = "" if row["forward_ms"] is None else f" = {row['forward_ms']:.1f} + {row['backward_ms']:.1f}"
        print(
            f"{row['model']:5} {row['tokens']:6} {row['side']:17} {row['step_ms']:9.1f} ms{parts}; captured "
            f"{row['captured_ms']}; first {row['first_step_s']} s; {row['tokens_per_s']:,} tokens/s; clip "
            f"{row['clip_ms']}, AdamW {row['optimizer_ms']}, both {row['update_ms']} ms; "
            f"{(row['peak_bytes'] or 0) / 2**30:.1f} GiB, with AdamW {(row['update_peak_bytes'] or 0) / 2**30:.1f}; "
            f"GEMMs {row['gemm']}; bits {row['bits']}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
