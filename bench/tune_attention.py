"""Which config of attention's Triton kernels is fastest? Times tiles, warps and stages; writes tune_attention.csv.

    python bench/tune_attention.py --out bench/results/h100 [--head-dims 128] [--kernels fwd dq dkv decode] [--top 5]

Configs of one order must give the bits of the config in use, and are compared with it. Other steps are other orders:
one may be adopted, but with it every bit changes, and `block_n` is that of the forward and of decoding. Fastest first.
Variants are compiled beforehand in parallel, since compiling takes most of the time; what is not compiled after
--compile-seconds is left out and counted. The sizes are those of bench/attention.py.
`--dry` runs every line of this in Triton's interpreter on tiny inputs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from attention import (
    DECODE_CONTEXT,
    GROUP,
    HEAD_DIMS,
    PAGE,
    TOKENS,
    WIDTH,
    Case,
    cu,
    equal,
    inputs,
    random_like,
    seconds,
)
from record import provenance, write_csv

from bi_ops.attention import config, launch
from bi_ops.attention.config import KernelConfig
from bi_ops.attention.order import AttentionOrder, KeySteps, Problem, TwoPass, order, two_pass
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import runtime

KERNELS = ("fwd", "dq", "dkv", "decode")
SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Variant:
    """One config under one order. config None: the one in use."""

    kernel: str
    head_dim: int
    order: AttentionOrder
    config: KernelConfig | None = None

    @property
    def two_pass(self) -> TwoPass:
        """The order of the backward: `order_in_use` takes no other."""
        assert isinstance(self.order.backward, TwoPass)
        return self.order.backward

    @property
    def key_steps(self) -> KeySteps:
        assert isinstance(self.order.forward, KeySteps)
        return self.order.forward

    @property
    def step(self) -> int:
        """What the kernel takes a sum in."""
        if self.kernel in ("fwd", "decode"):
            return self.key_steps.block_n
        return self.two_pass.block_dq if self.kernel == "dq" else self.two_pass.block_r

    def with_step(self, step: int) -> AttentionOrder:
        """The order with other steps of this kernel."""
        if self.kernel in ("fwd", "decode"):
            return replace(self.order, forward=KeySteps(step))
        now = self.two_pass
        changed = TwoPass(step, now.block_r) if self.kernel == "dq" else TwoPass(now.block_dq, step)
        return replace(self.order, backward=changed)

    def __str__(self) -> str:
        return f"{self.kernel} d{self.head_dim} {self.config} {self.order}"


def order_in_use(head_dim: int) -> AttentionOrder:
    """The order of the Triton kernels: two passes, also where the Gluon backward takes one."""
    problem, arch = Problem(head_dim, torch.bfloat16), arches.current()
    return replace(order(problem, arch), backward=two_pass(problem, arch))


def variants(kernel: str, head_dim: int, dry: bool) -> Iterator[Variant]:
    """The config in use, then every candidate that may fit."""
    in_use = Variant(kernel, head_dim, order_in_use(head_dim))
    yield in_use
    if dry:
        yield replace(in_use, config=KernelConfig(16, 1, 1, 1))
        yield replace(in_use, config=KernelConfig(32, 2, 1, 1), order=in_use.with_step(32))
        return
    tiles = {
        "fwd": ((64, 4), (128, 4), (128, 8)),
        "decode": ((16, 1), (32, 2), (64, 4)),
        "dq": ((64, 4), (64, 8), (128, 4), (128, 8)),
        "dkv": ((64, 4), (64, 8), (128, 4), (128, 8)),
    }[kernel]
    stages = {"fwd": (2, 3, 4), "decode": (2, 3, 4, 5), "dq": (1, 2, 3), "dkv": (1, 2, 3)}[kernel]
    kept, sums, scores = {"fwd": (1, 1, 1), "decode": (1, 1, 1), "dq": (2, 1, 2), "dkv": (2, 2, 2)}[kernel]
    for (block, warps), step, n_stages in itertools.product(tiles, (32, 64, 128), stages):
        # Bytes of tiles in shared memory, and fp32 values in the registers of a warp: about what can fit.
        shared = 2 * head_dim * (kept * block + 2 * step * n_stages)
        values = block * (head_dim * sums + step * scores)
        if shared <= 1.1 * SHARED_MEMORY and values <= 250 * 32 * warps and (step > 32 or head_dim > 64):
            chosen = KernelConfig(block, 1, warps, n_stages)
            yield replace(in_use, config=chosen, order=in_use.with_step(step))


class Bench:
    """One kernel on one shape: `run` launches a variant of it."""

    def __init__(self, kernel: str, head_dim: int, lengths: tuple[int, ...], heads: int):
        self.kernel, self.arch = kernel, arches.current()
        case = Case("decode" if kernel == "decode" else "fwd", lengths, head_dim, heads, heads // GROUP)
        self.case, n = case, len(lengths)
        self.params = AttentionParams(True, head_dim**-0.5)
        self.in_use = Variant(kernel, head_dim, order_in_use(head_dim))
        if kernel == "decode":
            pages = n * -(-lengths[0] // PAGE)
            shape = (pages, PAGE, case.kv_heads, head_dim)
            self.cache = random_like(*shape), random_like(*shape)
            device = runtime.default_device()
            self.table = torch.randperm(pages, device=device).int().view(n, -1)
            self.q, self.cu = random_like(n, heads, head_dim), cu((1,) * n)
            self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
            return
        self.q, self.k, self.v, self.g = inputs(case)
        self.cu, longest = cu(lengths), max(lengths)
        self.seqlens = Seqlens(self.cu, self.cu, longest, longest)
        if kernel != "fwd":
            out, lse = self.forward(replace(self.in_use, kernel="fwd"))
            sums = self.in_use.order.row_sums
            self.delta, self.shift = launch.launch_delta(self.g, out, lse, None, (None,) * 3, self.seqlens, GROUP, sums)

    def config(self, variant: Variant) -> KernelConfig:
        """The variant's, or the one that sizes choose."""
        pairs = (len(self.cu) - 1) * self.case.kv_heads
        shape = (pairs, variant.head_dim, self.q.dtype)
        if variant.config is not None:
            return variant.config
        if variant.kernel == "decode":
            return config.forward(GROUP, *shape, variant.key_steps, self.arch)
        if variant.kernel == "fwd":
            return config.forward(self.seqlens.max_q * GROUP, *shape, variant.key_steps, self.arch)
        if variant.kernel == "dq":
            return config.dq(self.seqlens.max_q * GROUP, *shape, variant.two_pass, self.arch)
        return config.dkv(self.seqlens.max_k, *shape, variant.two_pass, self.arch)

    def forward(self, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
        o, chosen = variant.key_steps, self.config(variant)
        return launch.forward(self.q, self.k, self.v, self.seqlens, self.params, None, o, self.arch, chosen)

    def run(self, variant: Variant):
        chosen = self.config(variant)
        if self.kernel == "decode":
            pages = (self.q, *self.cache, self.table, self.cu, self.lengths)
            how = (self.params, None, variant.key_steps, self.arch, chosen)
            return launch.paged_forward(*pages, 1, *how)
        if self.kernel == "fwd":
            return self.forward(variant)
        given = (self.g, self.q, self.k, self.v, self.shift, self.delta)
        rest = (self.seqlens, self.params, variant.two_pass, self.arch, chosen)
        if self.kernel == "dq":
            dq = torch.empty_like(self.q)
            launch.launch_dq(*given, dq, *rest)
            return dq
        dk, dv = torch.empty_like(self.k), torch.empty_like(self.v)
        launch.launch_dkv(*given, dk, dv, *rest)
        return dk, dv

    def figure(self, time_s: float) -> float:
        """TFLOP/s of the products this kernel computes, or GB/s when decoding."""
        if self.kernel == "decode":
            return self.case.cache_bytes / time_s / 1e9
        products = {"fwd": 2, "dq": 3, "dkv": 4}[self.kernel]
        return self.case.flops * products / 2 / time_s / 1e12


def compile_variant(variant: Variant, heads: int) -> str:
    """Compile one variant into Triton's disk cache by running it on short sequences; why not, if it does not fit."""
    return launch_error(Bench(variant.kernel, variant.head_dim, (192, 192), heads), variant)


def launch_error(bench: Bench, variant: Variant) -> str:
    import triton

    try:
        bench.run(variant)
    except triton.runtime.errors.OutOfResources as e:
        return str(e).splitlines()[0]
    except RuntimeError as e:  # PassManager failures of the compiler among them
        return (str(e).splitlines() or [type(e).__name__])[0][:100]
    return ""


def compile_all(todo: list[tuple[Variant, int]], workers: int, budget: float) -> dict[Variant, str]:
    """Error ('' if none) of every variant compiled within `budget` seconds."""
    deadline, done = time.perf_counter() + budget, {}
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending = {pool.submit(compile_variant, *t): t[0] for t in todo}
    while pending and (left := deadline - time.perf_counter()) > 0:
        finished, _ = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
        for future in finished:
            done[pending.pop(future)] = future.result()
    children = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    if pending:
        for child in children:
            child.kill()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that tune_attention.csv is written to")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=sorted(HEAD_DIMS, key=lambda d: d != 128))
    parser.add_argument("--seqlens", type=int, nargs="+", default=(2048, 8192))
    parser.add_argument("--top", type=int, default=5, help="how many of each shape are printed")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile")
    parser.add_argument("--compile-seconds", type=float, default=90)
    parser.add_argument("--seconds", type=float, default=160, help="stop timing after this long in all")
    parser.add_argument("--dry", action="store_true", help="tiny inputs in Triton's interpreter; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this in Triton's interpreter")
    batch, context, tokens = 64, DECODE_CONTEXT, TOKENS
    if args.dry:
        args.head_dims, args.seqlens, args.workers = (32,), (32, 64), 1
        batch, context, tokens = 2, 64, 64

    began = time.perf_counter()
    heads = {d: GROUP if args.dry else WIDTH // d for d in args.head_dims}
    todo = [v for d in args.head_dims for kernel in args.kernels for v in variants(kernel, d, args.dry)]
    errors = compile_all([(v, heads[v.head_dim]) for v in todo], args.workers, args.compile_seconds)
    left_out = sum(v not in errors for v in todo)
    print(f"{len(todo)} variants, {left_out} not compiled in time, {time.perf_counter() - began:.0f} s")

    record, rows = provenance(args.commit), []
    args.out.mkdir(parents=True, exist_ok=True)
    for d, kernel in itertools.product(args.head_dims, args.kernels):
        mine = [v for v in todo if (v.kernel, v.head_dim) == (kernel, d) and v in errors]
        shapes = [(context,) * batch] if kernel == "decode" else [(s,) * max(tokens // s, 1) for s in args.seqlens]
        for lengths in shapes:
            bench, found, usual = Bench(kernel, d, lengths, heads[d]), [], None
            now = order_in_use(d)
            for v in mine:
                if time.perf_counter() - began > args.seconds:
                    print("out of time; the rest is left out")
                    break
                error = errors[v] or launch_error(bench, v)
                same_order = v.order == now
                time_s = same = None
                if not error:
                    got = bench.run(v)
                    usual = got if v.config is None else usual
                    same = equal(got, usual) if same_order and usual is not None else None
                    del got
                    time_s = seconds(functools.partial(bench.run, v), budget=0.01, rounds=3)
                used = bench.config(v)
                found.append(
                    {
                        "kernel": kernel,
                        "head_dim": d,
                        "seqlen": lengths[0],
                        "batch": len(lengths),
                        "in_use": v.config is None,
                        "block": used.block,
                        "step": v.step,
                        "num_warps": used.num_warps,
                        "num_stages": used.num_stages,
                        "ms": time_s and round(time_s * 1e3, 4),
                        "rate": time_s and round(bench.figure(time_s), 1),
                        "unit": "GB/s" if kernel == "decode" else "TFLOP/s",
                        "same_bits": same,
                        "error": error,
                    }
                )
            found.sort(key=lambda row: (row["ms"] is None, row["ms"]))
            rows += [row | record for row in found]
            if rows:
                write_csv(args.out / "tune_attention.csv", rows)
            for i, row in enumerate(found):
                if i < args.top or row["in_use"] or row["same_bits"] is False:
                    print({k: v for k, v in row.items() if v not in ("", None)}, flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if any(row["same_bits"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
