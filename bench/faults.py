"""Training killed with SIGKILL at random moments and resumed, against a run that nothing disturbed. Writes faults.json.

    python bench/faults.py --out bench/results/cpu [--kills 60] [--preset demo] [--steps 4] [--minutes 10]

A run is killed up to three times, each at a moment drawn uniformly from the length of an undisturbed run, and resumed;
then it goes on to its end, whose weights must be the same bytes. A killed process is a fork of this one, so that it
need not import torch again. What a kill interrupted is read off the folder: the start, a file being written, or a step.
faults.json is written while runs go on. Exit status 1 if a run ends in other bytes, or fails.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import provenance

import bi_ops  # noqa: F401  # isort: skip  (before triton)
from bi_ops.core.files import write_json
from bi_ops.rl import PRESETS, TrainConfig, run
from bi_ops.rl.runner import CONFIG, METRICS, SUMMARY

KILLS_OF_A_RUN = 3
SMALL: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2, "save_every": 1}


@dataclass
class Faults:
    """seconds: of the shortest whole run, over which moments are drawn. kills: how many of each kind. runs: that came
    to their end. changed: of these, with other weights. failed: what a resumed run raised. anew: runs killed before
    they had written their settings, which started again."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    changed: int = 0
    anew: int = 0
    failed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        cycles = [{"kind": k, "cycles": n, "changed": self.changed} for k, n in sorted(self.kills.items())]
        rest = {"runs": self.runs, "changed": self.changed, "anew": self.anew, "failed": self.failed}
        return {"kills": sum(self.kills.values()), **rest, "kinds": cycles}


def live(config: TrainConfig, folder: Path, seconds: float | None) -> int | None:
    """Train in a process of its own, from where the folder stands; killed after so many seconds, if they are given.

    Returns:
        its exit status; None if it was killed.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            run(config, folder, resume=(folder / CONFIG).exists())
            os._exit(0)
        except BaseException:
            (folder.parent / f"{folder.name}.error").write_text(traceback.format_exc())
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
        time.sleep(0.002)


def interrupted(folder: Path) -> str:
    """What a kill interrupted."""
    if any(".partial" in p.name or p.name.startswith(".") for p in folder.rglob("*")):
        return "a file being written"
    return "a step" if (folder / METRICS).exists() and (folder / METRICS).stat().st_size else "the start"


def weights(folder: Path) -> str:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["weights_sha256"]


def one_run(config: TrainConfig, folder: Path, expected: str, rng: random.Random, found: Faults) -> None:
    """Kill, resume, and compare."""
    for life in range(KILLS_OF_A_RUN + 1):
        start = time.monotonic()
        status = live(config, folder, rng.uniform(0, found.seconds) if life < KILLS_OF_A_RUN else None)
        if status is None:
            found.kills[interrupted(folder) if folder.exists() else "the start"] += 1
            if not (folder / CONFIG).exists():
                shutil.rmtree(folder, ignore_errors=True)
                found.anew += 1
            continue
        found.runs += 1
        if life == 0 and status == 0:
            found.seconds = min(found.seconds, time.monotonic() - start)
        if status != 0:
            found.failed.append((folder.parent / f"{folder.name}.error").read_text()[-500:])
        elif weights(folder) != expected:
            found.changed += 1
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that faults.json is written to")
    parser.add_argument("--kills", type=int, default=60, help="at least so many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="no new run after so many (default: %(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--engine", choices=("embedded", "vllm"), help="the preset's by default")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    preset, small = PRESETS[args.preset], SMALL if args.preset == "demo" else {"save_every": 1}
    config = dataclasses.replace(preset, steps=args.steps, engine=args.engine or preset.engine, **small)
    rng, begun = random.Random(args.seed), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for name in ("first", "undisturbed"):  # the first one compiles, or fills caches
            start = time.monotonic()
            if live(config, Path(root) / name, None) != 0:
                raise SystemExit((Path(root) / f"{name}.error").read_text())
            length = time.monotonic() - start
        expected, found = weights(Path(root) / "undisturbed"), Faults(length)
        if weights(Path(root) / "first") != expected:
            raise SystemExit("two undisturbed runs end in other bytes: there is nothing to compare with")
        where = provenance(args.commit) if args.preset == "demo" else {"commit": args.commit}  # no CUDA before a fork
        where |= {"engine": config.engine, "steps": args.steps, "seconds_of_a_run": round(length, 2)}
        while sum(found.kills.values()) < args.kills and time.monotonic() - begun < 60 * args.minutes:
            folder = Path(root) / f"run{found.runs}"
            one_run(config, folder, expected, rng, found)
            shutil.rmtree(folder, ignore_errors=True)
            write_json(args.out / "faults.json", {**where, **found.as_dict()})
            print(found.as_dict(), flush=True)
    return 1 if found.changed or found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
