"""Which config of attention's forward is fastest where sequences end within a step? Writes forward_exploration.csv.

    python bench/forward_configs.py --out bench/results/h200 [--head-dims 64 128 256] [--seconds 40]

Causal: a packed batch, equal sequences that are no multiple of a step, and 2k, where all steps are full. Configs are
compiled in parallel first and timed in turns, beside vLLM's FlashAttention 3 where that is installed; each must give
the bits of the config in use. Cases and counting are those of bench/attention.py. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from attention import GROUP, TOKENS, WIDTH, Case, cu, equal, fa3, inputs, rl_lengths, tried
from backward_configs import in_turns
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops.attention import config, launch
from bi_ops.attention.config import ForwardConfig
from bi_ops.attention.order import KeySteps, Problem, order
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core.compile_ahead import compile_only
from bi_ops.gluon.tile_scheduler import lpt_order


class Bench:
    def __init__(self, case: Case) -> None:
        self.case, starts, longest = case, cu(case.lengths), max(case.lengths)
        self.q, self.k, self.v, self.g = inputs(case)
        self.seqlens = Seqlens(starts, starts, longest, longest)
        self.params = AttentionParams(True, case.head_dim**-0.5)
        self.arch = arches.of(self.q.device)
        found = order(Problem(case.head_dim, self.q.dtype), self.arch).forward
        assert isinstance(found, KeySteps)
        self.order = found
        chosen = config.gluon_forward(longest, case.head_dim, self.q.dtype, found, self.arch)
        assert chosen is not None
        self.in_use = chosen

    def run(self, chosen: ForwardConfig) -> tuple[torch.Tensor, torch.Tensor]:
        return launch.forward(self.q, self.k, self.v, self.seqlens, self.params, None, self.order, self.arch, chosen)


def variants(one: ForwardConfig, head_dim: int) -> list[ForwardConfig]:
    """The config in use, which comes first, and others."""
    clears = replace(one, consumers_clear=True)
    some = [one, clears, replace(clears, persistent=False)]
    if head_dim == 128:
        some.append(replace(clears, ping_pong=False))
    return some


def text(c: ForwardConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(c).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that forward_exploration.csv is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 256])
    parser.add_argument("--seconds", type=float, default=40, help="start no case after as many")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began = time.perf_counter()
    about = row_provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    with compile_only(16):
        for d, lengths in itertools.product(args.head_dims, ((256, 256), (256, 130))):
            bench = Bench(Case("fwd", lengths, d, WIDTH // d, WIDTH // d // GROUP))
            for chosen in variants(bench.in_use, d):
                bench.run(chosen)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    packed = rl_lengths(TOKENS)
    batches = (packed, (TOKENS // len(packed),) * len(packed), (2048,) * 8, (2000,) * 8)
    rows: list[dict[str, object]] = []
    failed = 0
    for d, of_one in itertools.product(args.head_dims, batches):
        if time.perf_counter() - began > args.seconds:
            print("out of time; the rest is left out")
            break
        case = Case("fwd", of_one, d, WIDTH // d, WIDTH // d // GROUP)
        bench = Bench(case)
        configs = variants(bench.in_use, d)
        expected = bench.run(bench.in_use)
        runs = {text(c): partial(bench.run, c) for c in configs}
        times = in_turns({**runs, "order of tiles": partial(lpt_order, bench.seqlens[0], 128)}, rounds=5)
        other = tried("FlashAttention 3", lambda case=case, b=bench: fa3(case, b.q, b.k, b.v, b.g))  # type: ignore[misc]
        for c in configs:
            same = equal(bench.run(c), expected)
            failed += not same
            tflops = round(case.flops / times[text(c)] / 1e12, 1)
            rows.append(
                {"seqlen": max(of_one), "batch": len(of_one), "packed": case.packed, "head_dim": d}
                | {"config": text(c), "in_use": c == bench.in_use, "tflops": tflops}
                | {"fa3_tflops": other and round(case.flops / other / 1e12, 1), "same_bits": same}
                | about
            )
            print(f"{case}: {tflops} {'' if same else 'OTHER BITS '}{text(c)}", flush=True)
        print(
            f"    FlashAttention 3 {rows[-1]['fa3_tflops']}; the order of tiles {times['order of tiles'] * 1e6:.1f} us"
        )
        write_csv(args.out / "forward_exploration.csv", rows)
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
