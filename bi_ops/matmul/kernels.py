"""The GEMM kernel. One program owns one output tile and walks K front to back: no split-K, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, dot, widen


@triton.jit
def _tile_of(pid, n_tiles_m, n_tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column) of a program. Neighbours share rows of A and columns of B in L2: GROUP_M tile rows are
    walked column by column."""
    i_group = pid // (GROUP_M * n_tiles_n)
    first_m = i_group * GROUP_M
    rows_in_group = min(n_tiles_m - first_m, GROUP_M)
    i_m = first_m + (pid % (GROUP_M * n_tiles_n)) % rows_in_group
    return i_m, (pid % (GROUP_M * n_tiles_n)) // rows_in_group


# M is the batch: a new one must not compile a new kernel.
@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    p_a,  # [B, M, K]
    p_b,  # [B, K, N]
    p_bias,  # [N], added to the fp32 accumulator
    p_c,  # [B, M, N]
    M,
    N,
    K,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_cb,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # C is fp32 and where the accumulator starts
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no mask
    EVEN_M: tl.constexpr,  # M is a multiple of BLOCK_M, and A is loaded along it
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N, and B is loaded along it
    LARGE: tl.constexpr,  # of some operand offsets need 64 bits
):
    pid = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)

    i_m, i_n = _tile_of(pid, tl.cdiv(widen(M, LARGE), BLOCK_M), tl.cdiv(widen(N, LARGE), BLOCK_N), GROUP_M)
    o_m = widen(i_m, LARGE) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = widen(i_n, LARGE) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    # Rows past the end read row 0 and are not stored: the loads then need a mask over K alone. `where` hides from the
    # compiler that offsets are contiguous, so operands that are loaded along M or N do without it where no row is past.
    a_m = o_m if EVEN_M else tl.where(m_m, o_m, 0)
    b_n = o_n if EVEN_N else tl.where(m_n, o_n, 0)

    p_a += i_b * stride_ab
    p_b += i_b * stride_bb
    m_out = m_m[:, None] & m_n[None, :]
    p_out = p_c + i_b * stride_cb + o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    if ACCUMULATE:
        acc = tl.load(p_out, mask=m_out, other=0.0)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, widen(K, LARGE), BLOCK_K):
        o_k = k + widen(tl.arange(0, BLOCK_K), LARGE)
        m_k = o_k < K
        p_at = p_a + a_m[:, None] * stride_am + o_k[None, :] * stride_ak
        p_bt = p_b + o_k[:, None] * stride_bk + b_n[None, :] * stride_bn
        if EVEN_K:
            b_a = tl.load(p_at)
            b_b = tl.load(p_bt)
        else:
            b_a = tl.load(p_at, mask=m_k[None, :], other=0.0)
            b_b = tl.load(p_bt, mask=m_k[:, None], other=0.0)
        acc = dot(b_a, b_b, acc)

    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out, cast(acc, p_c.dtype.element_ty), mask=m_out)


