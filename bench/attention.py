"""How fast is attention, beside torch's SDPA and vLLM's FlashAttention 3? Writes attention.csv, one row a case.

    python bench/attention.py --out bench/results/h100 [--quick] [--head-dims 64 128 256] [--seqlens 512 ... 32768]

Forward and backward: causal, bf16, four query heads to a key head, 16k tokens cut into equal sequences of each
length, single sequences of 32k and 128k, and lognormal lengths as an RL batch has them, with as many equal ones beside
them. Decoding: 8k paged keys.
TFLOP/s count as flash-attention does: 4 * S * S * D a head, half of it if causal, 2.5 times that for the backward.
A rival's column is empty where it lacks the case. Decoding is counted in GB/s of keys and values, beside the card's
own rate of copying.

Every figure is GPU time: calls are queued behind a pause on the GPU, so that what Python takes to launch them does not
show, and the median of several such rounds counts. Both sides of a row run in the same minute on the same inputs.
`--dry` runs every line of this in Triton's interpreter on tiny inputs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import provenance, write_csv

import bi_ops  # noqa: F401  (before triton)
from bi_ops import attention
from bi_ops.attention import vllm
from bi_ops.attention.params import AttentionParams
from bi_ops.core import runtime

SEED = 0
TOKENS = 16384
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
HEAD_DIMS = (64, 128, 256)
#: Query heads times head_dim of every case; a key head serves GROUP query heads.
WIDTH, GROUP = 2048, 4
DECODE_BATCHES, DECODE_CONTEXT, PAGE = (1, 16, 64), 8192, 16
#: Every result is computed this often and compared; as often as LONG seconds allow where they allow less, FEW at least.
RERUNS, FEW, LONG = 1000, 5, 3.0
#: Longer sequences, for the memory they take, at this head size only; as is decoding.
LONGEST, MAIN_HEAD_DIM = 32768, 128

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row. kind: fwd, bwd or decode. lengths: of the sequences; when decoding, of their caches."""

    kind: str
    lengths: tuple[int, ...]
    head_dim: int
    heads: int
    kv_heads: int

    @property
    def packed(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def flops(self) -> float:
        passes = 2.5 if self.kind == "bwd" else 1.0
        return passes * sum(4 * n * n for n in self.lengths) / 2 * self.heads * self.head_dim

    @property
    def cache_bytes(self) -> int:
        return sum(self.lengths) * self.kv_heads * self.head_dim * 2 * 2

    def __str__(self) -> str:
        shape = f"packed, longest {max(self.lengths)}" if self.packed else f"{len(self.lengths)} x {self.lengths[0]}"
        return f"{self.kind} d{self.head_dim} {shape}"


def rl_lengths(total: int) -> tuple[int, ...]:
    """Lognormal lengths that sum to `total`, some 20 of them, the same ones every time."""
    draw = torch.Generator().manual_seed(SEED)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        n = total / 27 * math.exp(0.9 * torch.randn((), generator=draw).item())
        lengths.append(min(max(int(n), 1), left))
    return tuple(lengths)


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    for d in args.head_dims:
        heads = (d, WIDTH // d, WIDTH // d // GROUP) if not args.dry else (d, GROUP, 1)
        main = args.dry or d == MAIN_HEAD_DIM
        seqlens = [s for s in args.seqlens if main or s <= LONGEST]
        packed = rl_lengths(args.tokens)
        as_many = (args.tokens // len(packed),) * len(packed)  # equal ones, to compare the packed batch with
        batches = [(s,) * max(args.tokens // s, 1) for s in seqlens] + [as_many, packed]
        yield from (Case(kind, lengths, *heads) for lengths in batches for kind in ("fwd", "bwd"))
        if main:
            yield from (Case("decode", (args.context,) * b, *heads) for b in args.decode_batches)


# --------------------------------------------------------------------------------------------------------------
# timing


def seconds(run: Run, budget: float = 0.05, rounds: int = 5) -> float:
    """Median GPU seconds of one call, from `rounds` rounds of about `budget` seconds each."""
    run()
    if runtime.INTERPRET:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    calls = min(max(int(budget / once), 1), 50)
    # The pause is counted in clock ticks of at most 2 GHz and outlasts the launches it hides.
    pause = int(2e9 * min(1.5 * queued * calls + 2e-4, 0.02))
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pause)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3 / calls)
    return statistics.median(times)


def tried(name: str, prepare: Callable[[], Run]) -> float | None:
    """Seconds of a rival, or None and a line on stderr where it lacks the case."""
    try:
        return seconds(prepare())
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        print(f"  {name}: {str(e).strip().splitlines()[0][:140] if str(e) else type(e).__name__}", file=sys.stderr)
        return None


# --------------------------------------------------------------------------------------------------------------
# inputs and both sides


def cu(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=runtime.default_device())


def random_like(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=runtime.default_device(), dtype=torch.bfloat16)


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v and a cotangent, packed [T, H, D]."""
    torch.manual_seed(SEED)
    total, hkv, d = sum(case.lengths), case.kv_heads, case.head_dim
    return tuple(random_like(total, h, d) for h in (case.heads, hkv, hkv, case.heads))


def step(forward: Callable[..., torch.Tensor], case: Case, q, k, v, g) -> Run:
    """What one call of this pass runs; the backward's forward has run already."""
    if case.kind == "fwd":
        return lambda: forward(q, k, v)
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    out = forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)


def ours(case: Case, q, k, v, g) -> Run:
    cu_seqlens, longest = cu(case.lengths), max(case.lengths)

    def forward(q, k, v):
        return attention.flash_attention(q, k, v, cu_seqlens, max_seqlen=longest, backend="triton")

    return step(forward, case, q, k, v, g)


def sdpa(case: Case, backend: str, q, k, v, g) -> Run:
    """torch's SDPA on [B, H, S, D] views; key heads are repeated beforehand where a backend cannot share them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if case.packed:
        raise NotImplementedError("no packed sequences")
    n = len(case.lengths)
    q, k, v, g = (t.unflatten(0, (n, -1)).transpose(1, 2) for t in (q, k, v, g))

    def forward(q, k, v, gqa=True):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    try:
        forward(q, k, v)
    except RuntimeError:
        k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
        return step(functools.partial(forward, gqa=False), case, q, k, v, g)
    return step(forward, case, q, k, v, g)


def cudnn(case: Case, q, k, v, g) -> Run:
    return sdpa(case, "CUDNN_ATTENTION", q, k, v, g)


def fa2_equal(case: Case, q, k, v, g) -> Run:
    return sdpa(case, "FLASH_ATTENTION", q, k, v, g)


def fa2_packed(case: Case, q, k, v, g) -> Run:
    """The FlashAttention 2 inside torch, on packed sequences."""
    cu_seqlens, longest = cu(case.lengths), max(case.lengths)

    def forward(q, k, v):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False
        )[0]

    return step(forward, case, q, k, v, g)


def fa3(case: Case, q, k, v, g) -> Run:
    """vLLM's FlashAttention 3 as bi_ops calls it: one split."""
    if case.kind == "bwd":
        raise NotImplementedError("vLLM's FlashAttention 3 has no backward")
    cu_seqlens, longest, scale = cu(case.lengths), max(case.lengths), case.head_dim**-0.5
    params = AttentionParams(True, scale)
    return lambda: vllm.forward(q, k, v, cu_seqlens, cu_seqlens, None, longest, longest, params)


def deterministic_cudnn(case: Case) -> float | None:
    """Runs in a process of its own: cuDNN's plans are cached, with or without determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    return tried("cudnn, deterministic", lambda: cudnn(case, *inputs(case)))


# --------------------------------------------------------------------------------------------------------------
# one row


def equal(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),)
    return all(torch.equal(x, y) for x, y in pairs)


def batch_invariant(case: Case, tensors: tuple[torch.Tensor, ...], together: Any) -> bool:
    """Has the last sequence its bits of the whole batch when it is alone?"""
    n = case.lengths[-1]
    alone = Case(case.kind, (n,), case.head_dim, case.heads, case.kv_heads)
    last = tuple(t[-n:] for t in together) if isinstance(together, tuple) else together[-n:]
    return equal(ours(alone, *(t[-n:].clone() for t in tensors))(), last)


def peak_bytes(run: Run) -> int | None:
    """The most memory allocated while `run` runs, inputs and outputs included."""
    if runtime.INTERPRET:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def blank(case: Case) -> dict[str, object]:
    """The columns of every row, in order."""
    return {
        "pass": case.kind,
        "seqlen": max(case.lengths),
        "batch": len(case.lengths),
        "packed": case.packed,
        "head_dim": case.head_dim,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "causal": True,
        **dict.fromkeys([f"{side}_tflops" for side in ("ours", "cudnn", "cudnn_deterministic", "fa2", "fa3")]),
        **dict.fromkeys(["ours_gbs", "fa3_gbs", "roof_gbs", "peak_bytes", "reruns", "reruns_equal", "batch_invariant"]),
    }


def rerun(run: Run, first: Any, time_s: float) -> dict[str, object]:
    """How often `run` was computed again, at `time_s` a time, and whether it gave `first` every time."""
    count = 2 if runtime.INTERPRET else min(max(int(LONG / time_s), FEW), RERUNS)
    return {"reruns": count, "reruns_equal": all(equal(run(), first) for _ in range(count))}


def measure(case: Case, pool: ProcessPoolExecutor) -> dict[str, object]:
    row, tensors = blank(case), inputs(case)
    run = ours(case, *tensors)
    first = run()
    times: dict[str, float | None] = {"ours": seconds(run)}
    row |= rerun(run, first, times["ours"] or 0.0)
    row["batch_invariant"] = batch_invariant(case, tensors, first)
    del first
    row["peak_bytes"] = peak_bytes(run)
    times["cudnn"] = tried("cudnn", lambda: cudnn(case, *tensors))
    if case.kind == "bwd" and times["cudnn"] is not None:
        times["cudnn_deterministic"] = pool.submit(deterministic_cudnn, case).result()
    times["fa2"] = tried("fa2", lambda: (fa2_packed if case.packed else fa2_equal)(case, *tensors))
    times["fa3"] = tried("fa3", lambda: fa3(case, *tensors)) if case.kind == "fwd" else None
    row |= {f"{side}_tflops": round(case.flops / t / 1e12, 1) for side, t in times.items() if t is not None}
    return row


class Decoding:
    """Decoding over pages in random order. Calls take turns over several tables, so that no cache holds their pages."""

    #: bi_ops' own kernels, where vLLM is installed too.
    decode = staticmethod(functools.partial(attention.paged_attention, max_seqlen_q=1, backend="triton"))

    def __init__(self, case: Case):
        torch.manual_seed(SEED)
        device, n = runtime.default_device(), len(case.lengths)
        pages = n * -(-case.lengths[0] // PAGE)
        turns = 1 if runtime.INTERPRET else max(2**28 // case.cache_bytes, 1)
        self.k, self.v = (random_like(turns * pages, PAGE, case.kv_heads, case.head_dim) for _ in range(2))
        self.tables = torch.randperm(turns * pages, device=device).int().view(turns, n, -1)
        self.q, self.scale = random_like(n, case.heads, case.head_dim), case.head_dim**-0.5
        self.cu, self.lengths = cu((1,) * n), torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.turn = itertools.cycle(self.tables)

    def ours(self, table: torch.Tensor | None = None) -> torch.Tensor:
        table = next(self.turn) if table is None else table
        return self.decode(self.q, self.k, self.v, table, self.cu, self.lengths)

    def alone(self) -> torch.Tensor:
        """The last row, without the others."""
        table, one = self.tables[0][-1:], cu((1,))
        return self.decode(self.q[-1:], self.k, self.v, table, one, self.lengths[-1:])

    def fa3(self) -> torch.Tensor:
        table = next(self.turn)
        most = table.shape[1] * PAGE
        params = AttentionParams(True, self.scale)
        return vllm.forward(self.q, self.k, self.v, self.cu, self.lengths, table, 1, most, params)[0]


def measure_decode(case: Case, roof: float) -> dict[str, object]:
    row, decoding = blank(case), Decoding(case)
    first = decoding.ours(decoding.tables[0])
    times: dict[str, float | None] = {"ours": seconds(decoding.ours)}
    row |= rerun(lambda: decoding.ours(decoding.tables[0]), first, times["ours"] or 0.0)
    row["batch_invariant"] = equal(decoding.alone(), first[-1:])
    row["peak_bytes"] = peak_bytes(decoding.ours)
    times["fa3"] = tried("fa3", lambda: decoding.fa3)
    row |= {f"{side}_gbs": round(case.cache_bytes / t / 1e9, 1) for side, t in times.items() if t is not None}
    row["roof_gbs"] = roof
    return row


def copy_rate(size: int) -> float:
    """GB/s of copying `size` bytes on the device, read and written."""
    a = torch.empty(size, dtype=torch.uint8, device=runtime.default_device()).random_()
    b = torch.empty_like(a)
    return round(2 * size / seconds(lambda: b.copy_(a)) / 1e9, 1)


# --------------------------------------------------------------------------------------------------------------
# the run


def warm(case: Case) -> None:
    """Compile what `case` launches into Triton's disk cache."""
    if case.kind == "decode":
        Decoding(case).ours()
    else:
        ours(case, *inputs(case))()


def warm_all(cases: list[Case], workers: int) -> None:
    """Compile every kernel the cases need, in parallel, on short sequences."""
    short = {Case(c.kind, (192,) * (1 if c.kind != "decode" else 2), c.head_dim, c.heads, c.kv_heads) for c in cases}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, sorted(short, key=str)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that attention.csv is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a batch; longer sequences come alone")
    parser.add_argument("--context", type=int, default=DECODE_CONTEXT, help="keys per sequence when decoding")
    parser.add_argument("--decode-batches", type=int, nargs="*", default=DECODE_BATCHES)
    parser.add_argument("--quick", action="store_true", help="head_dim 128 at 2k and 8k, decode at 64: a smoke test")
    parser.add_argument("--dry", action="store_true", help="tiny inputs in Triton's interpreter; figures mean nothing")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile kernels beforehand; 0: none")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this in Triton's interpreter")
    if args.quick:
        args.head_dims, args.seqlens, args.decode_batches = (128,), (2048, 8192), (64,)
    if args.dry:
        args.head_dims, args.seqlens, args.decode_batches, args.workers = (32,), (32, 64), (1, 2), 0
        args.tokens, args.context = 128, 64

    began = time.perf_counter()
    cases = list(all_cases(args))
    if args.workers:
        warm_all(cases, args.workers)
    print(f"{len(cases)} cases; kernels ready after {time.perf_counter() - began:.0f} s")
    record = provenance(args.commit)
    roof = copy_rate(2**20 if args.dry else 2**30)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case in cases:
            row = measure_decode(case, roof) if case.kind == "decode" else measure(case, pool)
            rows.append(row | record)
            write_csv(args.out / "attention.csv", rows)
            figures = {k: v for k, v in row.items() if v is not None and k.endswith(("tflops", "gbs"))}
            ok = row["reruns_equal"] and row["batch_invariant"]
            print(f"{case!s:32} {'' if ok else 'BITS DIFFER '}{figures}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if all(r["reruns_equal"] and r["batch_invariant"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
