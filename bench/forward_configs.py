"""Which config of attention's forward is fastest where sequences end within a step? Writes forward_exploration.csv.

    python bench/forward_configs.py --out bench/results/h200 [--head-dims 128 64 256] [--seconds 75]

Causal: a packed batch, equal sequences that are no multiple of a step, and lengths of which all steps are full. To tell
what costs what, the same sequences also run rounded up to whole tiles (`packed, whole tiles`, 768), and equal ones in
the launch of unequal ones (`as unequal`). Configs are compiled in parallel first and timed in turns, beside vLLM's
FlashAttention 3 where that is installed; each must give the bits of the config in use, RERUNS times. Cases and counting
are those of bench/attention.py. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import asdict, fields, replace
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
from bi_ops.core.integers import cdiv
from bi_ops.gluon.tile_scheduler import tile_list

#: How often each config's bits are compared, and in how many turns it is timed.
RERUNS, TURNS = 10, 5


class Bench:
    def __init__(self, case: Case, unequal: bool = False) -> None:
        self.case, starts, longest = case, cu(case.lengths), max(case.lengths) + unequal
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


def variants(one: ForwardConfig) -> list[ForwardConfig]:
    """The config in use, which comes first, and others."""
    some = [one]
    if one.consumers_may_clear:
        some.append(replace(one, consumers_clear=not one.consumers_clear))
    if one.q_stages > 1:
        some += [replace(c, ahead=not one.ahead) for c in some]
    return some


def rounded(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(cdiv(n, 128) * 128 for n in lengths)


def batches() -> list[tuple[str, tuple[int, ...]]]:
    """What is asked about first comes first."""
    packed = rl_lengths(TOKENS)
    mean = (TOKENS // len(packed),) * len(packed)
    return [
        ("packed", packed),
        ("equal", mean),
        ("as unequal", mean),
        ("equal", (1024,) * 16),
        ("equal", (2048,) * 8),
        ("equal", (8192,) * 2),
        ("packed, whole tiles", rounded(packed)),
        ("equal", rounded(mean)),
        ("equal", (512,) * 32),
        ("equal", (2000,) * 8),
        ("equal", (8192,)),
    ]


def text(c: ForwardConfig) -> str:
    """What is not at its default."""
    defaults = {f.name: f.default for f in fields(c)}
    return " ".join(f"{k}={v}" for k, v in asdict(c).items() if v != defaults[k])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that forward_exploration.csv is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 256])
    parser.add_argument("--seconds", type=float, default=75, help="start no case after as many")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began = time.perf_counter()
    about = row_provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    with compile_only(16):
        for d, lengths in itertools.product(args.head_dims, ((256, 256), (256, 130))):
            bench = Bench(Case("fwd", lengths, d, WIDTH // d, WIDTH // d // GROUP))
            for chosen in variants(bench.in_use):
                bench.run(chosen)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    failed = 0
    for (name, of_one), d in itertools.product(batches(), args.head_dims):
        if time.perf_counter() - began > args.seconds:
            print("out of time; the rest is left out")
            break
        case = Case("fwd", of_one, d, WIDTH // d, WIDTH // d // GROUP)
        bench = Bench(case, name == "as unequal")
        configs = variants(bench.in_use)
        expected = bench.run(bench.in_use)
        # Bits first: a config that hangs is the last one that was named.
        same = {}
        for c in configs:
            print(f"{case}, {name}: {text(c)}", end="", flush=True)
            same[text(c)] = all(equal(bench.run(c), expected) for _ in range(RERUNS))
            print("" if same[text(c)] else " OTHER BITS", flush=True)
        failed += sum(not s for s in same.values())
        starts, n_tiles = bench.seqlens[0], TOKENS * 2 // 32
        runs = {text(c): partial(bench.run, c) for c in configs}
        tiles = partial(tile_list, starts, starts, n_tiles, 32, True, False)
        times = in_turns({**runs, "order of tiles": tiles}, rounds=TURNS)
        order_us = round(times["order of tiles"] * 1e6, 1)
        other = tried("FlashAttention 3", lambda case=case, b=bench: fa3(case, b.q, b.k, b.v, b.g))  # type: ignore[misc]
        for c in configs:
            tflops = round(case.flops / times[text(c)] / 1e12, 1)
            over = round(times[text(bench.in_use)] / times[text(c)], 4)
            rows.append(
                {"case": name, "seqlen": max(of_one), "batch": len(of_one), "head_dim": d}
                | {"config": text(c), "in_use": c == bench.in_use, "us": round(times[text(c)] * 1e6, 1)}
                | {"tflops": tflops, "over_in_use": over}
                | {"fa3_tflops": other and round(case.flops / other / 1e12, 1), "same_bits": same[text(c)]}
                | {"order_of_tiles_us": order_us}
                | about
            )
            print(f"    {tflops:6} {over:.4f} {text(c)}", flush=True)
        print(f"    FlashAttention 3 {rows[-1]['fa3_tflops']}; order of tiles {order_us} us")
        write_csv(args.out / "forward_exploration.csv", rows)
        del bench, expected
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
