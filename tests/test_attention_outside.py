"""Rows that belong to no sequence hold zeros: out, lse and gradients, whoever computes them.

On a GPU a given `max_seqlen` leaves cu_seqlens unread, so that only kernels know of such rows.
"""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc"
from __future__ import annotations

from typing import Any

import pytest
import torch
from own_attention import cu, run

from bi_ops import attention
from bi_ops.attention import flash_attn, launch, vllm
from bi_ops.attention.config import BackwardConfig, BackwardConfigs, KernelConfig
from bi_ops.attention.order import OnePass, Problem, order
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import runtime

LENGTHS = [5, 0, 70, 1]
BEFORE, AFTER = 3, 20
ALL = BEFORE + sum(LENGTHS) + AFTER
INSIDE = slice(BEFORE, BEFORE + sum(LENGTHS))


def tensors(head_dim, dtype, device, rows=ALL):
    """q, k, v and dO, NaN outside the sequences."""
    made = [torch.randn(rows, h, head_dim, device=device).to(dtype) for h in (4, 2, 2, 4)]
    for t in made:
        t[:BEFORE] = t[INSIDE.stop :] = torch.nan
    return made


def seqlens(device, before=0):
    starts = cu(LENGTHS, device) + before
    return Seqlens(starts, starts, max(LENGTHS), max(LENGTHS))


def is_clear(t):
    return not t[:BEFORE].any() and not t[INSIDE.stop :].any()


TILE = KernelConfig(64, 1, 1, 1)
CONFIGS = {"a grid of pairs": (None, BackwardConfigs()), "a list of tiles": (TILE, BackwardConfigs(dq=TILE, dkv=TILE))}


@pytest.mark.parametrize("name", CONFIGS if runtime.INTERPRET else ["a grid of pairs"])
def test_own_kernels(name, device):
    """Head sizes with two passes, with one, and with the Gluon kernels; the sequences keep their bits."""
    forward, backward = CONFIGS[name]
    for head_dim in (24,) if runtime.INTERPRET else (64, 96, 128, 256):
        inputs = tensors(head_dim, torch.bfloat16, device)
        g_lse, sinks = torch.full((4, ALL), torch.nan, device=device), torch.randn(4, device=device)
        g_lse[:, INSIDE] = 1.0
        params = AttentionParams(True, head_dim**-0.5)
        options = {"sinks": sinks, "forward": forward, "backward": backward}
        got = run(*inputs, seqlens(device, BEFORE), params, g_lse, **options)
        inner = [t[INSIDE] for t in inputs]
        want = run(*inner, seqlens(device), params, g_lse[:, INSIDE].contiguous(), **options)
        out, lse, dq, dk, dv, dsinks = got
        for a, b in zip((out, lse.mT, dq, dk, dv), (want[0], want[1].mT, *want[2:5]), strict=True):
            assert is_clear(a)
            assert torch.equal(a[INSIDE], b)
        assert dsinks.isfinite().all()


def test_dsinks_take_no_row_outside(device):
    """Chunks are counted from the first row, so rows outside are put where they move none."""
    before, after, head_dim = 16, 20, 24
    rows = before + 76 + after
    q, k, v, g = (torch.randn(rows, h, head_dim, device=device) for h in (4, 2, 2, 4))
    g[:before] = g[before + 76 :] = torch.nan
    params, sinks, starts = AttentionParams(True, 0.2), torch.randn(4, device=device), cu(LENGTHS, device)
    got = run(q, k, v, g, Seqlens(starts + before, starts + before, 70, 70), params, sinks=sinks)[-1]
    want = run(*(t[before : before + 76] for t in (q, k, v, g)), Seqlens(starts, starts, 70, 70), params, sinks=sinks)
    assert torch.equal(got, want[-1])


@pytest.mark.parametrize("head_dim", [24] if runtime.INTERPRET else [64, 96, 128, 256])
def test_paged(head_dim, device):
    """As a CUDA graph pads a batch of decoded tokens; a sequence without keys gives zeros too."""
    page, used = 16, torch.tensor([20, 0, 3], dtype=torch.int32, device=device)
    caches = [torch.randn(6, page, 2, head_dim, device=device).bfloat16() for _ in range(2)]
    table = torch.tensor([[4, 2], [0, 0], [5, 0]], dtype=torch.int32, device=device)
    q = torch.randn(9, 4, head_dim, device=device).bfloat16()
    starts = torch.tensor([1, 2, 3, 5], dtype=torch.int32, device=device)
    params, arch = AttentionParams(True, 0.2), arches.of(device)
    key_steps = order(Problem(head_dim, q.dtype, (), True), arch).forward
    paged = (*caches, table)
    got = launch.paged_forward(q, *paged, starts, used, 2, params, None, key_steps, arch)
    want = launch.paged_forward(q[1:5], *paged, starts - 1, used, 2, params, None, key_steps, arch)
    assert torch.equal(got[1:5], want)
    assert not got[:1].any()
    assert not got[5:].any()
    assert not got[2].any()
    assert got[1].any()


