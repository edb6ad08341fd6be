"""Which tiles of weight gradients in fp32 are fastest? Every candidate beside cuBLAS; writes dw_fp32_exploration.csv.

    python bench/wgrad_tiles.py --out bench/results/h200 [--models 0.6B 4B] [--seconds 80]

Candidates are compiled in parallel first. All sides of a cell are timed in this process, in turns, as in
`bench/products.py`, whose cells these are. Every candidate must have the bits of the config in use, from a buffer that
holds a sum and from an empty one, and sums cut where no step of the tensor cores ends must not. `--dry` runs the lines
of this without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from products import MODELS, TOKENS, products, times
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops.core.compile_ahead import compile_only
from bi_ops.matmul.config import NARROW, WIDE, WgradConfig, WgradTileConfig, wgrad_config
from bi_ops.matmul.launch import launch_wgrad

Config = WgradConfig | WgradTileConfig

#: Of the persistent kernel.
PERSISTENT: tuple[WgradConfig, ...] = (
    WIDE,
    NARROW,
    replace(WIDE, block_t=32, stages=4),
    replace(NARROW, stages=4),
    replace(NARROW, block_t=32, stages=10),
)
#: A CTA for each tile.
ONE_WAVE: tuple[WgradTileConfig, ...] = (
    WgradTileConfig(2, 128, 64, 7),
    WgradTileConfig(2, 128, 32, 14),
    WgradTileConfig(2, 256, 64, 4),
    WgradTileConfig(2, 256, 32, 9),
    WgradTileConfig(3, 128, 64, 5),
    WgradTileConfig(3, 128, 32, 11),
    WgradTileConfig(3, 128, 64, 5, True),
    WgradTileConfig(3, 128, 32, 11, True),
    WgradTileConfig(3, 256, 64, 4),
    WgradTileConfig(3, 256, 32, 8),
)
EVERY: tuple[Config, ...] = (*PERSISTENT, *ONE_WAVE)
#: (tokens, M, N) whose last tiles and steps are not full.
RAGGED = (1000, 1000, 520)


def candidates(m: int, n: int, num_sms: int) -> Iterator[Config]:
    """Those for an [m, n] gradient: of one tile per CTA where they are one wave, or large tiles nearly whole waves."""
    yield from PERSISTENT
    for c in ONE_WAVE:
        tiles = c.tiles(m, n)
        whole = tiles % num_sms == 0 or tiles % num_sms > 0.9 * num_sms
        if 0.4 * num_sms < tiles <= num_sms or (whole and c.block_m * c.block_n == 192 * 256 and tiles < 8 * num_sms):
            yield c


def text(c: Config) -> str:
    return type(c).__name__ + " " + " ".join(f"{k}={v}" for k, v in asdict(c).items())


def operands(tokens: int, m: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, x = (torch.randn(tokens, d, device=device).bfloat16() for d in (m, n))
    return g, x, torch.randn(m, n, device=device)


def compile_all(device: str) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    g, x, c = operands(64, 512, 1024, device)
    with compile_only(16):
        for config in EVERY:
            for accumulate in (True, False):
                launch_wgrad(g, x, c, config, accumulate)
    return time.perf_counter() - start


def same_bits(g: torch.Tensor, x: torch.Tensor, before: torch.Tensor, config: Config, one: Config) -> bool:
    """Has a config the bits of another, from a sum and from nothing?"""
    for accumulate in (True, False):
        sums = [before.clone() if accumulate else torch.full_like(before, torch.nan) for _ in range(2)]
        launch_wgrad(g, x, sums[0], config, accumulate)
        launch_wgrad(g, x, sums[1], one, accumulate)
        if not torch.equal(*sums):
            return False
    return True


def control_differs(g: torch.Tensor, x: torch.Tensor, before: torch.Tensor, config: Config) -> bool:
    """Negative control: a cut at 100 tokens, within a step of 16, gives other bits."""
    whole, cut = before.clone(), before.clone()
    launch_wgrad(g, x, whole, config)
    launch_wgrad(g[:100], x[:100], cut, config)
    launch_wgrad(g[100:], x[100:], cut, config)
    return not torch.equal(whole, cut)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that dw_fp32_exploration.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=80, help="start no cell after as many")
    parser.add_argument("--dry", action="store_true", help="tiny operands and no GPU: figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began = time.perf_counter()
    device = "cpu" if args.dry else "cuda"
    num_sms = 132 if args.dry else torch.cuda.get_device_properties(0).multi_processor_count
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    print(f"compiled in {compile_all(device):.0f} s", flush=True)

    failed = 0
    small = (64, 64, 64) if args.dry else RAGGED
    for config in EVERY:
        if not same_bits(*operands(*small, device), config, NARROW):
            failed += 1
            print(f"OTHER BITS at {RAGGED}: {text(config)}", flush=True)
    if not args.dry and not control_differs(*operands(*RAGGED, device), NARROW):
        failed += 1
        print("the negative control has equal bits")
    rows: list[dict[str, object]] = []
    # LM heads last: they take longest and lie above what is asked for.
    cells = [(model, *p) for model in args.models for p in products(model)]
    for model, product, m, n in sorted(cells, key=lambda c: c[1] == "lm_head"):
        if time.perf_counter() - began > args.seconds:
            print(f"out of time before {model} {product}")
            break
        tokens = 64 if args.dry else TOKENS
        if args.dry:
            m, n = 64, 128
        g, x, before = operands(tokens, m, n, device)
        chosen = wgrad_config(m, n, tokens, num_sms)
        configs = [c for c in candidates(m, n, num_sms) if product != "lm_head" or c in (WIDE, NARROW)]
        configs = [chosen, *(c for c in configs if c != chosen)]
        equal = {c: same_bits(g, x, before, c, chosen) for c in configs}
        calls: dict[str, list[Callable[[], object]]] = {"cublas": [partial(torch.mm, g.t(), x)] * 2}
        calls |= {text(c): [partial(launch_wgrad, g, x, before, c)] * 2 for c in configs}
        us = dict.fromkeys(calls, 1.0) if args.dry else times(calls, 5 if m * n > 1 << 26 else 9)
        for c in configs:
            failed += not equal[c]
            rows.append(
                {"model": model, "product": product, "tokens": tokens, "n": m, "k": n}
                | {"config": text(c), "in_use": c == chosen, "us": round(us[text(c)], 3)}
                | {"cublas_us": round(us["cublas"], 3), "ratio": round(us["cublas"] / us[text(c)], 4)}
                | {"same_bits": equal[c]}
                | about
            )
        mine = sorted(rows[-len(configs) :], key=lambda r: str(r["ratio"]), reverse=True)
        print(f"{model} {product} {m}x{n}: cublas {us['cublas']:.1f} us; in use {us['cublas'] / us[text(chosen)]:.3f}")
        for r in mine[:4]:
            print(
                f"    {r['ratio']:.3f} {r['us']:9.1f} us {'' if r['same_bits'] else 'OTHER BITS '}{r['config']}",
                flush=True,
            )
        write_csv(args.out / "dw_fp32_exploration.csv", rows)
        del g, x, before
    print(f"{time.perf_counter() - began:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
