"""Turns at a place in memory, for Gluon kernels: what several programs add to it is added in an order that is given."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_turn(p_turn, turn):
    """Wait until `p_turn` holds `turn`: what was written before the `end_turn` that made it so is then there."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred %wait;
        .reg .b32 %seen;
        AGAIN:
        ld.acquire.gpu.global.b32 %seen, [$1];
        setp.ne.s32 %wait, %seen, $2;
        @%wait bra AGAIN;
        fence.proxy.async;
        mov.b32 $0, %seen;
        }""",
        "=r,l,r",
        [p_turn, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def end_turn(p_turn, p_next):
    """Each warp adds 1 to `p_turn` once the copies it has begun are in memory. What `p_next` holds by then, or held."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred %first;
        .reg .b32 %lane;
        ld.acquire.gpu.global.b32 $0, [$2];
        cp.async.bulk.wait_group 0;
        fence.proxy.async;
        bar.warp.sync 0xffffffff;
        mov.u32 %lane, %laneid;
        setp.eq.u32 %first, %lane, 0;
        @%first red.release.gpu.global.add.s32 [$1], 1;
        }""",
        "=&r,l,l",
        [p_turn, p_next],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
