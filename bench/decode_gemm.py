"""GEMMs of few rows, as decoding runs them: the `decode` backend against cuBLAS. Writes decode_gemm.csv.

    python bench/decode_gemm.py --out bench/results/h100 [--models 0.6B 8B] [--rows 1 64]

Each row is a linear layer of Qwen3, or all four of a decoder layer, each of which reads what the one before wrote
("layer"), or the LM head. Times are microseconds of the GPU per call, medians of CUDA graphs over weights that lie cold
in memory, all sides in turns in one process. `decode_us` has the weights loaded ahead, as a captured graph allows;
`decode_waiting_us` loads them after the kernel before has ended. The roof is that of an H100's memory.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from products import COLD, MODELS, geometric_mean, products, roof_us, times
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops.matmul import decode
from bi_ops.matmul.launch import launch_triton

ROWS = (1, 2, 4, 8, 16, 32, 64)

#: x, weight, out: out = x @ weight.T
Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
#: Calls in the order of the stream, and what the last writes.
Calls = tuple[list[Callable[[], object]], torch.Tensor]


def by_cublas(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def by_triton(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    launch_triton(x[None], weight.t()[None], None, out[None])


def by_decode(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, prefetch: bool = True) -> None:
    decode.launch(x, weight, None, out, prefetch=prefetch)


SIDES: dict[str, Gemm] = {
    "cublas_us": by_cublas,
    "triton_us": by_triton,
    "decode_waiting_us": partial(by_decode, prefetch=False),
    "decode_us": by_decode,
}


def one_product(gemm: Gemm, pool: torch.Tensor, m: int, n: int, k: int) -> Calls:
    """Calls of one GEMM on weights in turn, and what they write."""
    copies = max(1, min(pool.numel() // (n * k), math.ceil(COLD / (2 * n * k))))
    weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(copies)]
    x, out = torch.randn(m, k, device="cuda").bfloat16(), torch.full((m, n), torch.nan, device="cuda").bfloat16()
    return [partial(gemm, x, weights[i % copies], out) for i in range(max(copies, 3))], out


def layers(gemm: Gemm, pool: torch.Tensor, m: int, model: str) -> Calls:
    """Calls of the GEMMs of decoder layers, each of which reads the first columns of what the one before wrote."""
    shapes = [(n, k) for name, n, k in products(model) if name != "lm_head"]
    size = sum(n * k for n, k in shapes)
    out = torch.randn(m, MODELS[model][0], device="cuda").bfloat16()
    outs = [torch.full((m, n), torch.nan, device="cuda").bfloat16() for n, _ in shapes]
    calls: list[Callable[[], object]] = []
    for layer in range(min(pool.numel() // size, max(2, math.ceil(COLD / (2 * size))))):
        weights = pool[layer * size : (layer + 1) * size].split([n * k for n, k in shapes])
        for weight, (n, k), written in zip(weights, shapes, outs, strict=True):
            calls.append(partial(gemm, out[:, :k], weight.view(n, k), written))
            out = written
    return calls, out


def row(
    model: str, product: str, m: int, roof: float, calls_per_row: int, make: Callable[[Gemm], Calls]
) -> dict[str, object]:
    """The times of each side, and whether the bits of `decode` are those of the Triton kernel."""
    sides, outs = {}, {}
    for name, gemm in SIDES.items():
        torch.manual_seed(m)
        sides[name], outs[name] = make(gemm)
        for call in sides[name]:  # kernels are compiled before a graph is captured
            call()
    us = times(sides, 9)  # which leaves what the last replay wrote
    bits = all(torch.equal(outs[name], outs["triton_us"]) for name in ("decode_us", "decode_waiting_us"))
    taken = {name: round(t * calls_per_row, 3) for name, t in us.items()}
    return {"model": model, "product": product, "m": m, **taken, "h100_roof_us": round(roof, 3), "bits_equal": bits}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that decode_gemm.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["0.6B", "1.7B", "4B", "8B"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    pool = torch.empty(max(n * k for m in args.models for _, n, k in products(m)), device="cuda", dtype=torch.bfloat16)
    for part in pool.split(1 << 26):
        part.normal_(std=0.03)
    rows: list[dict[str, object]] = []
    start = time.monotonic()
    for model in args.models:
        shapes = list(products(model))
        for m in args.rows:
            for product, n, k in shapes:
                make = partial(one_product, pool=pool, m=m, n=n, k=k)
                rows.append(row(model, product, m, roof_us(m, n, k), 1, make) | about)
            roof = sum(roof_us(m, n, k) for _, n, k in shapes[:4])
            rows.append(row(model, "layer", m, roof, 4, partial(layers, pool=pool, m=m, model=model)) | about)
            print(
                f"[{time.monotonic() - start:5.1f} s]",
                {k: v for k, v in rows[-1].items() if k not in about},
                flush=True,
            )
        write_csv(args.out / "decode_gemm.csv", rows)
    for m in args.rows:
        mine = [r for r in rows if r["m"] == m]
        ratios = [float(r["cublas_us"]) / float(r["decode_us"]) for r in mine]  # type: ignore[arg-type]
        print(f"{m} rows: {geometric_mean(ratios):.3f}x cuBLAS, at least {min(ratios):.3f}x")
    exact = all(r["bits_equal"] for r in rows)
    print("bits", "hold" if exact else "DIFFER")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
