"""Training killed with SIGKILL at random moments and resumed, against a run that nothing disturbed. Writes faults.json.

    python bench/faults.py --out bench/results/cpu [--kills 60] [--aimed 20] [--preset demo] [--steps 4] [--minutes 10]
    python bench/faults.py --out bench/results/h200 --preset h100 --eager --kills 20 --of-a-run 10 --preload vllm

A run is killed up to three times (`--of-a-run`), each at a moment drawn uniformly from the length of an undisturbed
run, and resumed; then it goes on to its end, whose weights must be the same bytes. A kill counts when its run has come
to its end. A killed process is a fork of this one, so that it need not import torch again. Without a GPU, lengths and
moments are in processor time, so that other work on the machine moves none. Every visible GPU has a run of its own, or
several (`--per-gpu`), at the same time. A process says what it is doing in a page that it shares with this one: that is
the kind of a kill.

Some phases are short: `--aimed` more kills go to each of the start, a checkpoint's writing and that of the final
weights, at moments drawn uniformly from the length of that phase. After each kill every file that has its name must be
whole. As a negative control, one bit of a killed run's checkpoint is flipped, and the weights in the end must be other
ones.

faults.json is written while runs go on. Exit status 1 if a run ends in other bytes or fails, a file is half there, or
the control is not noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from killed import Moment, Phases, Waiting, Watch, forked, together
from record import provenance, take_shortcuts

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch
from safetensors.torch import load_file, save_file

from bi_ops.core import runtime
from bi_ops.core.files import sha256_of_parts, write_json
from bi_ops.rl import PRESETS, TrainConfig, checkpoint, run, runner
from bi_ops.rl.runner import CHECKPOINTS, CONFIG, SUMMARY
from bi_ops.rl.trainer import Trainer

SMALL: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2, "save_every": 1}

#: Each lasts until another one begins.
PHASES: Phases = {
    "while the engine starts": None,
    "while sampling": (Trainer, "generate"),
    "while learning": (Trainer, "backward"),
    "while a checkpoint is written": (checkpoint, "save"),
    "while the final weights are written": (runner, "finish"),
}
#: Those that a uniform moment seldom hits.
SHORT = ("while the engine starts", "while a checkpoint is written", "while the final weights are written")


@dataclass
class Faults:
    """seconds: of the shortest whole run, over which moments are drawn. kills: how many of each kind, of runs that came
    to their end; aimed: of these, at one phase. changed_of: those whose run ended with other weights. after_step: kills
    by the last checkpoint there was. runs: that came to their end. changed: of these, with other weights. failed: what
    a resumed run raised. half_files: that had their name after a kill. anew: runs killed before they had written their
    settings, which started again. control_changed: a flipped bit led to other weights."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    aimed: Counter[str] = field(default_factory=Counter)
    changed_of: Counter[str] = field(default_factory=Counter)
    after_step: Counter[int] = field(default_factory=Counter)
    runs: int = 0
    changed: int = 0
    anew: int = 0
    failed: list[str] = field(default_factory=list)
    half_files: list[str] = field(default_factory=list)
    control_changed: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        names = [name for name in PHASES if self.kills[name]]
        kinds = [
            {"kind": n, "cycles": self.kills[n], "aimed": self.aimed[n], "changed": self.changed_of[n]} for n in names
        ]
        rest = {"runs": self.runs, "changed": self.changed, "anew": self.anew, "failed": self.failed}
        rest |= {"half_files": self.half_files, "control_changed": self.control_changed}
        after = {str(step): n for step, n in sorted(self.after_step.items())}
        return {"kills": self.kills.total(), "aimed": self.aimed.total(), **rest, "after_step": after, "kinds": kinds}

    def wrong(self) -> bool:
        return bool(self.changed or self.failed or self.half_files or not self.runs or not self.control_changed)