@triton.jit
def _segments(
    p_a,
    p_b,
    m_a,
    m_b,
    K_0,
    K_1,
    K_2,
    stride_ak,
    stride_bk,
    first,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    LARGE: tl.constexpr,
):
    """The sum of the COUNT segments from `first` on, a whole subtree. m_a: [BLOCK_M, 1], m_b: [1, BLOCK_N], offsets."""
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        left = _segments(
            *(p_a, p_b, m_a, m_b, K_0, K_1, K_2, stride_ak, stride_bk),
            *(first, HALF, SEGMENTS, PARTS, BLOCK_K, EVEN_K, LARGE),
        )
        right = _segments(
            *(p_a, p_b, m_a, m_b, K_0, K_1, K_2, stride_ak, stride_bk),
            *(first + HALF, HALF, SEGMENTS, PARTS, BLOCK_K, EVEN_K, LARGE),
        )
        return left + right
    else:
        acc = tl.zeros((m_a.shape[0], m_b.shape[1]), dtype=tl.float32)
        start = 0
        for part in tl.static_range(PARTS):
            if part == 0:
                n_k = K_0
            elif part == 1:
                n_k = K_1
            else:
                n_k = K_2
            # The trip count is no constant, so the compiler keeps the loop: of a single step it would make `left` the
            # accumulator.
            for k in range(0, widen(n_k, LARGE), BLOCK_K):
                o_k = k + widen(tl.arange(0, BLOCK_K), LARGE)
                at = start + first * widen(n_k, LARGE) + o_k
                p_at = p_a + m_a + at[None, :] * stride_ak
                p_bt = p_b + at[:, None] * stride_bk + m_b
                if EVEN_K:
                    b_a = tl.load(p_at)
                    b_b = tl.load(p_bt)
                else:
                    b_a = tl.load(p_at, mask=o_k[None, :] < n_k, other=0.0)
                    b_b = tl.load(p_bt, mask=o_k[:, None] < n_k, other=0.0)
                acc = dot(b_a, b_b, acc)
            start += SEGMENTS * widen(n_k, LARGE)
        return acc


@triton.jit(do_not_specialize=["M"])
def matmul_segments_kernel(
    p_a,  # [M, K]
    p_b,  # [K, N]
    p_c,  # [M, N], contiguous
    p_parked,  # [programs, log2(SEGMENTS // KEPT), BLOCK_M, BLOCK_N], fp32
    M,
    N,
    K_0,
    K_1,
    K_2,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two
    KEPT: tl.constexpr,  # segments that are added in registers; of a larger subtree the left half waits in memory
    LOG2_GROUPS: tl.constexpr,  # of SEGMENTS // KEPT
    PARTS: tl.constexpr,  # of K, up to 3: a segment has K_0, K_1, K_2 elements of each
    EVEN_K: tl.constexpr,  # these are multiples of BLOCK_K: no mask
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N, and B is loaded along it
    LARGE: tl.constexpr,  # of some operand offsets need 64 bits
):
    """Each segment of K in an accumulator of its own, from zero; these are added pairwise and rounded once."""
    n_m, n_n = tl.cdiv(widen(M, LARGE), BLOCK_M), tl.cdiv(widen(N, LARGE), BLOCK_N)
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    GROUPS: tl.constexpr = 1 << LOG2_GROUPS
    p_parked += tl.program_id(0).to(tl.int64) * (LOG2_GROUPS * SIZE)
    o_parked = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for tile in range(tl.program_id(0), n_m * n_n, tl.num_programs(0)):
        i_m, i_n = _tile_of(tile, n_m, n_n, GROUP_M)
        o_m = widen(i_m, LARGE) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = widen(i_n, LARGE) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m = o_m < M
        m_n = o_n < N
        a_m = tl.where(m_m, o_m, 0)  # as in `matmul_kernel`
        b_n = o_n if EVEN_N else tl.where(m_n, o_n, 0)
        m_a, m_b = a_m[:, None] * stride_am, b_n[None, :] * stride_bn
        for group in range(GROUPS):
            total = _segments(
                *(p_a, p_b, m_a, m_b, K_0, K_1, K_2, stride_ak, stride_bk),
                *(group * KEPT, KEPT, SEGMENTS, PARTS, BLOCK_K, EVEN_K, LARGE),
            )
            # As a counter carries: level by level the left halves of the subtrees that end with this group.
            p_left = p_parked
            for level in tl.static_range(LOG2_GROUPS):
                if (group + 1) % (2 << level) == 0:
                    tl.debug_barrier()  # other threads may load what these have stored
                    total = tl.load(p_left + o_parked) + total
                    p_left += SIZE
            if group == GROUPS - 1:
                p_out = p_c + o_m[:, None] * widen(N, LARGE) + o_n[None, :]
                tl.store(p_out, cast(total, p_c.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
            else:
                tl.debug_barrier()  # all have loaded what was here
                tl.store(p_left + o_parked, total)
