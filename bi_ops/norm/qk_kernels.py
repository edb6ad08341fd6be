"""What Qwen3 does between the fused projection and attention, in one pass: queries and keys are normalised per head and
turned by the angles of their positions, values are copied. The bits are those of `rms_norm`, then `apply_rope`.

Rows and trees are those of `kernels`: row r of a part (queries, keys, values: the second index of the grid) is head
r % H of token r // H, and a tile [ROWS, BLOCK] has whole rows. A column is turned with the one half a head further or
back, its partner. So partners are loaded too, at columns of their own, and no value leaves its thread: exchanged, they
could turn the tile to another layout, and with that the tree of the sums to another one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast, widen
from bi_ops.norm.kernels import add_chunks, dx_of_held, load_weight, row_start, row_sum, squares, store_partial


@triton.jit
def _eights(o_c):
    """o_c, whose groups of eight are neighbours: the compiler does not see that, and would load them one by one."""
    return tl.max_contiguous(tl.multiple_of(o_c, 8), 8)


@triton.jit
def _partner(o_c, HALF: tl.constexpr):
    """The column that o_c [BLOCK] is turned with."""
    return _eights(tl.where(o_c < HALF, o_c + HALF, o_c - HALF))


@triton.jit
def _positions(p_pos, o_r, R, H: tl.constexpr):
    return tl.load(p_pos + o_r // H, mask=o_r < R, other=0).to(tl.int64)


@triton.jit
def _angles(angles, pos, o_r, o_c, R, N, HALF: tl.constexpr, INVERSE: tl.constexpr):
    """Cosine and sine of the tile, of the angle negated if INVERSE. angles: (positions, cache, how many it holds)."""
    _, p_cos_sin, P = angles
    # A position outside the cache turns its token into NaN: seen at once, and nothing out of bounds is read.
    m = ((o_r < R) & (pos >= 0) & (pos < P))[:, None] & (o_c < N)[None, :]
    p_cos = p_cos_sin + (pos * (2 * HALF))[:, None] + _eights(tl.where(o_c < HALF, o_c, o_c - HALF))[None, :]
    b_cos = tl.load(p_cos, mask=m, other=float("nan")).to(tl.float32)
    b_sin = tl.load(p_cos + HALF, mask=m, other=float("nan")).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    return b_cos, b_sin


@triton.jit
def _rotate(b, b_partner, b_cos, b_sin, o_c, HALF: tl.constexpr, dtype: tl.constexpr):
    """The rotation, rounded to `dtype`. As in `rope_kernel`, a rounded product is negated: zeros have signs."""
    b_product = b_partner * b_sin
    return cast(tl.fma(b, b_cos, tl.where(o_c < HALF, -b_product, b_product)), dtype)


@triton.jit
def _load_rows(p_x, o_r, o_c, o_p, R, N, stride_xt, H: tl.constexpr, HALF: tl.constexpr):
    """Rows of queries or keys, and the partners of their columns."""
    m = (o_r < R)[:, None] & (o_c < N)
    p_row = p_x + row_start(o_r, H, stride_xt, 2 * HALF)
    return tl.load(p_row + o_c, mask=m, other=0.0), tl.load(p_row + o_p[None, :], mask=m, other=0.0)


@triton.jit
def _forward(
    p_x,
    p_w,
    angles,
    p_y,
    p_rstd,
    R,
    N,
    eps,
    stride_xt,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries or keys: y = the rotation of x * rstd * w, rounded before and after it. A tile's rows and positions are
    asked for while the tile before is computed."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    o_1 = tl.arange(0, BLOCK)
    o_c, o_p = o_1[None, :], _partner(o_1, HALF)
    b_w = load_weight(p_w, o_1, N, 1.0, dtype)[None, :]
    b_wp = load_weight(p_w, o_p, N, 1.0, dtype)[None, :]
    o_r = widen(tl.program_id(0), LARGE) * (ROWS * TILES) + tl.arange(0, ROWS)
    pos = _positions(angles[0], o_r, R, H)
    if TILES == 1:  # constants, so before the wait
        b_cos, b_sin = _angles(angles, pos, o_r, o_1, R, N, HALF, False)
    pdl.begin_after_loads(PDL)
    b_x, b_xp = _load_rows(p_x, o_r, o_c, o_p, R, N, stride_xt, H, HALF)
    for _ in tl.range(0, TILES):
        if TILES > 1:
            b_cos, b_sin = _angles(angles, pos, o_r, o_1, R, N, HALF, False)
            pos = _positions(angles[0], o_r + ROWS, R, H)
            b_next, b_nextp = _load_rows(p_x, o_r + ROWS, o_c, o_p, R, N, stride_xt, H, HALF)
        b, b_p = b_x.to(tl.float32), b_xp.to(tl.float32)
        rstd = 1.0 / tl.sqrt(row_sum(squares(b, o_r, o_c, R, N), 1) / N + tl.cast(eps, tl.float32))
        tl.store(p_rstd + o_r, rstd, mask=o_r < R)
        b_y = cast(b * rstd[:, None] * b_w, dtype).to(tl.float32)
        b_yp = cast(b_p * rstd[:, None] * b_wp, dtype).to(tl.float32)
        m = (o_r < R)[:, None] & (o_c < N)
        tl.store(p_y + row_start(o_r, 1, N, 0) + o_c, _rotate(b_y, b_yp, b_cos, b_sin, o_c, HALF, dtype), mask=m)
        if TILES > 1:
            b_x, b_xp, o_r = b_next, b_nextp, o_r + ROWS


@triton.jit(do_not_specialize=["T", "prefetch"])
def qk_norm_rope_kernel(
    p_qkv,  # [T, (HQ + 2 * HK) * N]
    p_wq,  # [N]
    p_wk,  # [N]
    p_pos,  # [T] int
    p_cos_sin,  # [P, N]: cos, then sin
    p_q,  # [T, HQ, N]
    p_k,  # [T, HK, N]
    p_v,  # [T, HK, N]
    p_rstd,  # [T * (HQ + HK)] fp32: 1 / rms of the queries, then of the keys
    T,
    N,  # 2 * HALF. The sum is divided by it as in `rms_norm_kernel`: by a number that the compiler does not see
    P,
    eps,
    stride_t,
    prefetch,  # of `core.pdl`: weights, positions and angles are constant
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has TILES tiles of ROWS rows, one after another."""
    pdl.begin(prefetch, PDL)
    angles = (p_pos, p_cos_sin, P)
    T = widen(T, LARGE)
    first = widen(tl.program_id(0), LARGE) * (ROWS * TILES)
    if tl.program_id(1) == 0:
        _forward(p_qkv, p_wq, angles, p_q, p_rstd, T * HQ, N, eps, stride_t, HQ, HALF, ROWS, TILES, BLOCK, LARGE, PDL)
    elif first < T * HK:
        p_keys = p_qkv + HQ * 2 * HALF
        if tl.program_id(1) == 1:
            p_rstd += T * HQ
            _forward(
                *(p_keys, p_wk, angles, p_k, p_rstd, T * HK, N, eps, stride_t, HK, HALF, ROWS, TILES, BLOCK, LARGE, PDL)
            )
        else:
            pdl.begin_after_loads(PDL)
            o_c = tl.arange(0, BLOCK)[None, :]
            for tile in tl.range(0, TILES):
                o_r = first + tile * ROWS + tl.arange(0, ROWS)
                m = (o_r < T * HK)[:, None] & (o_c < N)
                b_v = tl.load(p_keys + HK * 2 * HALF + row_start(o_r, HK, stride_t, 2 * HALF) + o_c, mask=m)
                tl.store(p_v + row_start(o_r, 1, N, 0) + o_c, b_v, mask=m)
    else:
        pdl.begin_after_loads(PDL)


