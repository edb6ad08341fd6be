"""GEMMs against cuBLAS and vLLM: time and bits of every Qwen3 linear layer, one row to thousands. Writes products.csv.

    python bench/products.py --out bench/results/h100 [--models 0.6B 8B] [--quick]

Both sides of every ratio are timed in this process, in turns, as CUDA graphs over weights that lie cold in memory: the
graph walks copies of the weight that together are larger than the L2 cache. Medians. The host's own time per eager call
goes to products_host.csv. A run ends with the figures that the README quotes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from record import row_provenance, write_csv

import bi_ops  # isort: skip  (before triton)
import torch

from bi_ops.core import vllm
from bi_ops.matmul import backends, verification, warmup
from bi_ops.matmul.backends import gemm
from bi_ops.matmul.launch import launch_wgrad

#: hidden, intermediate, query heads, key heads; head_dim 128, vocabulary 151,936.
MODELS = {
    "0.6B": (1024, 3072, 16, 8),
    "1.7B": (2048, 6144, 16, 8),
    "4B": (2560, 9728, 32, 8),
    "8B": (4096, 12288, 32, 8),
    "14B": (5120, 17408, 40, 8),
    "32B": (5120, 25600, 64, 8),
}
ROWS = tuple(2**i for i in range(15))
TOKENS = 8192  # of a backward
COLD = 120 << 20  # bytes that do not fit the L2 cache (50 MB on an H100)
BANDWIDTH, ARITHMETIC = 3.35e12, 989e12  # of an H100: bytes/s, dense bf16 FLOP/s


def products(model: str) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of each product of a model."""
    hidden, intermediate, heads, kv_heads = MODELS[model]
    yield "qkv", (heads + 2 * kv_heads) * 128, hidden
    yield "o", hidden, heads * 128
    yield "gate_up", 2 * intermediate, hidden
    yield "down", hidden, intermediate
    yield "lm_head", 151936, hidden


def roof_us(m: int, n: int, k: int, out_bytes: int = 2) -> float:
    """The memory and arithmetic roof of one product, in microseconds."""
    return max((2 * (m * k + n * k) + out_bytes * m * n) / BANDWIDTH, 2 * m * n * k / ARITHMETIC) * 1e6


