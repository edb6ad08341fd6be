"""The online softmax of a consumer warp group: `forward` and `decode` take each step of keys through it.

`kernels.forward.attention_kernel` does the same arithmetic in plain Triton, operation by operation, hence equal bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def exponents(b_s, row_max, n, n_seen, scale2, MASKED: gl.constexpr):
    """(log2 of P, row_max with S, log2 of the rescale of earlier sums) of a step of keys that starts at `n`.

    b_s: products of queries and keys. n_seen: how many keys of the sequence each row sees. scale2: of base 2.
    """
    l_s: gl.constexpr = b_s.type.layout
    if MASKED:
        o_n = gl.arange(0, b_s.shape[1], gl.SliceLayout(0, l_s))
        b_s = gl.where(o_n[None, :] < (n_seen - n)[:, None], b_s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(b_s, 1) * scale2)
    safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    b_x = gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast((-safe_max)[:, None], b_s)[0])
    return b_x, new_max, row_max - safe_max


@gluon.jit
def online_softmax(b_s, row_max, row_sum, n, n_seen, scale2, MASKED: gl.constexpr):
    """(P in fp32, row_max, rescale, row_sum) with a step of keys. `rescale` is for what was summed before."""
    b_x, new_max, log2_rescale = exponents(b_s, row_max, n, n_seen, scale2, MASKED)
    b_p = gl.exp2(b_x)
    rescale = gl.exp2(log2_rescale)
    return b_p, new_max, rescale, gl.fma(row_sum, rescale, gl.sum(b_p, 1))


@gluon.jit
def reciprocal(x):
    """1 / x as `a / x` takes it: for x from 2^-126 to 2^126, as row sums are, a * reciprocal(x) has its bits."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