@triton.jit
def _backward(
    p_g,
    p_x,
    p_w,
    angles,
    p_rstd,
    p_dx,
    p_partial,
    R,
    C,
    N,
    stride_g,
    stride_xt,
    stride_dxt,
    H: tl.constexpr,
    HALF: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Queries or keys: the gradient turned back and rounded, then dx and the chunks' sums of dweight."""
    dtype: tl.constexpr = p_dx.dtype.element_ty
    o_i, o_1 = widen(tl.program_id(0), LARGE) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_c, o_p = o_1[None, :], _partner(o_1, HALF)
    b_w = load_weight(p_w, o_1, N, 0.0, dtype)[None, :]
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for step in tl.range(0, CHUNK, num_stages=STAGES):
        if SEGMENTS == 1:
            o_r = o_i * CHUNK + step
        else:  # a chunk has rows of one segment's heads, token by token
            own: tl.constexpr = H // SEGMENTS
            chunks = C // SEGMENTS
            o_s = (o_i % chunks) * CHUNK + step
            o_r = (o_s // own) * H + (o_i // chunks) * own + o_s % own
            o_r = tl.where(o_i < C, o_r, R)
        m = (o_r < R)[:, None] & (o_c < N)
        p_row = p_g + row_start(o_r, 1, stride_g, 0)
        b_g = tl.load(p_row + o_c, mask=m, other=0.0).to(tl.float32)
        b_gp = tl.load(p_row + o_p[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + row_start(o_r, H, stride_xt, 2 * HALF) + o_c, mask=m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_r, mask=o_r < R, other=0.0)[:, None]
        b_cos, b_sin = _angles(angles, _positions(angles[0], o_r, R, H), o_r, o_1, R, N, HALF, True)
        b_g = tl.where(m, _rotate(b_g, b_gp, b_cos, b_sin, o_c, HALF, dtype).to(tl.float32), 0.0)

        b_dx = dx_of_held(b_g, b_g, b_w, b_x, rstd, N, 1, False, True)
        tl.store(p_dx + row_start(o_r, H, stride_dxt, 2 * HALF) + o_c, cast(b_dx, dtype), mask=m)
        acc += b_g * (b_x * rstd)
    store_partial(p_partial, acc, o_i, o_c, C, N, LARGE)


@triton.jit(do_not_specialize=["T", "CQ", "CK"])
def qk_norm_rope_backward_kernel(
    p_gq,  # [T, HQ, N]
    p_gk,  # [T, HK, N]
    p_gv,  # [T, HK, N]
    p_qkv,  # [T, (HQ + 2 * HK) * N]
    p_wq,  # [N]
    p_wk,  # [N]
    p_pos,  # [T] int
    p_cos_sin,  # [P, N]
    p_rstd,  # [T * (HQ + HK)] fp32
    p_dqkv,  # [T, (HQ + 2 * HK) * N]
    p_partial,  # [(CQ + CK) / GROUP, N, GROUP] fp32
    T,
    CQ,  # chunks of the queries, with those past the end, whose sums are 0.0
    CK,
    N,
    P,
    stride_gq,  # from row to row
    stride_gk,
    stride_gv,
    stride_t,
    stride_dt,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HALF: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of consecutive heads, each with a dweight of its own
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LARGE: tl.constexpr,
):
    """A program has ROWS chunks of rows; a chunk's rows are added front to back, as in `rms_norm_dweight_kernel`."""
    angles = (p_pos, p_cos_sin, P)
    T = widen(T, LARGE)
    if tl.program_id(1) == 0:
        _backward(
            p_gq,
            p_qkv,
            p_wq,
            angles,
            p_rstd,
            p_dqkv,
            p_partial,
            T * HQ,
            CQ,
            N,
            stride_gq,
            stride_t,
            stride_dt,
            HQ,
            HALF,
            SEGMENTS,
            CHUNK,
            ROWS,
            BLOCK,
            STAGES,
            LARGE,
        )
    elif widen(tl.program_id(0), LARGE) * ROWS < CK:
        p_keys, p_dkeys = p_qkv + HQ * 2 * HALF, p_dqkv + HQ * 2 * HALF
        if tl.program_id(1) == 1:
            p_rstd += T * HQ
            p_partial += CQ.to(tl.int64) * N
            _backward(
                p_gk,
                p_keys,
                p_wk,
                angles,
                p_rstd,
                p_dkeys,
                p_partial,
                T * HK,
                CK,
                N,
                stride_gk,
                stride_t,
                stride_dt,
                HK,
                HALF,
                SEGMENTS,
                CHUNK,
                ROWS,
                BLOCK,
                STAGES,
                LARGE,
            )
        else:
            o_c = tl.arange(0, BLOCK)[None, :]
            for step in tl.range(0, CHUNK, num_stages=STAGES):
                o_r = (widen(tl.program_id(0), LARGE) * CHUNK + step) * ROWS + tl.arange(0, ROWS)
                m = (o_r < T * HK)[:, None] & (o_c < N)
                b_g = tl.load(p_gv + row_start(o_r, 1, stride_gv, 0) + o_c, mask=m)
                tl.store(p_dkeys + HK * 2 * HALF + row_start(o_r, HK, stride_dt, 2 * HALF) + o_c, b_g, mask=m)


@triton.jit(do_not_specialize=["CQ", "CK"])
def qk_add_chunks_kernel(
    p_partial,  # [(CQ + CK) / GROUP, N, GROUP] fp32
    p_dwq,  # [SEGMENTS, N]
    p_dwk,  # [SEGMENTS, N]
    CQ,  # of one segment
    CK,
    N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # both are fp32 and where the sums start
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dweight of the queries and of the keys side by side, for a chain of adds is long and fills no GPU."""
    segment = tl.program_id(2)
    if tl.program_id(1) == 0:
        p_partial += segment * CQ.to(tl.int64) * N
        add_chunks(p_partial, p_dwq + segment * N, CQ, N, ACCUMULATE, COLS, UNROLL, STAGES, False)
    else:
        p_partial += (SEGMENTS * CQ.to(tl.int64) + segment * CK.to(tl.int64)) * N
        add_chunks(p_partial, p_dwk + segment * N, CK, N, ACCUMULATE, COLS, UNROLL, STAGES, False)