@pytest.mark.parametrize("name", ["vllm", "flash_attn", "flash_attn_deterministic"])
@pytest.mark.parametrize("read", [False, True])
def test_forwards_of_others(name, read, device, monkeypatch):
    """What a library leaves as it was is cleared behind it, unless cu_seqlens were read and leave no row out."""
    launched = []
    monkeypatch.setattr(launch, "clear_outside", lambda *a, clear=launch.clear_outside: launched.append(clear(*a)))

    def unwritten(q, *args):
        return torch.ones_like(q), torch.ones(q.shape[1], q.shape[0], device=q.device)

    def gradients(g, q, k, v, *args):
        return torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)

    monkeypatch.setattr(vllm, "forward", unwritten)
    monkeypatch.setattr(flash_attn, "forward", unwritten)
    monkeypatch.setattr(flash_attn, "backward", gradients)
    q, k, v, g = tensors(128, torch.bfloat16, device)
    lengths, params = seqlens(device, BEFORE)._replace(read=read), AttentionParams(True, 0.1)
    backend, arch = attention.backends.get(name), arches.of(device)
    order = backend.order(Problem(128, q.dtype), arch)
    out, lse = backend.forward(q, k, v, lengths, params, None, order, arch)
    written = [out, lse.mT]
    if name == "flash_attn_deterministic":
        written += backend.backward(g, q, k, v, out, lse, None, lengths, params, None, True, True, order, arch)[:3]
    assert bool(launched) is not read
    for t in written:
        assert t[INSIDE].all()
        assert read or is_clear(t)


def test_the_one_pass_backward_prepares_what_its_kernel_leaves(device, monkeypatch):
    """Statistics of each tile, 0 past the end; semaphores where tiles of keys wait for one another; zeros outside."""
    if not runtime.INTERPRET:
        pytest.skip("the kernel itself runs on a GPU")
    from bi_ops.attention.hopper import backward

    seen: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.update(args=args)

    monkeypatch.setattr(backward, "attention_backward_kernel", Kernel())
    for name in ("head_descriptor", "vector_descriptor"):
        monkeypatch.setattr(backward.tma, name, lambda t, block: t)
    lens = [5, 0, 200, 1]
    before, rows, head_dim = BEFORE, BEFORE + 206 + AFTER, 64
    starts = cu(lens, device) + before
    q, k, v, g = (torch.randn(rows, h, head_dim).bfloat16() for h in (4, 2, 2, 4))
    out, lse = torch.randn(rows, 4, head_dim).bfloat16(), torch.randn(4, rows)

    def unset(t, shape, dtype=None, device=None):
        shape, dtype = (shape,) if isinstance(shape, int) else shape, dtype or t.dtype
        return torch.full(shape, torch.nan if dtype.is_floating_point else -7, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", unset)
    given = (g, q, k, v, out, lse, None, starts, starts, 200, True, 0.1)
    dq, dk, dv = backward.launch(*given, OnePass(64, 128), BackwardConfig(4, 0))
    *_, neg_lse, delta, _, semaphores = seen["args"][:8]
    for b, (start, n) in enumerate(zip(starts.tolist(), lens, strict=False)):
        for i in range(-(-n // 64)):
            here = slice(start + 64 * i, min(start + 64 * (i + 1), start + n))
            size = here.stop - here.start
            row = neg_lse[:, start // 64 + b + i], delta[:, start // 64 + b + i]
            torch.testing.assert_close(row[0][:, :size], -lse[:, here] * 1.4426950408889634)
            torch.testing.assert_close(row[1][:, :size], (g[here].float() * out[here].float()).sum(-1).mT)
            assert not row[0][:, size:].any()
            assert not row[1][:, size:].any()
            if n > 128:
                assert not semaphores[:, start // 64 + min(b, start // 128) + i].any()
    assert (semaphores == 0).sum() == 4 * 4
    for t in (dq, dk, dv):
        assert not t[:before].any()
        assert not t[before + 206 :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton"])
def test_through_the_public_call(backend, device):
    for head_dim in (64, 96, 128, 256):
        q, k, v, g = tensors(head_dim, torch.bfloat16, device)
        problem = attention.Problem(head_dim, torch.bfloat16)
        if attention.backends.select(problem, arches.of(device), backend).name == "vllm":
            v[:BEFORE] = v[INSIDE.stop :] = 0.0  # FlashAttention 3 multiplies what follows a sequence by zero
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        starts = cu(LENGTHS, device) + BEFORE
        options = {"max_seqlen": ALL, "return_lse": True, "backend": backend}
        out, lse = attention.flash_attention(q, k, v, starts, **options)
        grads = torch.autograd.grad(out, (q, k, v), g)
        for t in (out, lse.mT, *grads):
            assert is_clear(t)
            assert t[INSIDE].isfinite().all()
