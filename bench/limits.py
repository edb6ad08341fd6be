"""Runs every operator of torch's operator database under the mode, forward and gradient. Writes limits.json.

    python bench/limits.py --out bench/results/h100 --jobs 15     # all of them, in bf16 and fp32: about four minutes
    python bench/limits.py --out bench/results/cpu --jobs 2       # in Triton's interpreter: about half an hour
    python bench/limits.py --only '^(sum|mean)$'                  # prints the verdicts and writes nothing

With --out and --only, the verdicts on other operators in the file stay, each with its commit.

An operator in a dtype is one pair. Its verdict:

    right      value and gradient are torch's, on every run the same bits, and a row alone is the row in a batch
    partly     some samples, or the gradient, are refused; the rest is right
    refused    the mode raises its error
    wrong      something else comes out, or a floating-point sum ran in torch's own kernel
    crash      another exception than the mode's, a dead process, a device-side assertion, or the time limit
    none       torch itself computes no sample here

How each is decided: `bench/opinfo.py`. Operators run in processes of their own kind, so that one that crashes takes no
other with it. What was interrupted writes what it has, and how many are left. Exit status 1 if a pair is wrong, crashed
or left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("ATEN_CPU_CAPABILITY", "default")  # before torch; see docs/limits.md, "Without a GPU"

from record import provenance

import bi_ops  # isort: skip  # noqa: F401  (before triton)
from opinfo import DTYPES, DeviceIsGone, Verdict, is_fatal, judge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from samples import operators

from bi_ops.core import runtime
from bi_ops.core.files import write_json

ORDER = ("right", "partly", "refused", "wrong", "crash", "none")
Pair = tuple[str, str]
LAST = {"last": True}  # what a process sends before it ends, lest it be given another pair


def work(pipe: Any, samples: int) -> None:
    """A process that judges the pairs that come through `pipe` until there are no more."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (pair := pipe.recv()) is not None:
            try:
                name, dtype = pair
                pipe.send(judge(name, dtype, samples).asdict())
            except DeviceIsGone as error:
                pipe.send(crashed(pair, str(error)) | LAST)
                break
            except Exception as error:
                pipe.send(crashed(pair, f"{type(error).__name__}: {error}") | (LAST if is_fatal(error) else {}))
                if is_fatal(error):
                    break
    pipe.close()
    os._exit(0)  # a CUDA context that is gone may not be torn down


def crashed(pair: Pair, message: str) -> dict[str, Any]:
    verdict = Verdict(*pair, verdict="crash", forward="crash")
    verdict.note("forward", "crash", message)
    return verdict.asdict()


class Worker:
    """One process, and the pair that it has."""

    def __init__(self, samples: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, samples), daemon=True)
        self.process.start()
        other.close()
        self.pair: Pair | None = None
        self.since = time.monotonic()

    def give(self, pair: Pair) -> None:
        self.pair, self.since = pair, time.monotonic()
        with contextlib.suppress(OSError):  # it is dead: `take` says so
            self.pipe.send(pair)

    def take(self) -> dict[str, Any] | None:
        """What it sent; None if it is dead."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def judged(pairs: list[Pair], jobs: int, samples: int, limit: float) -> Iterator[dict[str, Any]]:
    """The verdict on every pair, as they come."""
    left = collections.deque(pairs)
    workers = [Worker(samples) for _ in range(min(jobs, len(pairs)))]
    try:
        for worker in workers:
            worker.give(left.popleft())
        while busy := [w for w in workers if w.pair is not None]:
            ready = multiprocessing.connection.wait([w.pipe for w in busy], timeout=1.0)
            for worker in busy:
                took = time.monotonic() - worker.since
                assert worker.pair is not None
                if worker.pipe in ready:
                    verdict = worker.take()
                    dead = verdict is None or bool(verdict.pop("last", False))
                    if verdict is None:
                        verdict = crashed(worker.pair, f"the process died ({worker.process.exitcode})")
                elif took > limit:
                    verdict, dead = crashed(worker.pair, f"took more than {limit:.0f} s"), True
                else:
                    continue
                yield verdict | {"seconds": round(took, 2)}
                if dead:
                    worker.end()
                    workers[workers.index(worker)] = worker = Worker(samples)
                worker.pair = None
                if left:
                    worker.give(left.popleft())
    finally:
        for worker in workers:
            worker.end()


def kept(file: Path) -> list[dict[str, Any]]:
    """The verdicts in `file`, each with the commit that it is of."""
    if not file.exists():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    return [{"commit": record["commit"]} | pair for pair in record["pairs"]]


def until_interrupted(verdicts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The verdicts up to Ctrl-C or a SIGTERM, also in the background, where a shell has SIGINT ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield from verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that limits.json is written to; default: print alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=6, help="of an operator, at most (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a pair may take (default: %(default)s)")
    parser.add_argument("--only", default="", help="a regular expression of operators' names; others in the file stay")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    kind = runtime.device_type()
    every = [
        (name, dtype) for name, op in operators().items() for dtype in DTYPES if op.supports_dtype(DTYPES[dtype], kind)
    ]
    pairs = [(name, dtype) for name, dtype in every if dtype in args.dtypes and re.search(args.only, name)]
    if not pairs:
        parser.error(f"no operator's name matches --only {args.only!r}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("operators", total=len(pairs))
        for verdict in until_interrupted(judged(pairs, args.jobs, args.samples, args.limit)):
            found.append(verdict)
            progress.advance(bar)
            if args.only or verdict["verdict"] in ("wrong", "crash"):
                print(verdict["verdict"], verdict["op"], verdict["dtype"], f"{verdict['seconds']:.1f} s", flush=True)
                for reason in verdict["reasons"]:
                    print(f"    {reason['where']} {reason['kind']}: {reason['message'][:200]}", flush=True)
            elif not console.is_terminal and len(found) % 100 == 0:
                print(f"{len(found)} of {len(pairs)}", file=sys.stderr, flush=True)
    origin = provenance(args.commit)
    if args.out:
        file = args.out / "limits.json"
        judged_now = {(v["op"], v["dtype"]) for v in found}
        found = [v | {"commit": origin["commit"]} for v in found]
        found += [v for v in kept(file) if (pair := (v["op"], v["dtype"])) in every and pair not in judged_now]
    counts = {kind: sum(v["verdict"] == kind for v in found) for kind in ORDER}
    left = (len(every) if args.out else len(pairs)) - len(found)
    print(", ".join(f"{n} {kind}" for kind, n in (counts | {"left": left}).items()))
    if args.out:
        found.sort(key=lambda v: (v["op"], v["dtype"]))
        write_json(file, {**origin, "counts": counts, "left": left, "pairs": found})
    return 1 if counts["wrong"] or counts["crash"] or left else 0


if __name__ == "__main__":
    sys.exit(main())