def live(
    config: TrainConfig, folder: Path, moment: Moment | None = None, gpu: str = "", watch: Watch | None = None
) -> Waiting[int | None]:
    """Train in a process of its own, from where the folder stands, as `forked`."""

    def train() -> None:
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        run(config, folder, resume=(folder / CONFIG).exists())

    return (yield from forked(train, folder.parent / f"{folder.name}.error", moment, watch))


# --------------------------------------------------------------------------------------------------------------
# runs


def weights(folder: Path) -> str:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["weights_sha256"]


def last_step(folder: Path) -> int:
    """Of the latest checkpoint; 0: there is none."""
    latest = checkpoint.latest(folder / CHECKPOINTS)
    return 0 if latest is None else int(latest.name.rpartition("_")[2])


def half_files(folder: Path) -> list[str]:
    """Files that have their name and cannot be read whole."""
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # it has no name yet
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:  # whatever a reader says of it
            found.append(f"{path.name}: {error}")
    return found


def uniform(found: Faults, rng: random.Random) -> Callable[[], Moment]:
    return lambda: Moment(rng.uniform(0, found.seconds))


def aimed(phase: str, length: float, rng: random.Random) -> Callable[[], Moment]:
    return lambda: Moment(rng.uniform(0, length), phase)


def one_run(
    config: TrainConfig,
    folder: Path,
    expected: str,
    draw: Callable[[], Moment],
    found: Faults,
    gpu: str = "",
    until: float = float("inf"),
    meddle: Callable[[Path], object] = lambda folder: None,
    most: int = 3,
) -> Waiting[None]:
    """Kill, at most so often, resume, and compare. draw: the next moment. until: of `time.monotonic`; nothing is killed
    after it. meddle: is called with the folder after each kill."""
    kinds, at_phase, after_step = Counter[str](), Counter[str](), Counter[int]()
    for life in range(most + 1):
        watch, moment = Watch(PHASES), draw() if life < most and time.monotonic() < until else None
        status = yield from live(config, folder, moment, gpu, watch)
        if status is None:
            assert moment is not None
            kinds[watch.phase()] += 1
            at_phase[watch.phase()] += moment.phase is not None
            after_step[last_step(folder)] += 1
            found.half_files += half_files(folder)
            meddle(folder)
            if not (folder / CONFIG).exists():
                shutil.rmtree(folder, ignore_errors=True)
                found.anew += 1
            continue
        found.runs += 1
        found.kills += kinds
        found.aimed += at_phase
        found.after_step += after_step
        if life == 0 and status == 0:
            found.seconds = min(found.seconds, watch.age)
        if status != 0:
            found.failed.append((folder.parent / f"{folder.name}.error").read_text()[-500:])
        elif weights(folder) != expected:
            found.changed += 1
            found.changed_of += kinds
        return


def flip_a_bit(folder: Path) -> None:
    """The last one of a weight in the latest checkpoint, where there is one, as if it had been written so."""
    latest = checkpoint.latest(folder / CHECKPOINTS)
    if latest is not None:
        file, described = latest / "model.safetensors", latest / "state.json"
        tensors, state = load_file(file), json.loads(described.read_text(encoding="utf-8"))
        next(iter(tensors.values())).view(torch.int32).view(-1)[-1:] ^= 1
        save_file(tensors, file)
        state["sha256"][file.name] = sha256_of_parts(file)
        write_json(described, state)


def control(config: TrainConfig, folder: Path, expected: str, gpu: str = "") -> Waiting[bool]:
    """Whether a run ends with other weights, one bit of whose checkpoint was flipped."""
    seen = Faults(0.0)
    final = Moment(0.0, SHORT[-1])  # the last checkpoint is there by then
    yield from one_run(config, folder, expected, lambda: final, seen, gpu, meddle=flip_a_bit, most=1)
    return bool(seen.changed and not seen.failed)


