"""New keys and values to the pages of a KV cache: a copy, by slots."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl


@triton.jit(do_not_specialize=["n_slots", "prefetch"])
def write_cache_kernel(
    p_k,  # [T, HKV, D]
    p_v,
    p_k_cache,  # [blocks, page, HKV, D]
    p_v_cache,
    p_slots,  # [T] int: block * page + place in the block; less than 0: the token has none
    n_slots,  # of the cache
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kb,  # from block to block of the cache, from token to token, from head to head
    stride_kn,
    stride_kc,
    stride_vb,
    stride_vn,
    stride_vc,
    prefetch,  # of `core.pdl`: the slots are constant
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program copies K and V of one token."""
    pdl.begin(prefetch, PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + token).to(tl.int64)
    pdl.begin_after_loads(PDL)
    if (slot >= 0) & (slot < n_slots):
        block, place = slot // PAGE, slot % PAGE
        o = tl.arange(0, BLOCK)
        head, column, m = (o // D).to(tl.int64), o % D, o < HKV * D
        b_k = tl.load(p_k + token * stride_kt + head * stride_kh + column, mask=m)
        b_v = tl.load(p_v + token * stride_vt + head * stride_vh + column, mask=m)
        tl.store(p_k_cache + block * stride_kb + place * stride_kn + head * stride_kc + column, b_k, mask=m)
        tl.store(p_v_cache + block * stride_vb + place * stride_vn + head * stride_vc + column, b_v, mask=m)
