"""Decoding over pages, many short sequences and a few long ones: how many CTAs to an SM, against FlashAttention 3.

    python bench/decode_attention.py --out bench/results/h200 [--batches 64 256] [--keys 64 128 512]

Writes decode_attention.csv, a row for heads, sequences and keys: microseconds of the GPU a call, medians of a CUDA
graph of calls whose pages are not in L2. Sequences are all as long; or of random lengths up to twice that, mixed or the
longest first. Every config has to have the bits of the Triton kernel. Stock is vLLM's, its schedule made ahead and with
as many splits as a CUDA graph of vLLM has; it needs vLLM. `bytes_us` is the time that keys and values take at 4.2 TB/s.
`--dry` compares bits in Triton's interpreter; nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops.attention import config, launch, order_of
from bi_ops.attention.config import DecodeConfig
from bi_ops.attention.order import KeySteps
from bi_ops.attention.params import AttentionParams
from bi_ops.core import arch as arches

PAGE, HEAD_DIM, CALLS, SPLITS = 16, 128, 28, 32
HEADS = ((16, 8), (32, 8))  # Qwen3's 0.6B and 1.7B; 4B and 8B
COPY = 600e6  # bytes of keys and values that are read before any is read again
LENGTHS = ("equal", "mixed", "longest first")
CONFIGS = {"one_us": DecodeConfig(4), "two_us": DecodeConfig(3, 2)}

#: q, keys, values, cu_q, lengths, and tables of disjoint pages
Pages = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


def lengths_of(n: int, keys: int, kind: str) -> torch.Tensor:
    """int32 [n], even, with a mean of `keys`."""
    if kind == LENGTHS[0]:
        return torch.full((n,), keys, dtype=torch.int32)
    half = torch.randint(1, 2 * keys, (n // 2,), generator=torch.Generator().manual_seed(keys), dtype=torch.int32)
    lengths = torch.cat([half, 2 * keys - half])
    return lengths if kind == LENGTHS[1] else lengths.sort(descending=True).values


def pages_of(lengths: torch.Tensor, heads: int, kv_heads: int, device: str, tables: int) -> Pages:
    """vLLM's cache [blocks, Hkv, PAGE, 2 * D], seen as keys and as values, and one new token a sequence."""
    n, each = len(lengths), -(-int(lengths.max()) // PAGE)
    place = 1 + torch.randperm(tables * n * each, device=device).int().view(tables, n, each)
    cache = torch.empty((1 + place.numel(), kv_heads, PAGE, 2 * HEAD_DIM), device=device, dtype=torch.bfloat16)
    k, v = cache.normal_().transpose(1, 2).split(HEAD_DIM, dim=-1)
    q = torch.randn(n, heads, HEAD_DIM, device=device).bfloat16()
    cu = torch.arange(n + 1, device=device, dtype=torch.int32)
    return q, k, v, cu, lengths.to(device), list(place)


def _order(dtype: torch.dtype) -> KeySteps:
    order = order_of(HEAD_DIM, dtype, backend="triton").forward
    assert isinstance(order, KeySteps)
    return order


def by_bi_ops(p: Pages, i: int, c: object) -> torch.Tensor:
    """A call as a CUDA graph of vLLM holds it: any split of the tokens; c: None for the config that is chosen."""
    q, k, v, cu, lengths, tables = p
    order, arch = _order(q.dtype), arches.of(q.device)
    params = AttentionParams(True, HEAD_DIM**-0.5)
    given = (q, k, v, tables[i % len(tables)], cu, lengths, None, params, None, order, arch)
    return launch.paged_forward(*given, c, constant_metadata=True)  # type: ignore[arg-type]


def by_vllm(p: Pages, keys: int) -> Callable[[int], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    q, k, v, cu, lengths, tables = p
    out, window = torch.empty_like(q), (-1, -1)
    schedule = get_scheduler_metadata(
        *(len(lengths), 1, keys, q.shape[1], k.shape[2], HEAD_DIM, lengths),
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu,
        page_size=PAGE,
        causal=True,
        window_size=window,
        num_splits=SPLITS,
    )
    call = partial(flash_attn_varlen_func, q=q, k=k, v=v, out=out, cu_seqlens_q=cu, max_seqlen_q=1, seqused_k=lengths)
    call = partial(call, max_seqlen_k=keys, softmax_scale=HEAD_DIM**-0.5, causal=True, window_size=list(window))
    call = partial(call, scheduler_metadata=schedule, fa_version=3, num_splits=SPLITS)
    return lambda i: call(block_table=tables[i % len(tables)])


def timed(calls: dict[str, Callable[[int], object]], rounds: int = 9) -> dict[str, float]:
    """Microseconds a call of each side, in turns."""
    graphs = {}
    for name, call in calls.items():
        call(0)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(CALLS):
                call(i)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, graph) in itertools.product(range(rounds), graphs.items()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken[name].append(start.elapsed_time(end) * 1e3 / CALLS)
    return {name: round(sorted(ts)[len(ts) // 2], 2) for name, ts in taken.items()}


def equal_bits(p: Pages, configs: list[object]) -> bool:
    """Have the configs the bits of the Triton kernel?"""
    q, order, arch = p[0], _order(p[0].dtype), arches.of(p[0].device)
    rows, pairs = q.shape[1] // p[1].shape[2], len(p[4]) * p[1].shape[2]
    want = by_bi_ops(p, 0, config.forward(rows, 1 if arch.interpreted else pairs, HEAD_DIM, q.dtype, order, arch))
    return all(torch.equal(by_bi_ops(p, 0, c), want) for c in configs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that decode_attention.csv is written to")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--keys", nargs="+", type=int, default=[64, 128, 256, 512, 2048])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        assert equal_bits(pages_of(lengths_of(2, 40, LENGTHS[1]), 4, 2, "cpu", 1), [None])
        print("dry run done")
        return 0
    if args.out is None:
        parser.error("--out is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    rows: list[dict[str, object]] = []
    begun = time.monotonic()
    cells = itertools.product(HEADS, args.batches[::-1], args.keys, args.lengths)
    for (heads, kv_heads), n, keys, lengths in cells:
        n_bytes = 2 * n * keys * kv_heads * HEAD_DIM * 2
        if n_bytes > COPY:
            continue
        of = lengths_of(n, keys, lengths)
        p = pages_of(of, heads, kv_heads, "cuda", min(CALLS, max(1, int(COPY // n_bytes))))
        calls: dict[str, Callable[[int], object]] = {
            name: partial(lambda i, c, p: by_bi_ops(p, i, c), c=c, p=p) for name, c in CONFIGS.items()
        }
        calls["chosen_us"] = partial(lambda i, p: by_bi_ops(p, i, None), p=p)
        try:
            stock = by_vllm(p, int(of.max()))
            stock(0)
            calls["stock_us"] = stock
        except (ImportError, AttributeError, RuntimeError, TypeError) as e:  # no vLLM, or a release that was not seen
            print("no stock side:", repr(e)[:300])
        row: dict[str, object] = {"heads": heads, "kv_heads": kv_heads, "batch": n, "keys": keys, "lengths": lengths}
        row["stock_us"] = ""
        row |= timed(calls) | {"bytes_us": round(n_bytes / 4.2e6, 2), "bits_equal": equal_bits(p, [*CONFIGS.values()])}
        rows.append(row | about)
        print(f"[{time.monotonic() - begun:5.1f} s]", row, flush=True)
        write_csv(args.out / "decode_attention.csv", rows)
        del p, calls
    ok = all(r["bits_equal"] for r in rows)
    print("bits", "hold" if ok else "DIFFER")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
