"""What the Hopper kernels of attention share: a step's softmax, and rows that are cleared."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of a team: what four warps hold of a product


@gluon.jit
def clear_rows(tile, n_valid, WARPS: gl.constexpr):
    """Zeros in rows from `n_valid` on: they are another sequence's, and 0 times a NaN of theirs would be ours.

    Two teams may do it at the same time: what one writes again is what is there.
    """
    D: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    PART: gl.constexpr = max(8, 1024 * WARPS // D)  # rows at a time: what fits into few registers
    for i in gl.static_range(tile.shape[0] // PART):
        part = tile.slice(i * PART, PART)
        o_r = i * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
        x = part.load(layout)
        part.store(gl.where((o_r < n_valid)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def exponents(b_s, top, n, n_seen, scale2, MASKED: gl.constexpr):
    """(binary logarithms of P, top with S, that of what earlier sums are multiplied by)"""
    l_s: gl.constexpr = b_s.type.layout
    if MASKED:
        o_n = gl.arange(0, b_s.shape[1], gl.SliceLayout(0, l_s))
        b_s = gl.where(o_n[None, :] < (n_seen - n)[:, None], b_s, float("-inf"))
    new_top = gl.maximum(top, gl.max(b_s, 1) * scale2)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    b_x = gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast((-shift)[:, None], b_s)[0])
    return b_x, new_top, top - shift


@gluon.jit
def softmax_step(b_s, top, total, n, n_seen, scale2, MASKED: gl.constexpr):
    """One step of `attention_kernel`: (P in fp32, top, what earlier sums are multiplied by, total)."""
    b_x, new_top, decay = exponents(b_s, top, n, n_seen, scale2, MASKED)
    b_p = gl.exp2(b_x)
    decay = gl.exp2(decay)
    return b_p, new_top, decay, gl.fma(total, decay, gl.sum(b_p, 1))


@gluon.jit
def inverse(x):
    """1 / x as `a / x` takes it: for x from 2^-126 to 2^126, as sums of a softmax are, a * inverse(x) has its bits."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