def times(sides: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median microseconds per call of each side; a side is a list of calls that one graph makes."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graphs = {}
    with torch.cuda.stream(stream):
        for name, calls in sides.items():
            calls[0]()
            stream.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], stream=stream):
                for call in calls:
                    call()
            graphs[name].replay()
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(rounds):
            # There and back: what runs second finds the GPU warmer and its clock lower.
            for name, graph in list(graphs.items())[:: -1 if i % 2 else 1]:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                graph.replay()
                end.record(stream)
                stream.synchronize()
                taken[name].append(start.elapsed_time(end) * 1e3 / len(sides[name]))
    return {name: sorted(ts)[len(ts) // 2] for name, ts in taken.items()}


def vllm_product() -> Callable[..., torch.Tensor] | None:
    """vLLM's batch-invariant kernel, where vLLM is installed."""
    if not backends.get("vllm").available():
        return None
    return vllm.batch_invariant_module().matmul_persistent


def forward_rows(model: str, pool: torch.Tensor, sizes: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """One row per product and row count."""
    vllm = vllm_product()
    for product, n, k in products(model):
        copies = max(1, min(32, pool.numel() // (n * k), math.ceil(COLD / (2 * n * k))))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k).t() for i in range(copies)]
        x_all = torch.randn(max(sizes), k, device="cuda").bfloat16()
        gemm(x_all, weights[0])
        warmup()
        out_all = gemm(x_all, weights[0])
        for m in sizes:
            x = x_all[:m].clone()
            calls = max(copies, 2 if m * n * k > 1 << 38 else 6)
            sides: dict[str, list[Callable[[], object]]] = {
                "cublas": [partial(torch.mm, x, weights[i % copies]) for i in range(calls)],
                "ours": [partial(gemm, x, weights[i % copies]) for i in range(calls)],
            }
            if vllm is not None:
                sides["vllm"] = [partial(vllm, x, weights[i % copies]) for i in range(min(calls, 8))]
            us = times(sides, 3 if m * n * k > 1 << 38 else 7)
            ours = gemm(x, weights[0])
            yield {
                "pass": "fwd",
                "model": model,
                "product": product,
                "m": m,
                "n": n,
                "k": k,
                "cublas_us": round(us["cublas"], 3),
                "vllm_us": round(us["vllm"], 3) if vllm is not None else "",
                "ours_us": round(us["ours"], 3),
                "roof_us": round(roof_us(m, n, k), 3),
                "bits_equal_vllm": torch.equal(ours, vllm(x, weights[0])) if vllm is not None else "",
                "m_invariant": torch.equal(ours, out_all[:m]),
                "backend": ours_by(x, weights[0], ours, "m"),
            }
        del x_all, out_all


def ours_by(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, batch_axis: verification.BatchAxis) -> str:
    """Who computed a GEMM of ours."""
    return "cublaslt" if backends.get("cublaslt").gemm(a, b, None, out, batch_axis) else "triton"


def backward_rows(model: str, pool: torch.Tensor, tokens: int) -> Iterator[dict[str, object]]:
    """dX, dW in bf16, and dW added to an fp32 buffer, at `tokens` tokens."""
    for product, n, k in products(model):
        weight = pool[: n * k].view(n, k)
        g, x = (torch.randn(tokens, d, device="cuda").bfloat16() for d in (n, k))
        buffer = torch.zeros(n, k, device="cuda")
        half = tokens // 2
        sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "dx": (partial(torch.mm, g, weight), partial(gemm, g, weight)),
            "dw": (partial(torch.mm, g.t(), x), partial(gemm, g.t(), x, None, None, "k")),
            "dw_fp32": (partial(torch.mm, g.t(), x), partial(launch_wgrad, g, x, buffer)),
        }
        for _theirs, ours in sides.values():
            ours()
        warmup()
        for name, (theirs, ours) in sides.items():
            us = times({"cublas": [theirs] * 2, "ours": [ours] * 2}, 5)
            if name == "dx":  # the same rows of half the batch
                invariant = torch.equal(gemm(g[:half], weight), gemm(g, weight)[:half])
                by = ours_by(g, weight, torch.empty_like(x), "m")
            else:  # the same sum in micro-batches, and as the other operator rounds it
                buffer.zero_()
                for a, b in ((0, 16), (16, half), (half, tokens)):
                    launch_wgrad(g[a:b], x[a:b], buffer)
                whole = gemm(g.t(), x, None, torch.float32, "k")
                invariant = torch.equal(buffer, whole)
                by = ours_by(g.t(), x, torch.empty_like(weight), "k") if name == "dw" else "triton"
            yield {
                "pass": name,
                "model": model,
                "product": product,
                "m": tokens,
                "n": n,
                "k": k,
                "cublas_us": round(us["cublas"], 3),
                "vllm_us": "",
                "ours_us": round(us["ours"], 3),
                "roof_us": round(roof_us(tokens, n, k), 3),
                "bits_equal_vllm": "",
                "m_invariant": invariant,
                "backend": by,
            }


def host_rows() -> Iterator[dict[str, object]]:
    """Microseconds of the host per eager call, where the GPU has nothing to do."""
    x, weight = (torch.randn(s, device="cuda").bfloat16() for s in ((1, 256), (256, 256)))
    for grad in (False, True):
        weight.requires_grad_(grad)
        calls = {
            "F.linear": lambda: torch.nn.functional.linear(x, weight),
            "bi_ops.matmul.linear": lambda: bi_ops.matmul.linear(x, weight),
        }
        for name, call in calls.items():
            call()
            warmup()
            best = math.inf
            for _ in range(7):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(300):
                    call()
                best = min(best, (time.perf_counter() - start) / 300 * 1e6)
            yield {"call": name, "requires_grad": grad, "host_us": round(best, 2)}


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def summary(rows: list[dict[str, object]]) -> None:
    """The figures the README quotes."""
    for name in ("fwd", "dx", "dw", "dw_fp32"):
        mine = [r for r in rows if r["pass"] == name]
        if not mine:
            continue
        ratios = [float(r["cublas_us"]) / float(r["ours_us"]) for r in mine]  # type: ignore[arg-type]
        worst = min(zip(ratios, mine, strict=True), key=lambda p: p[0])
        where = {c: worst[1][c] for c in ("model", "product", "m")}
        exact = all(r["m_invariant"] and r["bits_equal_vllm"] in (True, "") for r in mine)
        print(
            f"{name}: {len(mine)} cells, {geometric_mean(ratios):.3f}x cuBLAS, worst {worst[0]:.3f}x at {where}", end=""
        )
        print(f", bits {'hold' if exact else 'DIFFER'}")
    few = [r for r in rows if r["pass"] == "fwd" and int(r["m"]) <= 64 and r["vllm_us"] != ""]  # type: ignore[call-overload]
    if few:
        ratios = [float(r["vllm_us"]) / float(r["ours_us"]) for r in few]  # type: ignore[arg-type]
        print(f"fwd, M <= 64: {geometric_mean(ratios):.2f}x vLLM, at least {min(ratios):.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that products.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="the smallest model and a few row counts")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    models, sizes = (["0.6B"], (1, 16, 64, 1024)) if args.quick else (args.models, ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    most = max(n * k for m in models for _, n, k in products(m))
    pool = torch.empty(max(most, COLD), device="cuda", dtype=torch.bfloat16)
    for part in pool.split(1 << 26):
        part.normal_(std=0.05)
    rows: list[dict[str, object]] = []
    start = time.monotonic()
    for model in models:
        for row in (*forward_rows(model, pool, sizes), *backward_rows(model, pool, TOKENS)):
            rows.append(row | about)
        write_csv(args.out / "products.csv", rows)
        print(f"[{time.monotonic() - start:5.0f} s] {model}", flush=True)
    write_csv(args.out / "products_host.csv", [r | about for r in host_rows()])
    summary(rows)
    return 0 if all(r["m_invariant"] and r["bits_equal_vllm"] in (True, "") for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
