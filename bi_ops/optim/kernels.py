"""One launch over many tensors: the norm of gradients, their scaling, AdamW.

Tables in memory say what a program works on: addresses [P, A] of each parameter's tensors, sizes [P, S] of each
parameter, and the parameter and number of each tile [T, 2]. Tiles of a parameter follow one another. ALIGNED: every
address is a multiple of 16 bytes and every length one of 4 elements, so that a thread loads 16 bytes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.runtime import INTERPRET
from bi_ops.core.triton_helpers import cast, fma

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def mul(a, b):
    """a * b in fp32, rounded. The compiler may fuse a plain product with the addition that takes it."""
    if _INTERPRET:
        return a * b
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def pairwise_sum(x, ROWS: tl.constexpr, LOG2: tl.constexpr):
    """[ROWS] from [ROWS, 2**LOG2], neighbours first. Each step adds two numbers, so no layout chooses the order."""
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, [ROWS, 1 << (LOG2 - 1 - i), 2]), axis=2)
    return tl.reshape(x, [ROWS])


@triton.jit
def address(p_addresses, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer at `index` of the table."""
    p = tl.load(p_addresses + index).to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def length(p_sizes, index, ALIGNED: tl.constexpr):
    """The number of elements at `index` of the table."""
    n = tl.load(p_sizes + index)
    if ALIGNED:
        n = tl.multiple_of(n, 4)
    return n


