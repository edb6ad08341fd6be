"""A training step launched kernel by kernel, beside its replay from CUDA graphs. Writes step_graphs.csv.

    python bench/step_graphs.py --out bench/results/h100 [--models 0.6B 1.7B] [--tokens 1024 4096 16384] [--dry]

Forward, log-probabilities, backward into fp32 sums, as `bi-ops train` does without and with `--step-graphs`, both sides
in one process, a process a model. Sequences of 2,048 tokens, which fill their bucket, and lengths as an RL step has
them, which are padded. `host_ms` is until Python has launched everything, `step_ms` until the GPU is done: where they
are equal the GPU waits. `capture_ms` is of the step that is captured. `reserved_bytes` is what torch holds of the GPU
after the side, which for graphs includes their pool. `bits_equal`: value and every weight's gradient, of the two sides.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import provenance, write_csv
from step import clear, digest
from step_sides import SEED, SHAPES, Step, lengths_of, made_network, ours, shape, wait

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime


def timed(made: Step, launch: Callable[[], torch.Tensor], steps: int) -> dict[str, Any]:
    """Medians of steps behind the first two, one that runs as it is and one that is captured."""
    host, whole = [], []
    for i in range(steps + 2):
        start = wait()
        loss = launch()
        made.after()
        host.append(time.perf_counter() - start)
        whole.append(wait() - start)
        if i == steps + 1:
            bits = digest(made, loss)
        clear(made)
    reserved = None if runtime.INTERPRET else torch.cuda.memory_reserved()
    return {
        "host_ms": round(1e3 * statistics.median(host[2:]), 2),
        "step_ms": round(1e3 * statistics.median(whole[2:]), 2),
        "capture_ms": round(1e3 * whole[1], 1),
        "reserved_bytes": reserved,
        "bits": bits,
    }


def measure(model: str, args: argparse.Namespace) -> None:
    """Print a row of JSON for each size, length and side."""
    network = made_network(model, None, "selective")
    network.warmup()
    for tokens, seqlen in itertools.product(args.tokens, args.seqlens):
        torch.manual_seed(SEED)
        lengths = lengths_of(tokens, None if seqlen == "rl" else min(int(seqlen), tokens))
        rows = [torch.randint(shape(model)["vocab_size"], (n,)).to(network.device) for n in lengths]
        made = ours(model, rows, None, "selective", verify=False, graphs=True, network=network)

        def eager(made: Step = made) -> torch.Tensor:
            made.before()
            loss = made.forward()
            loss.backward()
            return loss.detach()

        assert made.whole is not None
        found = {}
        for side, launch in (("eager", eager), ("graphs", made.whole)):
            if not runtime.INTERPRET:
                gc.collect()
                torch.cuda.empty_cache()
            found[side] = timed(made, launch, args.steps)
        equal = found["eager"]["bits"] == found["graphs"]["bits"]
        for side, row in found.items():
            speed = {"speed": round(found["eager"]["step_ms"] / row["step_ms"], 3), "bits_equal": equal}
            sizes = {"model": model, "tokens": tokens, "seqlen": seqlen, "gemm": made.gemm, "side": side}
            print(json.dumps(sizes | row | speed), flush=True)
        del made, launch, eager  # and with them the graphs, and their memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that step_graphs.csv is written to")
    parser.add_argument("--models", nargs="+", choices=[m for m in SHAPES if m != "dry"], default=["0.6B", "1.7B"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="of a step; each is a row")
    parser.add_argument("--seqlens", nargs="+", default=["2048", "rl"], help="of each sequence; rl: as an RL step has")
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end it after so long; what is there is kept")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry:
        args.models, args.tokens, args.seqlens, args.steps = ["dry"], [48], ["16", "rl"], 1
    if args.one:
        measure(args.one, args)
        return 0
    rows: list[dict[str, Any]] = []
    record, end, failed = provenance(args.commit), time.monotonic() + args.seconds, False
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = ["--tokens", *map(str, args.tokens), "--seqlens", *args.seqlens, "--steps", str(args.steps)]
    for model in args.models:
        command = [sys.executable, __file__, "--out", str(args.out), *sizes, *(["--dry"] if args.dry else [])]
        with subprocess.Popen([*command, "--one", model], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line) | record)
                    write_csv(args.out / "step_graphs.csv", rows)
                    print({k: v for k, v in rows[-1].items() if k not in record}, flush=True)
                if time.monotonic() > end:
                    process.kill()
                    print(f"{model}: cut off, out of time", file=sys.stderr, flush=True)
        failed |= process.returncode != 0
    return 1 if failed or not all(row["bits_equal"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
