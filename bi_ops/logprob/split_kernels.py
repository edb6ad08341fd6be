"""Long rows, each spread over many CTAs, with the bits of `kernels.softmax_stats`.

The maximum has no order. Chunks of BLOCK columns are summed each by itself, as there, and the CTA that is done last
adds the sums front to back. A row of 152k logits takes one CTA a tenth of a millisecond, mostly waiting for memory.
For logits of 16 bits: see `config.token_config`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import widen


@triton.jit(do_not_specialize=["PARTS"])
def row_part_max_kernel(
    p_x,  # [R, N]
    p_part_max,  # [R, PARTS] fp32
    p_done,  # [R] int32
    p_ranks,  # [R] int64, or None
    N,
    stride_x,
    PARTS,
    CHUNKS: tl.constexpr,  # of BLOCK columns in a part
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
    PDL: tl.constexpr,
):
    """The maximum of each part of a row, and zeros to count from; a program per (row, part)."""
    pdl.begin(0, PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        tl.store(p_done + row, 0)
        if p_ranks is not None:
            tl.store(p_ranks + row, 0)
    largest = tl.full([1, BLOCK], float("-inf"), dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        o_c = (widen(part, LARGE) * CHUNKS + i) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + row * stride_x + o_c[None, :], mask=(o_c < N)[None, :], other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, b_x)
    tl.store(p_part_max + row * PARTS + part + tl.arange(0, 1), tl.max(largest, axis=1))


@triton.jit
def _row_max(p_part_max, row, PARTS, PARTS_2: tl.constexpr):
    parts = tl.arange(0, PARTS_2)
    return tl.max(tl.load(p_part_max + row * PARTS + parts, mask=parts < PARTS, other=float("-inf")), axis=0)


@triton.jit(do_not_specialize=["PARTS", "N_CHUNKS"])
def row_token_logprobs_kernel(
    p_x,  # [R, N]
    p_ids,  # [R] int64
    p_part_max,  # [R, PARTS] fp32
    p_sums,  # [R, N_CHUNKS] fp32
    p_done,  # [R] int32, 0
    p_out,  # [R] fp32
    p_max,  # [R] fp32
    p_lse,  # [R] fp32, log(sum(exp(x - max)))
    p_ranks,  # [R] int64, 0, or None
    N,
    stride_x,
    PARTS,
    N_CHUNKS,
    CHUNKS: tl.constexpr,  # of BLOCK columns in a part
    BLOCK: tl.constexpr,
    PARTS_2: tl.constexpr,  # PARTS, rounded up to a power of two
    AHEAD: tl.constexpr,  # sums that are loaded before the first of them is added
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
    PDL: tl.constexpr,
):
    """out = x[id] - max - lse; NaN for an id outside [0, N). rank: how many x are not below x[id].

    A program per (row, part); that which is done last with a row adds its sums.
    """
    pdl.begin(0, PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_max = _row_max(p_part_max, row, PARTS, PARTS_2)
    o_r = row + tl.arange(0, 1)
    b_id = tl.load(p_ids + o_r)
    known = (b_id >= 0) & (b_id < N)
    chosen = tl.load(p_x + row * stride_x + b_id, mask=known, other=float("nan")).to(tl.float32)
    not_below = tl.zeros([1, BLOCK], dtype=tl.int32)
    for i in tl.static_range(CHUNKS):
        chunk = widen(part, LARGE) * CHUNKS + i
        o_c = chunk * BLOCK + tl.arange(0, BLOCK)
        m = (o_c < N)[None, :]
        b_x = tl.load(p_x + row * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_sum = tl.sum(tl.where(m, tl.exp(b_x - row_max), 0.0), axis=1)
        o_chunk = chunk + tl.arange(0, 1)
        tl.store(p_sums + row * N_CHUNKS + o_chunk, b_sum, mask=o_chunk < N_CHUNKS)
        if p_ranks is not None:
            not_below += (m & (b_x >= chosen[:, None])).to(tl.int32)
    if p_ranks is not None:
        tl.atomic_add(p_ranks + o_r, tl.sum(not_below, axis=1).to(tl.int64), sem="relaxed")

    tl.debug_barrier()  # every thread has stored its sums before one says so
    done = tl.atomic_add(p_done + row, 1, sem="acq_rel")
    if done == PARTS - 1:
        total = tl.zeros([1], dtype=tl.float32)
        for start in range(0, N_CHUNKS, AHEAD):
            for i in tl.static_range(AHEAD):
                o_chunk = start + i + tl.arange(0, 1)
                p_sum = p_sums + row * N_CHUNKS + o_chunk
                total += tl.load(p_sum, mask=o_chunk < N_CHUNKS, other=0.0, cache_modifier=".cg")
        lse = tl.log(total)
        tl.store(p_out + o_r, chosen - row_max - lse)
        tl.store(p_max + o_r, row_max + tl.zeros([1], dtype=tl.float32))
        tl.store(p_lse + o_r, lse)
