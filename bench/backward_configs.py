"""Which config of attention's backward in one pass is fastest? Writes backward_exploration.csv.

    python bench/backward_configs.py --out bench/results/h200 [--head-dims 64 128] [--seqlens 4096 ...] [--seconds 70]

Kernels are compiled in parallel first, for equal and packed sequences. All of a case are timed in turns in this
process, the kernel and what prepares it, beside FlashAttention 4's default backward where it is installed; before,
each must give the gradients of the config in use, RERUNS times. Cases and counting are those of bench/attention.py.
`--dry` runs the lines of this without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from attention import GROUP, TOKENS, WIDTH, Case, cu, equal, inputs, rl_lengths, seconds
from flash_attention_4 import fa4
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops.attention import config, launch
from bi_ops.attention.config import BackwardConfig
from bi_ops.attention.hopper import backward
from bi_ops.attention.order import KeySteps, OnePass, Problem, order
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.arch import SM_90
from bi_ops.core.compile_ahead import compile_only
from bi_ops.core.integers import cdiv

Run = Callable[[], object]
SWIZZLES, TAILS = (4, 5, 6, 8, 16), (1 << 24, 1 << 25, 1 << 26)
#: How often each config's bits are compared.
RERUNS = 10


def others(one: BackwardConfig) -> list[BackwardConfig]:
    """Swizzles and tails beside those of the config in use."""
    placed = [replace(one, swizzle=s) for s in SWIZZLES] + [replace(one, tail_bytes=n) for n in TAILS]
    return [c for c in dict.fromkeys(placed) if c != one]


def in_use(case: Case, num_sms: int) -> BackwardConfig:
    return config.one_pass(cdiv(max(case.lengths), 128), case.head_dim, num_sms)


class Bench:
    """A case's tensors, from a forward."""

    def __init__(self, case: Case) -> None:
        self.case, device = case, runtime.default_device()
        self.q, self.k, self.v, self.g = inputs(case)
        starts = cu(case.lengths)
        self.seqlens = Seqlens(starts, starts, max(case.lengths), max(case.lengths))
        self.params = AttentionParams(True, case.head_dim**-0.5)
        self.arch = SM_90 if runtime.INTERPRET else arches.of(self.q.device)
        found = order(Problem(case.head_dim, self.q.dtype), self.arch)
        assert isinstance(found.backward, OnePass)
        assert isinstance(found.forward, KeySteps)
        self.order = found.backward
        if runtime.INTERPRET:
            self.out, self.lse = torch.zeros_like(self.q), torch.zeros(case.heads, len(self.q), device=device)
        else:
            self.out, self.lse = launch.forward(
                *(self.q, self.k, self.v, self.seqlens, self.params, None, found.forward, self.arch)
            )[:2]

    def run(self, chosen: BackwardConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = (self.g, self.q, self.k, self.v, self.out, self.lse, None, self.seqlens, self.params, self.order)
        return launch.launch_one_pass(*given, chosen)


def compile_all(head_dims: list[int], num_sms: int) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    with compile_only(16):
        for d, lengths in itertools.product(head_dims, ((256, 256), (256, 130))):
            bench = Bench(Case("bwd", lengths, d, WIDTH // d, WIDTH // d // GROUP))
            bench.run(in_use(bench.case, num_sms))
    return time.perf_counter() - start


def in_turns(runs: dict[str, Run], rounds: int = 3) -> dict[str, float]:
    """Median seconds of each, there and back: what runs second finds the GPU warmer."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in list(runs.items())[:: -1 if i % 2 else 1]:
            taken[name].append(seconds(run, budget=0.006, rounds=1))
    return {name: statistics.median(ts) for name, ts in taken.items()}


def text(c: BackwardConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(c).items())


def rival(case: Case, bench: Bench) -> float | None:
    """Seconds of FlashAttention 4's default backward, if it is there."""
    try:
        return in_turns({"fa4": fa4(case, False, bench.q, bench.k, bench.v, bench.g)})["fa4"]
    except (ImportError, RuntimeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that backward_exploration.csv is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--seconds", type=float, default=70, help="start no case after as many")
    parser.add_argument("--dry", action="store_true", help="no GPU: nothing is launched, figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began = time.perf_counter()
    num_sms = 132 if args.dry else runtime.multiprocessors(torch.device("cuda"))
    if args.dry:
        args.seqlens = [64, 128]
        backward.launch = lambda g, q, k, v, *rest: (q, k, v)  # type: ignore[assignment]
    tokens = 256 if args.dry else TOKENS
    about = row_provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"compiled in {compile_all(args.head_dims, num_sms):.0f} s", flush=True)
    # Longest first: there it is behind.
    lengths = [(s,) * max(tokens // s, 1) for s in sorted(args.seqlens, reverse=True)] + [rl_lengths(tokens)]
    rows: list[dict[str, object]] = []
    failed = 0
    for d, of_one in [(d, n) for n in lengths for d in args.head_dims]:
        if time.perf_counter() - began > args.seconds:
            print("out of time; the rest is left out")
            break
        case = Case("bwd", of_one, d, WIDTH // d, WIDTH // d // GROUP)
        bench, one = Bench(case), in_use(case, num_sms)
        expected = bench.run(one)
        chosen = [one, *others(one)]
        # Bits first: a config that hangs is the last one that was named.
        same = {}
        for c in chosen:
            print(f"{case}: {text(c)}", end="", flush=True)
            same[c] = all(equal(bench.run(c), expected) for _ in range(RERUNS))
            print("" if same[c] else " OTHER BITS", flush=True)
        times = in_turns({text(c): partial(bench.run, c) for c in chosen})
        other = rival(case, bench)
        for c in chosen:
            same[c] = same[c] and equal(bench.run(c), expected)
            failed += not same[c]
            time_s = times[text(c)]
            rows.append(
                {"seqlen": max(of_one), "batch": len(of_one), "packed": case.packed, "head_dim": d}
                | {"config": text(c), "in_use": c == one, "tflops": round(case.flops / time_s / 1e12, 1)}
                | {"over_in_use": round(times[text(one)] / time_s, 4)}
                | {"fa4_tflops": other and round(case.flops / other / 1e12, 1)}
                | {"same_bits": same[c]}
                | about
            )
        mine = rows[-len(chosen) :]
        print(f"{case}: in use {mine[0]['tflops']} TFLOP/s, FlashAttention 4 {mine[0]['fa4_tflops']}")
        for row in sorted(mine, key=lambda r: str(r["over_in_use"]), reverse=True)[:4]:
            wrong = "" if row["same_bits"] else "OTHER BITS "
            print(f"    {row['over_in_use']:.4f} {row['tflops']:6} {wrong}{row['config']}", flush=True)
        write_csv(args.out / "backward_exploration.csv", rows)
        del bench, expected
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
