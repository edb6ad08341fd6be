"""Does training on vLLM's samples learn, agree bit for bit, and repeat itself? Writes train.json.

    python bench/train.py --out bench/results/h100 [--steps 30] [--runs 2] [--kill-after 12]
    python bench/train.py --out bench/results/h200 --preset h100-moe       with experts: moe_train.json

Runs `bi-ops train --preset h100` several times with one seed, each in a process of its own, at the same time where
there are several GPUs. The last one is killed (SIGKILL) once it has made some steps, and resumed. Exit status 0 only if
every step of every run had 0 tokens different, the reward at least doubled, and all final weights are the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import provenance

from bi_ops.core.files import write_json
from bi_ops.rl import PRESETS

#: Steps between checkpoints: a run that is killed goes on from the last.
SAVE_EVERY = 5


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has written of each step so far."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return []


def train(options: list[str], folder: Path, gpu: int, kill_after: int | None) -> dict[str, Any]:
    """A run's summary and metrics. kill_after: steps after which it is killed, and resumed.

    Raises:
        RuntimeError: it failed, or ended before it was killed.
    """
    command = [sys.executable, "-m", "bi_ops.cli", "train", *options, "--output", str(folder)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.device_count() > 1 else {})
    killed: dict[str, Any] = {}
    if kill_after is not None:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and len(steps_of(folder)) < kill_after:
            time.sleep(0.01)
        if process.poll() is not None:
            raise RuntimeError(f"the run to be killed after {kill_after} steps ended with {process.returncode}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed, command = {"killed_after": len(steps_of(folder))}, [*command, "--resume"]
    if status := subprocess.run(command, env=environment).returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return json.loads((folder / "summary.json").read_text()) | killed | {"metrics": steps_of(folder)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that train.json is written to")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h100")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--kill-after", type=int, default=12, help="steps of the last run; 0: not (%(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", help="vLLM's, where other processes use the GPU too")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()

    options = ["--preset", args.preset, "--steps", str(args.steps), "--save-every", str(SAVE_EVERY)]
    if args.kv_cache_memory_bytes:
        options += ["--kv-cache-memory-bytes", args.kv_cache_memory_bytes, "--gpu-memory-utilization", "0.1"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max(torch.cuda.device_count(), 1)) as pool:
        folders = [Path(scratch) / str(i) for i in range(args.runs)]
        kills = [None] * (args.runs - 1) + [args.kill_after or None]
        gpus = [i % max(torch.cuda.device_count(), 1) for i in range(args.runs)]
        runs = list(pool.map(train, [options] * args.runs, folders, gpus, kills))
        config = json.loads((folders[0] / "config.json").read_text())

    record = {
        "preset": args.preset,
        "weights_byte_equal": len({r["weights_sha256"] for r in runs}) == 1,
        **provenance(args.commit),
        "config": config,
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    prefix = "moe_" if "num_experts" in PRESETS[args.preset].architecture else ""
    write_json(args.out / f"{prefix}train.json", record)
    held = {
        "0 tokens different": all(r["tokens_different"] == 0 for r in runs),
        "reward doubled": all(r["reward_last"] >= 2 * r["reward_first"] for r in runs),
        "weights byte-equal": record["weights_byte_equal"],
    }
    for r in runs:
        print(f"reward {r['reward_first']:.3f} -> {r['reward_last']:.3f}, {r['tokens_checked']} tokens checked")
        if "killed_after" in r:
            print(f"  killed after {r['killed_after']} steps, and resumed")
    for claim, ok in held.items():
        print(f"{claim}: {'yes' if ok else 'NO'}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
