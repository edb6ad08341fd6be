"""Which config of a GEMM in segments is fastest, beside the GEMM of one segment and cuBLAS? Writes segment_configs.csv.

    python bench/segment_configs.py --out bench/results/h200 [--models 1.7B 8B] [--segments 1 2 4 8] [--seconds 60]

Of a training step the products that ranks share K of: outputs of attention and of the MLP, and dX of what stands before
them (`parts`: queries, keys and values; gate and up), at 8,192 tokens. Configs of the Triton kernel and of Hopper's are
compiled in parallel first. Each must give the bits of the first, Triton's; Hopper's also those of a few rows alone, and
unrounded ones. All are then timed in turns. A run ends with each model's sums of the times over those of cuBLAS. Needs
a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from backward_configs import in_turns
from products import MODELS, TOKENS
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops import matmul
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.compile_ahead import compile_only
from bi_ops.matmul.config import (
    NARROW_SEGMENTS,
    WIDE_SEGMENTS,
    HopperSegmentsConfig,
    SegmentsConfig,
    hopper_segments_config,
    segments_config,
)
from bi_ops.matmul.segments import subtree_of

Config = SegmentsConfig | HopperSegmentsConfig

#: Of which the bits are compared: less than a tile, a tile and a row, all but one row.
ROWS = (1, 17, 129, 8191)
BF16 = torch.bfloat16


class Product(NamedTuple):
    """[TOKENS, K] x [N, K]; parts: of K. transposed: the weight is stored [K, N], as for a dX."""

    name: str
    n: int
    k: int
    parts: tuple[int, ...] | None = None
    transposed: bool = False


def products(model: str) -> Iterator[Product]:
    hidden, intermediate, heads, kv_heads = MODELS[model]
    yield Product("o", hidden, heads * 128)
    yield Product("down", hidden, intermediate)
    qkv = (heads * 128, kv_heads * 128, kv_heads * 128)
    yield Product("dX of qkv", hidden, sum(qkv), qkv, True)
    yield Product("dX of gate and up", hidden, 2 * intermediate, (intermediate, intermediate), True)


#: Hopper's tiles of each number of segments.
TRIED: dict[int, tuple[HopperSegmentsConfig, ...]] = {
    1: (WIDE_SEGMENTS, NARROW_SEGMENTS),
    2: (WIDE_SEGMENTS, replace(WIDE_SEGMENTS, block_k=32, stages=6), NARROW_SEGMENTS),
    4: (NARROW_SEGMENTS,),
    8: (NARROW_SEGMENTS,),
}


def configs(n: int, segments: int, arch: arches.Arch) -> list[Config]:
    """Triton's for so many rows, which comes first and has the bits that are expected, and Hopper's."""
    return [segments_config(TOKENS, n, segments, BF16, arch), *TRIED[segments]]


def text(c: Config) -> str:
    kernel = "hopper" if isinstance(c, HopperSegmentsConfig) else "triton"
    return f"{kernel} " + " ".join(f"{k}={v}" for k, v in asdict(c).items())


def same_bits(
    product: Product,
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: int,
    c: Config,
    expected: torch.Tensor,
    unrounded: torch.Tensor | None,
) -> bool:
    """Has a config the bits of the expected rows, all of them and a few alone?"""

    def equal(want: torch.Tensor) -> bool:
        torch.full_like(want, torch.nan)  # what the result's memory holds before
        return torch.equal(subtree_of(x[: len(want)], weight, segments, product.parts, want.dtype, c), want)

    wanted = [expected]
    if isinstance(c, HopperSegmentsConfig):
        wanted += [expected[:rows] for rows in ROWS]
        wanted += [] if unrounded is None else [unrounded, unrounded[:129]]
    return all(equal(want) for want in wanted)


def operands(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, product.k, device="cuda").to(BF16)
    shape = (product.k, product.n) if product.transposed else (product.n, product.k)
    weight = torch.randn(shape, device="cuda").to(BF16)
    return x, weight.t() if product.transposed else weight


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that segment_configs.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["1.7B", "8B"])
    parser.add_argument("--segments", nargs="+", type=int, choices=list(TRIED), default=list(TRIED))
    parser.add_argument("--seconds", type=float, default=60, help="start no product after as many")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began, about = time.perf_counter(), row_provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    arch, num_sms = arches.of(device), runtime.multiprocessors(device)
    every = [(model, product) for model in args.models for product in products(model)]
    chosen = {(n, s): configs(n, s, arch) for n in {p.n for _, p in every} for s in args.segments}
    most = max(args.segments)
    unrounded = TRIED[most]
    with compile_only(16):
        for _, product in every:
            x, weight = operands(product)
            for segments in args.segments:
                for c in chosen[product.n, segments]:
                    subtree_of(x, weight, segments, product.parts, BF16, c)
            for c in (chosen[product.n, most][0], *unrounded):
                subtree_of(x, weight, most, product.parts, torch.float32, c)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    failed = 0
    for model, product in every:
        if time.perf_counter() - began > args.seconds:
            print("out of time; the rest is left out")
            break
        x, weight = operands(product)
        same: dict[tuple[int, Config], bool] = {}
        for segments in args.segments:
            first, *_ = chosen[product.n, segments]
            expected = subtree_of(x, weight, segments, product.parts, BF16, first)
            exact = subtree_of(x, weight, most, product.parts, torch.float32, first) if segments == most else None
            for c in chosen[product.n, segments]:
                fp32 = exact if c in unrounded else None
                same[segments, c] = same_bits(product, x, weight, segments, c, expected, fp32)
        failed += sum(not equal for equal in same.values())
        runs: dict[str, Callable[[], object]] = {
            "one segment": partial(matmul.mm, x, weight.t()),
            "cuBLAS": partial(torch.mm, x, weight.t()),
        }
        for segments, c in same:
            runs[f"{segments} {text(c)}"] = partial(subtree_of, x, weight, segments, product.parts, BF16, c)
        times = in_turns(runs, rounds=5)
        for segments, c in same:
            name = f"{segments} {text(c)}"
            us = {"one_segment_us": times["one segment"], "cublas_us": times["cuBLAS"]}
            rows.append(
                {"model": model, "product": product.name, "m": TOKENS, "n": product.n, "k": product.k}
                | {
                    "segments": segments,
                    "config": text(c),
                    "in_use": segments > 1 and c == hopper_segments_config(TOKENS, product.n, segments, num_sms),
                    "us": round(1e6 * times[name], 1),
                }
                | {side: round(1e6 * taken, 1) for side, taken in us.items()}
                | {"over_cublas": round(times[name] / times["cuBLAS"], 3), "same_bits": same[segments, c]}
                | about
            )
        write_csv(args.out / "segment_configs.csv", rows)
        for segments in args.segments:
            best = {text(c): times[f"{segments} {text(c)}"] for s, c in same if s == segments}
            print(f"{model} {product.name}, {segments} segments, us:")
            for name, taken in sorted(best.items(), key=lambda item: item[1]):
                print(f"  {1e6 * taken:7.1f} {taken / times['cuBLAS']:.3f} of cuBLAS, {name}", flush=True)
    for model, found in dict.fromkeys((str(row["model"]), row["segments"]) for row in rows):
        mine = [row for row in rows if row["model"] == model and row["segments"] == found]
        cublas = sum({str(row["product"]): float(str(row["cublas_us"])) for row in mine}.values())
        print(f"{model}, {found} segments: cuBLAS {cublas:.0f} us of a layer")
        for name in dict.fromkeys(str(row["config"]) for row in mine):
            total = sum(float(str(row["us"])) for row in mine if row["config"] == name)
            print(f"  {total:7.0f} {total / cublas:.3f}, {name}")
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
