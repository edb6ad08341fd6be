"""Semaphores in global memory: what several CTAs add to one tile is added in a given order."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def acquire(p_semaphore, value):
    """Wait until `p_semaphore` holds `value`. What was written before the `release` that made it so is then visible."""
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
        [p_semaphore, value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def release(p_semaphore, p_next):
    """Each warp adds 1 to `p_semaphore` once the TMA stores that the warp has issued are in memory.

    Returns what `p_next` held shortly before: a warp that finds its next semaphore ready need not wait for it.
    """
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
        [p_semaphore, p_next],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
