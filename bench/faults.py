"""Training killed with SIGKILL at random moments and resumed, against a run that nothing disturbed. Writes faults.json.

    python bench/faults.py --out bench/results/cpu [--kills 60] [--preset demo] [--steps 4] [--minutes 10]
    python bench/faults.py --out bench/results/h200 --preset h100 --eager --kills 24 --minutes 2.5

A run is killed up to three times, each at a moment drawn uniformly from the length of an undisturbed run, and resumed;
then it goes on to its end, whose weights must be the same bytes. A kill counts when its run has come to its end. A
killed process is a fork of this one, so that it need not import torch again. Every visible GPU has a run of its own, at
the same time. What a kill interrupted is read off the folder: the start, a file being written, or a step. faults.json
is written while runs go on. Exit status 1 if a run ends in other bytes, or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from record import provenance

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.rl import PRESETS, TrainConfig, run
from bi_ops.rl.runner import CONFIG, METRICS, SUMMARY

KILLS_OF_A_RUN = 3
SMALL: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2, "save_every": 1}

Value = TypeVar("Value")
#: What yields while it waits for a process, and returns in the end.
Waiting = Generator[None, None, Value]


@dataclass
class Faults:
    """seconds: of the shortest whole run, over which moments are drawn. kills: how many of each kind, of runs that came
    to their end. changed_of: those whose run ended with other weights. runs: that came to their end. changed: of these,
    with other weights. failed: what a resumed run raised. anew: runs killed before they had written their settings,
    which started again."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    changed_of: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    changed: int = 0
    anew: int = 0
    failed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        cycles = [{"kind": k, "cycles": n, "changed": self.changed_of[k]} for k, n in sorted(self.kills.items())]
        rest = {"runs": self.runs, "changed": self.changed, "anew": self.anew, "failed": self.failed}
        return {"kills": sum(self.kills.values()), **rest, "kinds": cycles}


# --------------------------------------------------------------------------------------------------------------
# processes


def together(waiting: Iterable[Waiting[Any]]) -> list[Any]:
    """What these return, each going on while the others wait."""
    going = dict(enumerate(waiting))
    found: dict[int, Any] = {}
    while going:
        for i, one in list(going.items()):
            try:
                next(one)
            except StopIteration as end:
                found[i] = end.value
                del going[i]
        time.sleep(0.002)
    return [found[i] for i in sorted(found)]


def forked(work: Callable[[], object], errors: Path, seconds: float | None = None) -> Waiting[int | None]:
    """Do `work` in a fork of this process; killed after so many seconds, if they are given.

    Returns:
        its exit status, and its traceback in `errors`; None if it was killed.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            with open(errors.with_suffix(".log"), "w") as log:  # engines say much
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                work()
            os._exit(0)
        except BaseException:
            errors.write_text(traceback.format_exc())
            os._exit(1)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        yield


def live(config: TrainConfig, folder: Path, seconds: float | None = None, gpu: str = "") -> Waiting[int | None]:
    """Train in a process of its own, from where the folder stands, as `forked`."""

    def train() -> None:
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        run(config, folder, resume=(folder / CONFIG).exists())

    return (yield from forked(train, folder.parent / f"{folder.name}.error", seconds))


# --------------------------------------------------------------------------------------------------------------
# runs


def interrupted(folder: Path) -> str:
    """What a kill interrupted."""
    if any(".partial" in p.name or p.name.startswith(".") for p in folder.rglob("*")):
        return "a file being written"
    return "a step" if (folder / METRICS).exists() and (folder / METRICS).stat().st_size else "the start"


def weights(folder: Path) -> str:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["weights_sha256"]


def one_run(
    config: TrainConfig,
    folder: Path,
    expected: str,
    rng: random.Random,
    found: Faults,
    gpu: str = "",
    until: float = float("inf"),
) -> Waiting[None]:
    """Kill, resume, and compare. until: of `time.monotonic`; nothing is killed after it."""
    kinds: Counter[str] = Counter()
    for life in range(KILLS_OF_A_RUN + 1):
        start = time.monotonic()
        kill = life < KILLS_OF_A_RUN and start < until
        status = yield from live(config, folder, rng.uniform(0, found.seconds) if kill else None, gpu)
        if status is None:
            kinds[interrupted(folder) if folder.exists() else "the start"] += 1
            if not (folder / CONFIG).exists():
                shutil.rmtree(folder, ignore_errors=True)
                found.anew += 1
            continue
        found.runs += 1
        found.kills += kinds
        if life == 0 and status == 0:
            found.seconds = min(found.seconds, time.monotonic() - start)
        if status != 0:
            found.failed.append((folder.parent / f"{folder.name}.error").read_text()[-500:])
        elif weights(folder) != expected:
            found.changed += 1
            found.changed_of += kinds
        return


def undisturbed(config: TrainConfig, root: Path, gpus: list[str]) -> tuple[str, float]:
    """(the weights, the length in seconds) of whole runs, one on each GPU, at least two, whose weights are the same."""
    folders = [root / f"undisturbed{i}" for i in range(max(len(gpus), 2))]
    length = 0.0
    for first in range(0, len(folders), len(gpus)):  # the first ones compile, or fill caches
        some, start = folders[first : first + len(gpus)], time.monotonic()
        ended = together(live(config, folder, None, gpu) for folder, gpu in zip(some, gpus, strict=False))
        for folder, status in zip(some, ended, strict=True):
            if status != 0:
                raise SystemExit((root / f"{folder.name}.error").read_text())
        length = time.monotonic() - start
    found = {weights(folder) for folder in folders}
    if len(found) != 1:
        raise SystemExit("undisturbed runs end in other bytes: there is nothing to compare with")
    return found.pop(), length


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; without a GPU, one place. Makes no CUDA context, which no fork could use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if runtime.INTERPRET:
        return [""]
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that faults.json is written to")
    parser.add_argument("--kills", type=int, default=60, help="at least so many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="nothing is killed after so many (%(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--engine", choices=("embedded", "vllm"), help="the preset's by default")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: the same bits, started sooner")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    preset, small = PRESETS[args.preset], {**SMALL} if args.preset == "demo" else {"save_every": 1}
    small |= {"cuda_graphs": False} if args.eager else {}
    config = dataclasses.replace(preset, steps=args.steps, engine=args.engine or preset.engine, **small)
    rng, until, gpus = random.Random(args.seed), time.monotonic() + 60 * args.minutes, visible_gpus()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        here = root / "where.json"
        together([forked(lambda: write_json(here, provenance(args.commit)), root / "where.error")])
        where = json.loads(here.read_text(encoding="utf-8"))
        expected, length = undisturbed(config, root, gpus)
        print(f"{len(gpus)} at a time, {length:.1f} s undisturbed", flush=True)
        found, number = Faults(length), [0]
        where |= {"engine": config.engine, "steps": args.steps, "seconds_of_a_run": round(length, 2)}

        def runs_on(gpu: str) -> Waiting[None]:
            while sum(found.kills.values()) < args.kills and time.monotonic() < until:
                number[0] += 1
                of_run = root / f"run{number[0]}"
                yield from one_run(config, of_run, expected, rng, found, gpu, until)
                shutil.rmtree(of_run, ignore_errors=True)
                where["seconds_of_a_run"] = round(found.seconds, 2)
                write_json(args.out / "faults.json", {**where, **found.as_dict()})
                print(found.as_dict(), flush=True)

        together(map(runs_on, gpus))
    return 1 if found.changed or found.failed or not found.runs else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