@triton.jit
def square_sums_kernel(
    p_addresses,  # [P] int64: gradients, fp32
    p_sizes,  # [P, 4] int64: elements, elements of a row, log2 of a row's spans, first tile
    p_tiles,  # [T, 2] int32: parameter and number of each tile
    p_out,  # fp32, by number of the tile: one sum, or where EACH ROWS
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    SPAN: tl.constexpr,
    LOG2_ROWS: tl.constexpr,  # spans of a program; an aligned subtree of the parameter's tree
    EACH: tl.constexpr,  # leave the sum of each span, else that of the tile
    ALIGNED: tl.constexpr,
):
    """The sums of squares of ROWS spans, front to back in each lane, lanes pairwise, then the spans pairwise."""
    ROWS: tl.constexpr = 1 << LOG2_ROWS
    i_p = tl.load(p_tiles + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(p_tiles + tl.program_id(0) * 2 + 1).to(tl.int64)
    p_g = address(p_addresses, i_p, tl.float32, ALIGNED)
    size = length(p_sizes, i_p * 4, ALIGNED)
    n = length(p_sizes, i_p * 4 + 1, ALIGNED)
    log2_spans = tl.load(p_sizes + i_p * 4 + 2)
    o_span = (tile - tl.load(p_sizes + i_p * 4 + 3)) * ROWS + tl.arange(0, ROWS)

    o_row = o_span >> log2_spans
    begin = o_row * n + (o_span - (o_row << log2_spans)) * SPAN
    end = tl.minimum(tl.minimum(begin + SPAN, (o_row + 1) * n), size)
    count = tl.maximum(end - begin, 0).to(tl.int32)  # 0: no such span
    if ALIGNED:
        count = tl.multiple_of(count, [4])
    acc = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for start in tl.range(0, tl.minimum(n, SPAN).to(tl.int32), LANES):
        o = start + tl.arange(0, LANES)[None, :]
        b = tl.load(p_g + begin[:, None] + o, mask=o < count[:, None], other=0.0)
        acc = fma(b, b, acc)

    sums = pairwise_sum(acc, ROWS, LOG2_LANES)
    if EACH:
        tl.store(p_out + tile * ROWS + tl.arange(0, ROWS), sums)
    else:
        total = pairwise_sum(tl.reshape(sums, [1, ROWS]), 1, LOG2_ROWS)
        tl.store(p_out + tile + tl.arange(0, 1), total)


@triton.jit
def pairwise_sum_kernel(
    p_x,  # fp32
    p_segments,  # [T, 2] int64: where each segment of x starts, and how many sums it has, up to 2**LOG2_WIDTH
    p_out,  # [T] fp32
    LOG2_WIDTH: tl.constexpr,
    SQRT: tl.constexpr,
):
    """out = each segment's pairwise sum, or its square root."""
    segment = tl.program_id(0)
    start, count = tl.load(p_segments + segment * 2), tl.load(p_segments + segment * 2 + 1)
    o = tl.arange(0, 1 << LOG2_WIDTH)
    b = tl.load(p_x + start + o, mask=o < count, other=0.0)
    total = pairwise_sum(tl.reshape(b, [1, 1 << LOG2_WIDTH]), 1, LOG2_WIDTH)
    if SQRT:
        total = tl.sqrt_rn(total)
    tl.store(p_out + segment + tl.arange(0, 1), total)


@triton.jit
def _tile(p_sizes, p_tiles, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """The parameter of this program's tile, the tile's first element, and how many the parameter has."""
    i_p = tl.load(p_tiles + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(p_tiles + tl.program_id(0) * 2 + 1).to(tl.int64)
    size = length(p_sizes, i_p * 2, ALIGNED)
    return i_p, (tile - tl.load(p_sizes + i_p * 2 + 1)) * TILE, size


@triton.jit
def scale_kernel(
    p_addresses,  # [P] int64: fp32 tensors
    p_sizes,  # [P, 2] int64: elements, first tile
    p_tiles,  # [T, 2] int32: parameter and number of each tile
    p_scale,  # fp32
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile
    ALIGNED: tl.constexpr,
):
    """x *= scale. A scale of one changes no bit, so nothing is read then."""
    scale = tl.load(p_scale)
    if scale != 1.0:
        i_p, first, size = _tile(p_sizes, p_tiles, BLOCK * BLOCKS, ALIGNED)
        p_x = address(p_addresses, i_p, tl.float32, ALIGNED)
        for i in tl.range(0, BLOCKS):
            o = first + i * BLOCK + tl.arange(0, BLOCK)
            b = tl.load(p_x + o, mask=o < size)
            tl.store(p_x + o, mul(b, scale), mask=o < size)


@triton.jit(do_not_specialize=["decay", "lerp", "beta2", "one_minus_beta2", "rsqrt_bias2", "eps", "minus_step"])
def adamw_kernel(
    p_addresses,  # [P, 5] int64: parameter, gradient, exp_avg, exp_avg_sq, all fp32; bf16 copy, or 0
    p_sizes,  # [P, 2] int64: elements, first tile
    p_tiles,  # [T, 2] int32: parameter and number of each tile
    p_scale,  # fp32 or None: multiplies the gradient
    decay,  # 1 - lr * weight_decay
    lerp,  # 1 - beta1, from exp_avg to the gradient; -beta1 from the gradient where LERP_BACK
    beta2,
    one_minus_beta2,
    rsqrt_bias2,  # 1 / sqrt(1 - beta2 ** step)
    eps,
    minus_step,  # -lr / (1 - beta1 ** step)
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile
    ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    LERP_BACK: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    """One step of AdamW, each operation rounded as torch's own kernels round it."""
    i_p, first, size = _tile(p_sizes, p_tiles, BLOCK * BLOCKS, ALIGNED)
    p_p = address(p_addresses, i_p * 5, tl.float32, ALIGNED)
    p_g = address(p_addresses, i_p * 5 + 1, tl.float32, ALIGNED)
    p_m = address(p_addresses, i_p * 5 + 2, tl.float32, ALIGNED)
    p_v = address(p_addresses, i_p * 5 + 3, tl.float32, ALIGNED)
    b_lerp = tl.full([BLOCK], lerp, tl.float32)
    b_one_minus_beta2 = tl.full([BLOCK], one_minus_beta2, tl.float32)
    b_minus_step = tl.full([BLOCK], minus_step, tl.float32)
    for i in tl.range(0, BLOCKS):
        o = first + i * BLOCK + tl.arange(0, BLOCK)
        m = o < size
        b_g = tl.load(p_g + o, mask=m)
        b_p = tl.load(p_p + o, mask=m)
        b_m = tl.load(p_m + o, mask=m)
        b_v = tl.load(p_v + o, mask=m)

        if HAS_SCALE:
            b_g = mul(b_g, tl.load(p_scale))
        if HAS_DECAY:
            b_p = mul(b_p, decay)
        if LERP_BACK:
            b_m = fma(b_lerp, b_g - b_m, b_g)
        else:
            b_m = fma(b_lerp, b_g - b_m, b_m)
        b_v = fma(b_one_minus_beta2, mul(b_g, b_g), mul(b_v, beta2))
        b_denom = mul(tl.sqrt_rn(b_v), rsqrt_bias2) + eps
        b_p = fma(b_minus_step, tl.div_rn(b_m, b_denom), b_p)

        tl.store(p_p + o, b_p, mask=m)
        tl.store(p_m + o, b_m, mask=m)
        tl.store(p_v + o, b_v, mask=m)
        if ZERO_GRAD:
            tl.store(p_g + o, tl.zeros([BLOCK], dtype=tl.float32), mask=m)
        if HAS_COPY:
            if tl.load(p_addresses + i_p * 5 + 4) != 0:
                p_copy = address(p_addresses, i_p * 5 + 4, tl.bfloat16, ALIGNED)
                tl.store(p_copy + o, cast(b_p, tl.bfloat16), mask=m)
