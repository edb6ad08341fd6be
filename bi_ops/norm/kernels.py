"""RMS normalisation kernels. The forward has the order of vLLM's `_rms_norm_kernel`, so its bits are the same.

Row r is head r % H of token r // H, so that heads inside a fused projection are read where they are; H is 1 where one
stride leads from row to row. A tile [ROWS or CHUNKS, BLOCK] is either several rows of one chunk or one row's chunks of
BLOCK columns, each summed by one tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast, sum_front_to_back, widen

#: Chunks of one column that lie side by side in the partial sums of dweight: 16 bytes, one load of a thread.
GROUP = tl.constexpr(4)


@triton.jit
def _tile(start, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    """Rows and columns of this program's tile, the columns counted from `start`."""
    o_r = widen(tl.program_id(0), LARGE) * ROWS + tl.arange(0, ROWS)
    o_c = widen(start, LARGE) + tl.arange(0, BLOCK)[None, :]
    if CHUNKS > 1:
        o_c += (tl.arange(0, CHUNKS) * BLOCK)[:, None]
    return o_r, o_c


@triton.jit
def row_start(o_r, H, stride_t, stride_h):
    """[.., 1], where row o_r starts."""
    return ((o_r // H).to(tl.int64) * stride_t + (o_r % H).to(tl.int64) * stride_h)[:, None]


@triton.jit
def row_sum(b, CHUNKS: tl.constexpr):
    """Sum of each row of the tile: a tree inside a chunk, the chunks front to back."""
    b_sum = tl.sum(b, axis=1)
    if CHUNKS > 1:
        b_sum = sum_front_to_back(b_sum, CHUNKS)
    return b_sum


@triton.jit
def load_weight(p_w, o_c, N, other, dtype: tl.constexpr):
    """Weights of these columns, rounded to `dtype`, as fp32."""
    return cast(tl.load(p_w + o_c, mask=o_c < N, other=other), dtype).to(tl.float32)


@triton.jit
def _weight(
    p_w, start, N, other, dtype: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """The weights of the tile's columns. One row of them is loaded as such: as a tile of its own it could turn the
    tile of x to another layout, and with that the tree of the sums to another one. 1.0 if none."""
    if HAS_WEIGHT:
        o_c = start + tl.arange(0, BLOCK)
        if CHUNKS > 1:
            o_c = (tl.arange(0, CHUNKS) * BLOCK)[:, None] + o_c[None, :]
        b_w = load_weight(p_w, o_c, N, other, dtype)
        if CHUNKS == 1:
            b_w = b_w[None, :]
    else:
        b_w = tl.full([1, 1], 1.0, tl.float32)
    return b_w


@triton.jit
def _load_x(
    p_x, p_residual, p_sum, o_r, o_c, R, N, H, stride_xt, stride_xh, stride_rt, stride_rh, HAS_RESIDUAL: tl.constexpr
):
    """What is normalised, as fp32: x, or x + residual, which is rounded and stored."""
    m = (o_r < R)[:, None] & (o_c < N)
    b_x = tl.load(p_x + row_start(o_r, H, stride_xt, stride_xh) + o_c, mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_res = tl.load(p_residual + row_start(o_r, H, stride_rt, stride_rh) + o_c, mask=m, other=0.0)
        b_sum = cast(b_x + b_res.to(tl.float32), p_sum.dtype.element_ty)
        tl.store(p_sum + row_start(o_r, 1, N, 0) + o_c, b_sum, mask=m)
        b_x = b_sum.to(tl.float32)
    return b_x


@triton.jit
def squares(b_x, o_r, o_c, R, N):
    return tl.where((o_r < R)[:, None] & (o_c < N), b_x * b_x, 0.0)


@triton.jit
def _store_y(p_y, b_w, b_x, rstd, o_r, o_c, R, N):
    b_y = cast(b_x * rstd[:, None] * b_w, p_y.dtype.element_ty)
    tl.store(p_y + row_start(o_r, 1, N, 0) + o_c, b_y, mask=(o_r < R)[:, None] & (o_c < N))


@triton.jit(do_not_specialize=["R", "prefetch"])
def rms_norm_kernel(
    p_x,  # [R, N]
    p_residual,  # [R, N] or None: added to x, rounded, before the norm
    p_w,  # [N] or None
    p_y,  # [R, N], contiguous
    p_sum,  # [R, N], contiguous, x + residual
    p_rstd,  # [R] fp32, 1 / rms
    R,
    N,
    H,
    eps,
    stride_xt,  # from token to token
    stride_xh,  # from head to head
    stride_rt,  # the residual's
    stride_rh,
    prefetch,  # of `core.pdl`: the weight is constant
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,  # 0: too many to hold, so the row is read twice, chunk by chunk
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LARGE: tl.constexpr,  # there are too many rows or columns for 32 bits
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = p_y.dtype.element_ty
    pdl.begin(prefetch, PDL)
    o_r, o_c = _tile(0, ROWS, CHUNKS, BLOCK, LARGE)
    if CHUNKS > 0:  # a cold weight takes as long as the rest, so it is asked for first
        b_w = _weight(p_w, 0, N, 1.0, dtype, CHUNKS, BLOCK, HAS_WEIGHT)
    pdl.begin_after_loads(PDL)
    if CHUNKS > 0:
        b_x = _load_x(
            p_x, p_residual, p_sum, o_r, o_c, R, N, H, stride_xt, stride_xh, stride_rt, stride_rh, HAS_RESIDUAL
        )
        sum_sq = row_sum(squares(b_x, o_r, o_c, R, N), CHUNKS)
    else:
        sum_sq = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, widen(N, LARGE), BLOCK):
            o_r, o_c = _tile(start, ROWS, 1, BLOCK, LARGE)
            b_x = _load_x(
                p_x, p_residual, p_sum, o_r, o_c, R, N, H, stride_xt, stride_xh, stride_rt, stride_rh, HAS_RESIDUAL
            )
            sum_sq += row_sum(squares(b_x, o_r, o_c, R, N), 1)

    # eps may arrive as fp64 from a compiled caller: pinned, so that the bits do not depend on who calls.
    rstd = 1.0 / tl.sqrt(sum_sq / N + tl.cast(eps, tl.float32))
    tl.store(p_rstd + o_r, rstd, mask=o_r < R)

    if CHUNKS > 0:
        _store_y(p_y, b_w, b_x, rstd, o_r, o_c, R, N)
    else:
        for start in range(0, widen(N, LARGE), BLOCK):
            o_r, o_c = _tile(start, ROWS, 1, BLOCK, LARGE)
            if HAS_RESIDUAL:
                b_x = _load_x(p_sum, None, None, o_r, o_c, R, N, 1, N, 0, 0, 0, False)
            else:
                b_x = _load_x(p_x, None, None, o_r, o_c, R, N, H, stride_xt, stride_xh, 0, 0, False)
            b_w = _weight(p_w, start, N, 1.0, dtype, 1, BLOCK, HAS_WEIGHT)
            _store_y(p_y, b_w, b_x, rstd, o_r, o_c, R, N)


@triton.jit
def _load_g(p_g, o_r, o_c, R, N, H, stride_t, stride_h):
    m = (o_r < R)[:, None] & (o_c < N)
    return tl.load(p_g + row_start(o_r, H, stride_t, stride_h) + o_c, mask=m, other=0.0).to(tl.float32)


@triton.jit
def dx_of(b_g, b_gsum, b_w, b_x, rstd, minus_mean, HAS_SUM: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """rstd * (g*w - xhat * mean) + gsum. Which product of a difference is rounded is said here: left to the compiler,
    it would depend on whether g * w is still in a register."""
    b_xhat = b_x * rstd
    if HAS_WEIGHT:
        b_dx = tl.fma(b_g, tl.broadcast_to(b_w, b_g.shape), b_xhat * minus_mean)
    else:
        b_dx = tl.fma(b_xhat, tl.broadcast_to(minus_mean, b_g.shape), b_g)
    if HAS_SUM:
        b_dx = tl.fma(b_dx, tl.broadcast_to(rstd, b_g.shape), b_gsum)
    else:
        b_dx = b_dx * rstd
    return b_dx


@triton.jit
def dx_of_held(b_g, b_gsum, b_w, b_x, rstd, N, CHUNKS: tl.constexpr, HAS_SUM: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """dx of whole rows. rstd: [rows, 1]."""
    dot = row_sum((b_g * b_w) * (b_x * rstd), CHUNKS)
    minus_mean = (dot / N)[:, None] * -1.0  # not -mean, which is 0 - mean: another sign of zero
    return dx_of(b_g, b_gsum, b_w, b_x, rstd, minus_mean, HAS_SUM, HAS_WEIGHT)


@triton.jit
def _store_dx(p_dx, b_dx, o_r, o_c, R, N):
    m = (o_r < R)[:, None] & (o_c < N)
    tl.store(p_dx + row_start(o_r, 1, N, 0) + o_c, cast(b_dx, p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["R"])
def rms_norm_dx_kernel(
    p_g,  # [R, N], gradient of y
    p_gsum,  # [R, N] or None: gradient that reaches x + residual directly
    p_x,  # [R, N], what was normalised
    p_w,  # [N] or None
    p_rstd,  # [R] fp32
    p_dx,  # [R, N], contiguous
    R,
    N,
    H,
    stride_gt,
    stride_gh,
    stride_st,  # gsum's
    stride_sh,
    stride_xt,
    stride_xh,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,  # as in rms_norm_kernel
    BLOCK: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LARGE: tl.constexpr,  # there are too many rows or columns for 32 bits
):
    """dx = rstd * (g*w - xhat * mean(g*w*xhat)) with xhat = x * rstd."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    o_r, o_c = _tile(0, ROWS, CHUNKS, BLOCK, LARGE)
    rstd = tl.load(p_rstd + o_r, mask=o_r < R, other=0.0)[:, None]

    if CHUNKS > 0:
        b_g = _load_g(p_g, o_r, o_c, R, N, H, stride_gt, stride_gh)
        b_x = _load_x(p_x, None, None, o_r, o_c, R, N, H, stride_xt, stride_xh, 0, 0, False)
        b_w = _weight(p_w, 0, N, 0.0, dtype, CHUNKS, BLOCK, HAS_WEIGHT)
        b_gsum = b_g
        if HAS_SUM:  # before the sum, whose end would hold it up
            b_gsum = _load_g(p_gsum, o_r, o_c, R, N, H, stride_st, stride_sh)
        b_dx = dx_of_held(b_g, b_gsum, b_w, b_x, rstd, N, CHUNKS, HAS_SUM, HAS_WEIGHT)
        _store_dx(p_dx, b_dx, o_r, o_c, R, N)
    else:
        dot = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, widen(N, LARGE), BLOCK):
            o_r, o_c = _tile(start, ROWS, 1, BLOCK, LARGE)
            b_g = _load_g(p_g, o_r, o_c, R, N, H, stride_gt, stride_gh)
            b_x = _load_x(p_x, None, None, o_r, o_c, R, N, H, stride_xt, stride_xh, 0, 0, False)
            b_w = _weight(p_w, start, N, 0.0, dtype, 1, BLOCK, HAS_WEIGHT)
            dot += row_sum((b_g * b_w) * (b_x * rstd), 1)
        minus_mean = (dot / N)[:, None] * -1.0  # as in `dx_of_held`
        for start in range(0, widen(N, LARGE), BLOCK):
            o_r, o_c = _tile(start, ROWS, 1, BLOCK, LARGE)
            b_g = _load_g(p_g, o_r, o_c, R, N, H, stride_gt, stride_gh)
            b_x = _load_x(p_x, None, None, o_r, o_c, R, N, H, stride_xt, stride_xh, 0, 0, False)
            b_w = _weight(p_w, start, N, 0.0, dtype, 1, BLOCK, HAS_WEIGHT)
            b_gsum = b_g
            if HAS_SUM:
                b_gsum = _load_g(p_gsum, o_r, o_c, R, N, H, stride_st, stride_sh)
            b_dx = dx_of(b_g, b_gsum, b_w, b_x, rstd, minus_mean, HAS_SUM, HAS_WEIGHT)
            _store_dx(p_dx, b_dx, o_r, o_c, R, N)


@triton.jit
def store_partial(p_partial, b, o_i, o_c, C, N, LARGE: tl.constexpr):
    """The sums of chunks o_i, GROUP of them next to each other."""
    o_partial = (o_i // GROUP).to(tl.int64)[:, None] * (widen(N, LARGE) * GROUP) + o_c * GROUP + (o_i % GROUP)[:, None]
    tl.store(p_partial + o_partial, b, mask=(o_i < C)[:, None] & (o_c < N))


@triton.jit(do_not_specialize=["R"])
def rms_norm_dweight_kernel(
    p_g,  # [R, N]
    p_x,  # [R, N]
    p_rstd,  # [R] fp32
    p_partial,  # [C / GROUP, N, GROUP] fp32
    R,
    C,  # chunks, with those past the end, whose sums are 0.0; a multiple of GROUP
    N,
    H,
    stride_gt,
    stride_gh,
    stride_xt,
    stride_xh,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,
):
    """partial of chunk i = g * xhat of rows i * CHUNK and on, added front to back; ROWS chunks side by side."""
    o_i = widen(tl.program_id(0), LARGE) * ROWS + tl.arange(0, ROWS)
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for step in tl.static_range(CHUNK):
        o_r = o_i * CHUNK + step
        m = (o_r < R)[:, None] & (o_c < N)
        # A row past the end adds 0.0, which changes no bit: a sum that began at 0.0 is never -0.0.
        b_g = tl.load(p_g + row_start(o_r, H, stride_gt, stride_gh) + o_c, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + row_start(o_r, H, stride_xt, stride_xh) + o_c, mask=m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_r, mask=o_r < R, other=0.0)
        acc += b_g * (b_x * rstd[:, None])
    store_partial(p_partial, acc, o_i, o_c, C, N, LARGE)


@triton.jit(do_not_specialize=["R"])
def rms_norm_backward_kernel(
    p_g,  # [R, N], gradient of y
    p_gsum,  # [R, N] or None: gradient that reaches x + residual directly
    p_x,  # [R, N], what was normalised
    p_w,  # [N]
    p_rstd,  # [R] fp32
    p_dx,  # [R, N], contiguous
    p_partial,  # [C / GROUP, N, GROUP] fp32
    R,
    C,
    N,
    H,
    stride_gt,
    stride_gh,
    stride_st,  # gsum's
    stride_sh,
    stride_xt,
    stride_xh,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,  # chunks of a program: side by side, each row by row
    CHUNKS: tl.constexpr,  # of columns; not 0
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # rows on their way, and one
    HAS_SUM: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Both of the above with one read of g and x, where there are chunks enough to fill a GPU."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    o_i, o_c = _tile(0, ROWS, CHUNKS, BLOCK, LARGE)
    b_w = _weight(p_w, 0, N, 0.0, dtype, CHUNKS, BLOCK, True)
    acc = tl.zeros([ROWS * CHUNKS, BLOCK], dtype=tl.float32)
    for step in tl.range(0, CHUNK, num_stages=STAGES):
        o_r = o_i * CHUNK + step
        rstd = tl.load(p_rstd + o_r, mask=o_r < R, other=0.0)[:, None]
        b_g = _load_g(p_g, o_r, o_c, R, N, H, stride_gt, stride_gh)
        b_x = _load_x(p_x, None, None, o_r, o_c, R, N, H, stride_xt, stride_xh, 0, 0, False)
        b_gsum = b_g
        if HAS_SUM:
            b_gsum = _load_g(p_gsum, o_r, o_c, R, N, H, stride_st, stride_sh)
        _store_dx(p_dx, dx_of_held(b_g, b_gsum, b_w, b_x, rstd, N, CHUNKS, HAS_SUM, True), o_r, o_c, R, N)
        acc += b_g * (b_x * rstd)
    store_partial(p_partial, acc, o_i, o_c, C, N, LARGE)


@triton.jit
def add_chunks(
    p_partial,
    p_out,
    C,
    N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    LARGE: tl.constexpr,
):
    """out = the chunks' partial sums, added one after another.

    One chain of adds per column, 4 cycles each. So that it waits for nothing else, a thread takes GROUP chunks with one
    load, and STAGES brings the loads of the next rounds to shared memory meanwhile.
    """
    o_c = widen(tl.program_id(0), LARGE) * COLS + tl.arange(0, COLS)
    m_c = o_c < N
    if ACCUMULATE:
        acc = tl.load(p_out + o_c, mask=m_c, other=0.0)
    else:
        acc = tl.zeros([COLS], dtype=tl.float32)
    p_group = p_partial + o_c[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for _first in tl.range(0, C, UNROLL, num_stages=STAGES):
        for i in tl.static_range(0, UNROLL, GROUP):
            b_group = tl.load(p_group + i * N, mask=m_c[:, None], other=0.0)
            b_even, b_odd = tl.split(tl.reshape(b_group, [COLS, 2, 2]))
            b_0, b_2 = tl.split(b_even)
            b_1, b_3 = tl.split(b_odd)
            acc = acc + b_0 + b_1 + b_2 + b_3
        p_group += UNROLL * N
    tl.store(p_out + o_c, cast(acc, p_out.dtype.element_ty), mask=m_c)


@triton.jit
def add_chunks_kernel(
    p_partial,  # [C / GROUP, N, GROUP] fp32
    p_out,  # [N]
    C,  # a multiple of UNROLL
    N: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # out is fp32 and where the sum starts
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,  # a multiple of GROUP
    STAGES: tl.constexpr,
    LARGE: tl.constexpr,
):
    add_chunks(p_partial, p_out, C, N, ACCUMULATE, COLS, UNROLL, STAGES, LARGE)