def undisturbed(config: TrainConfig, root: Path, gpus: list[str]) -> tuple[str, float, Watch]:
    """(the weights, the length in seconds, what was seen of the last) of whole runs, one on each GPU, at least two,
    whose weights are the same."""
    folders = [root / f"undisturbed{i}" for i in range(max(len(gpus), 2))]
    watches = [Watch(PHASES) for _ in folders]
    for first in range(0, len(folders), len(gpus)):  # the first ones compile, or fill caches
        some = range(first, min(first + len(gpus), len(folders)))
        ended = together(live(config, folders[i], None, gpus[i - first], watches[i]) for i in some)
        for i, status in zip(some, ended, strict=True):
            if status != 0:
                raise SystemExit((root / f"{folders[i].name}.error").read_text())
    found = {weights(folder) for folder in folders}
    if len(found) != 1:
        raise SystemExit("undisturbed runs end in other bytes: there is nothing to compare with")
    return found.pop(), watches[-1].age, watches[-1]


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; without a GPU, one place. Makes no CUDA context, which no fork could use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if runtime.INTERPRET:
        return [""]
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that faults.json is written to")
    parser.add_argument("--kills", type=int, default=60, help="at least so many, uniform (default: %(default)s)")
    parser.add_argument("--aimed", type=int, default=0, help="at least so many more at each short phase (%(default)s)")
    parser.add_argument("--of-a-run", type=int, default=3, help="a run is killed at most so often (%(default)s)")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on a GPU (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="nothing is killed after so many (%(default)s)")
    preload = ["torch._dynamo", "torch.utils.tensorboard"] if runtime.INTERPRET else []
    parser.add_argument("--preload", nargs="+", metavar="MODULE", default=preload, help="or each fork imports them")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--engine", choices=("embedded", "vllm"), help="the preset's by default")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: the same bits, started sooner")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="vLLM's, where other processes use the GPU too")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    take_shortcuts()
    for name in args.preload:
        importlib.import_module(name)
    preset, small = PRESETS[args.preset], {**SMALL} if args.preset == "demo" else {"save_every": 1}
    small |= {"cuda_graphs": not args.eager}
    if args.kv_cache_memory_bytes:
        small |= {"kv_cache_memory_bytes": args.kv_cache_memory_bytes, "gpu_memory_utilization": 0.05}
    config = dataclasses.replace(preset, steps=args.steps, engine=args.engine or preset.engine, **small)
    rng, until, gpus = random.Random(args.seed), time.monotonic() + 60 * args.minutes, visible_gpus() * args.per_gpu
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        here = root / "where.json"
        together([forked(lambda: write_json(here, provenance(args.commit)), root / "where.error")])
        where = json.loads(here.read_text(encoding="utf-8"))
        expected, length, watch = undisturbed(config, root, gpus)
        print(f"{len(gpus)} at a time, {length:.1f} s undisturbed", flush=True)
        found, number = Faults(length), [0]
        where |= {"engine": config.engine, "steps": args.steps, "weights_sha256": expected}

        def controlled() -> Waiting[None]:
            found.control_changed = yield from control(config, root / "control", expected, gpus[0])

        def record() -> None:
            lengths = {name: round(watch.length(name), 4) for name in SHORT}
            of_a_run = {"seconds_of_a_run": round(found.seconds, 2), "seconds_of": lengths}
            write_json(args.out / "faults.json", {**where, **of_a_run, **found.as_dict()})
            print(found.as_dict(), flush=True)

        def runs_on(gpu: str, draw: Callable[[], Moment], wanted: Callable[[], int]) -> Waiting[None]:
            while wanted() > 0 and time.monotonic() < until:
                number[0] += 1
                of_run = root / f"run{number[0]}"
                yield from one_run(config, of_run, expected, draw, found, gpu, until, most=args.of_a_run)
                shutil.rmtree(of_run, ignore_errors=True)
                record()

        for phase in SHORT:
            draw = aimed(phase, watch.length(phase), rng)
            together(runs_on(gpu, draw, lambda: args.aimed - found.aimed[phase]) for gpu in gpus)  # noqa: B023
        left = lambda: args.kills + found.aimed.total() - found.kills.total()  # noqa: E731
        together([controlled(), *(runs_on(gpu, uniform(found, rng), left) for gpu in gpus)])
        record()
    return int(found.wrong())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
