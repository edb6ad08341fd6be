"""Which config of a GEMM in segments is fastest, beside the GEMM of one segment and cuBLAS? Writes segment_configs.csv.

    python bench/segment_configs.py --out bench/results/h200 [--models 1.7B 8B] [--seconds 60]

Of a training step the products that ranks share K of: outputs of attention and of the MLP, and dX of what stands before
them (`parts`: queries, keys and values; gate and up), at 8,192 tokens. Configs are compiled in parallel first and timed
in turns; each must give the bits of the config in use. A run ends with geometric means of the configs' times over those
of one segment. Needs a GPU.
"""

from __future__ import annotations

import argparse
import math
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
from bi_ops.core.compile_ahead import compile_only
from bi_ops.matmul.config import SegmentsConfig, segments_config
from bi_ops.matmul.segments import subtree_of

SEGMENTS = (2, 4, 8)
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


def configs(segments: int, in_use: SegmentsConfig) -> list[SegmentsConfig]:
    """The one in use, which comes first, and others."""
    wide, square = (replace(in_use, block_m=128, block_n=n, block_k=64, num_warps=8) for n in (256, 128))
    found = [in_use, replace(wide, num_stages=3, kept=1), replace(square, num_stages=4, kept=1)]
    found += [replace(square, num_stages=stages, kept=2) for stages in (3, 4)]
    return list(dict.fromkeys(found))


def text(c: SegmentsConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(c).items())


def operands(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, product.k, device="cuda").to(BF16)
    shape = (product.k, product.n) if product.transposed else (product.n, product.k)
    weight = torch.randn(shape, device="cuda").to(BF16)
    return x, weight.t() if product.transposed else weight


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that segment_configs.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["1.7B", "8B"])
    parser.add_argument("--seconds", type=float, default=60, help="start no product after as many")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began, about = time.perf_counter(), row_provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    arch = arches.of(torch.device("cuda"))
    every = [(model, product) for model in args.models for product in products(model)]
    chosen = {
        (n, s): configs(s, segments_config(TOKENS, n, s, BF16, arch)) for n in {p.n for _, p in every} for s in SEGMENTS
    }
    with compile_only(16):
        for _, product in every:
            x, weight = operands(product)
            for segments in SEGMENTS:
                for c in chosen[product.n, segments]:
                    subtree_of(x, weight, segments, product.parts, BF16, c)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    ratios: dict[tuple[int, str], list[float]] = {}
    failed = 0
    for model, product in every:
        if time.perf_counter() - began > args.seconds:
            print("out of time; the rest is left out")
            break
        x, weight = operands(product)
        runs: dict[str, Callable[[], object]] = {
            "one segment": partial(matmul.mm, x, weight.t()),
            "cuBLAS": partial(torch.mm, x, weight.t()),
        }
        for segments in SEGMENTS:
            for c in chosen[product.n, segments]:
                runs[f"{segments} {text(c)}"] = partial(subtree_of, x, weight, segments, product.parts, BF16, c)
        times = in_turns(runs, rounds=5)
        for segments in SEGMENTS:
            in_use, *_ = chosen[product.n, segments]
            expected = subtree_of(x, weight, segments, product.parts, BF16, in_use)
            for c in chosen[product.n, segments]:
                name = f"{segments} {text(c)}"
                same = torch.equal(subtree_of(x, weight, segments, product.parts, BF16, c), expected)
                failed += not same
                ratio = times[name] / times["one segment"]
                ratios.setdefault((segments, text(c)), []).append(ratio)
                rows.append(
                    {"model": model, "product": product.name, "m": TOKENS, "n": product.n, "k": product.k}
                    | {
                        "segments": segments,
                        "config": text(c),
                        "in_use": c == in_use,
                        "us": round(1e6 * times[name], 1),
                    }
                    | {"one_segment_us": round(1e6 * times["one segment"], 1), "over_one_segment": round(ratio, 3)}
                    | {"cublas_us": round(1e6 * times["cuBLAS"], 1), "same_bits": same}
                    | about
                )
        write_csv(args.out / "segment_configs.csv", rows)
    for (segments, name), found in sorted(ratios.items(), key=lambda item: (item[0][0], math.prod(item[1]))):
        print(f"{segments} segments: {math.prod(found) ** (1 / len(found)):.3f} of one segment, {name}")
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
