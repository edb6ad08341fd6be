"""Attention under a mask, and at head sizes that no kernel has: torch's numbers, and bits that no batch changes."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc"
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from own_attention import cu
from test_attention_offsets import far

from bi_ops import attention
from bi_ops.attention import launch, reference
from bi_ops.attention.order import KeySteps, Problem, order
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.verify import gradient_errors
from bi_ops.verify.properties import bits_equal

MASKED = torch.finfo(torch.float32).min
#: (head size, value head size)
HEAD_DIMS = [(20, 12)] if runtime.INTERPRET else [(24, 24), (20, 12), (64, 64), (96, 128), (192, 128)]


def batch(n, len_q, len_k, dim, value_dim, dtype, device, hq=4, hkv=2):
    shapes = {"q": (len_q, hq, dim), "k": (len_k, hkv, dim), "v": (len_k, hkv, value_dim)}
    return {name: torch.randn(n, *s, device=device).to(dtype) for name, s in shapes.items()}


def bool_mask(n, len_q, len_k, device):
    """Of all heads one, with left padding in each sequence but the first, and a query that sees no key."""
    mask = torch.rand(n, 1, len_q, len_k, device=device) > 0.3
    for i in range(n):
        mask[i, :, :, : 3 * i] = False
    mask[0, :, 1] = False
    return mask.expand(n, 4, len_q, len_k)


def plain(q, k, v, mask, causal=False):
    """The same in plain torch: [B, L, H, D]."""
    heads = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.repeat_interleave(heads, 2).transpose(1, 2), v.repeat_interleave(heads, 2)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    scores = scores + mask.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(~seen, 0.0), -1) * seen
    return (p @ v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("len_q", "len_k", "causal", "dtype"),
    [(70, 70, True, torch.bfloat16), (5, 130, False, torch.float32), (30, 9, True, torch.bfloat16)],
)
def test_gradients_match_fp64(len_q, len_k, causal, dtype, device):
    for dims in HEAD_DIMS:
        tensors = batch(2, len_q, len_k, *dims, dtype, device)
        of_bool = bool_mask(2, len_q, len_k, device)

        def ours(q, k, v, mask=of_bool):
            return attention.masked_attention(q, k, v, mask, causal=causal)

        def theirs(q, k, v, mask=of_bool):
            return plain(q, k, v, mask, causal)

        errors = gradient_errors(ours, theirs, tensors)
        assert all(e.ok for e in errors), (dims, errors)
        numbers = torch.randn(2, 4, len_q, len_k, device=device)
        errors = gradient_errors(ours, theirs, tensors | {"mask": numbers})
        assert all(e.ok for e in errors), (dims, errors)


@pytest.mark.parametrize("masked", [MASKED, -1e30, -1e9])
def test_large_finite_masks_are_torchs(masked, device):
    """As models write them. A query all of whose keys have it sees all of them, in the backward as well."""
    tensors = batch(2, 6, 70, 16, 16, torch.float32, device, hkv=4)
    mask = torch.zeros(6, 70, device=device)
    mask[2], mask[3, 9:], mask[4, :66] = masked, masked, masked
    results = []
    for f in (attention.masked_attention, lambda q, k, v, m: plain(q, k, v, m)):
        q, k, v = (t.clone().requires_grad_() for t in tensors.values())
        out = f(q, k, v, mask.expand(2, 4, 6, 70))
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.cos(out.detach()))))
    torch.testing.assert_close(results[0][0][:, 2], tensors["v"].mean(1), rtol=1e-4, atol=1e-4)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_query_whose_keys_are_all_masked_gives_zeros_and_no_gradient(device):
    tensors = batch(1, 3, 5, 16, 16, torch.float32, device)
    for no in (False, -torch.inf):
        mask = torch.full((1, 4, 3, 5), True if no is False else 0.0, device=device)
        mask[:, :, 1] = no
        q, k, v = (t.clone().requires_grad_() for t in tensors.values())
        out = attention.masked_attention(q, k, v, mask)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert not out[:, 1].any()
        assert not grads[0][:, 1].any()
        assert all(g.isfinite().all() for g in grads)


def run(tensors, mask, causal=False):
    leaves = [t.detach().requires_grad_() for t in (*tensors.values(), mask)]
    out = attention.masked_attention(*leaves, causal=causal)
    g = torch.sin(out.detach().float() * 100).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype, device):
    for dim, value_dim in HEAD_DIMS:
        tensors = batch(2, 40, 70, dim, value_dim, dtype, device)
        mask = torch.randn(2, 4, 40, 70, device=device)
        together = run(tensors, mask)
        assert all(bits_equal(a, b) for a, b in zip(run(tensors, mask), together, strict=True))
        for i in range(2):
            alone = run({n: t[i : i + 1] for n, t in tensors.items()}, mask[i : i + 1])
            assert all(bits_equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


def test_another_order_is_noticed(device):
    """Negative control: steps of 16 keys have other bits than those of the order."""
    q, k, v = (t[0] for t in batch(1, 70, 70, 64, 64, torch.float32, device).values())
    mask, arch, params = torch.randn(1, 4, 70, 70, device=device), arches.of(device), AttentionParams(False, 0.125)
    starts = cu([70], device)
    used = order(Problem(64, q.dtype, ("attn_mask",)), arch).forward
    given = (q, k, v, mask, Seqlens(starts, starts, 70, 70), params)
    a, b = (launch.masked_forward(*given, o, arch)[0] for o in (used, KeySteps(16)))
    torch.testing.assert_close(a, b)
    assert not torch.equal(a, b)


def test_any_strides_of_a_mask(device):
    """Expanded over sequences and heads, transposed, and past 2**31 elements."""
    tensors = batch(2, 5, 9, 16, 16, torch.bfloat16, device)
    mask = torch.randn(5, 9, device=device).bfloat16()
    want = run(tensors, mask.expand(2, 4, 5, 9).contiguous())
    for other in (mask.expand(2, 4, 5, 9), mask.mT.contiguous().mT.expand(2, 4, 5, 9)):
        assert all(bits_equal(a, b) for a, b in zip(run(tensors, other), want, strict=True))
    for axis in range(4):
        got = run(tensors, far(mask.expand(2, 4, 5, 9), axis))
        assert all(bits_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (20, 20), (3, 1), (24, 16), (192, 128), (64, 100)])
def test_other_head_sizes_are_padded_ones(dim, value_dim, device):
    """With the bits of zeros beside q, k and v, whose gradients are cut off; the scale is that of the given size."""
    lengths = [5, 20]
    shapes = {"q": (25, 4, dim), "k": (25, 2, dim), "v": (25, 2, value_dim)}
    tensors = {n: torch.randn(s, device=device).bfloat16() for n, s in shapes.items()}
    starts = cu(lengths, device)

    def ours(q, k, v):
        return attention.flash_attention(q, k, v, starts, backend="triton")

    def theirs(q, k, v):
        return reference.flash_attention(q, k, v, starts)

    errors = gradient_errors(ours, theirs, tensors)
    assert all(e.ok for e in errors), errors
    n = -(-max(dim, value_dim, 16) // 8) * 8
    wide = [F.pad(t, (0, n - t.shape[2])) for t in tensors.values()]
    out = attention.flash_attention(*wide, starts, softmax_scale=dim**-0.5, backend="triton")
    assert torch.equal(ours(**tensors), out[..., :value_dim])
    widest = max(dim, value_dim)
    orders = [attention.order_of(d, torch.bfloat16, backend="triton") for d in (widest, n)]
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": (2, 1, 3, 5)}, ValueError, r"attn_mask must be \[2, 4, 3, 5\], got \[2, 1, 3, 5\]; expand it"),
        ({"dtype": torch.int64}, TypeError, "attn_mask is int64"),
        ({"k": (1, 5, 2, 16)}, ValueError, "batches differ"),
        ({"q": (2, 3, 4, 300), "k": (2, 5, 2, 300)}, ValueError, "head sizes must be from 1 to 256"),
    ],
)
def test_bad_input_is_named(changes, error, message, device):
    shapes = {"q": (2, 3, 4, 16), "k": (2, 5, 2, 16), "v": (2, 5, 2, 16), "mask": (2, 4, 3, 5)} | changes
    q, k, v = (torch.ones(shapes[n], device=device) for n in "qkv")
    mask = torch.ones(shapes["mask"], device=device).to(shapes.get("dtype", torch.bool))
    with pytest.raises(error, match=message):
        attention.masked_attention(q, k, v, mask)
