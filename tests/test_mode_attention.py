"""Under the mode: scaled_dot_product_attention in every form that torch takes, and nn.MultiheadAttention."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc"
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bi_ops import attention, mode

sdpa = F.scaled_dot_product_attention
B, H, L, S, E = 2, 4, 7, 9, 20


def left_padded(device):
    mask = torch.ones(B, 1, L, S, dtype=torch.bool, device=device)
    mask[1, :, :, :4] = False
    mask[0, :, 2] = False
    return mask


def windowed(device):
    n = torch.arange(S, device=device)
    return (n[None, :] - n[:L, None]).abs() < 3


def heads(n, length, dim, device, lead=(B,)):
    return torch.randn(*lead, n, length, dim, device=device)


#: Name to a function of the device: (tensors that get gradients, options).
CASES = {
    "plain": lambda d: ([heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)], {}),
    "value size": lambda d: ([heads(H, L, 192, d), heads(H, S, 192, d), heads(H, S, 128, d)], {"is_causal": True}),
    "head size 8": lambda d: ([heads(H, L, 8, d), heads(H, S, 8, d), heads(H, S, 8, d)], {}),
    "causal, fewer queries": lambda d: (
        [heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)],
        {"is_causal": True},
    ),
    "causal, more queries": lambda d: ([heads(H, S, E, d), heads(H, L, E, d), heads(H, L, E, d)], {"is_causal": True}),
    "grouped, causal": lambda d: (
        [heads(H, L, 16, d), heads(2, L, 16, d), heads(2, L, 16, d)],
        {"is_causal": True, "enable_gqa": True},
    ),
    "left padding": lambda d: (
        [heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)],
        {"attn_mask": left_padded(d)},
    ),
    "window, grouped": lambda d: (
        [heads(H, L, E, d), heads(2, S, E, d), heads(2, S, E, d)],
        {"attn_mask": windowed(d), "enable_gqa": True},
    ),
    "finfo.min": lambda d: (
        [heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)],
        {"attn_mask": torch.where(left_padded(d), 0.0, torch.finfo(torch.float32).min)},
    ),
    "learned bias": lambda d: (
        [heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d), torch.randn(H, L, S, device=d)],
        {},
    ),
    "a number per key": lambda d: (
        [heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d), torch.randn(S, device=d)],
        {},
    ),
    "no batch": lambda d: ([torch.randn(n, E, device=d) for n in (L, S, S)], {}),
    "two batch axes": lambda d: ([heads(H, n, E, d, (2, 1)) for n in (L, S, S)], {"scale": 0.3}),
    "broadcast": lambda d: ([heads(H, L, E, d), heads(H, S, E, d, (1,)), heads(1, S, E, d)], {}),
    "negative scale": lambda d: ([heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)], {"scale": -0.5}),
    "scale 0": lambda d: ([heads(H, L, E, d), heads(H, S, E, d), heads(H, S, E, d)], {"scale": 0.0}),
    "no key": lambda d: ([heads(H, L, E, d), heads(H, 0, E, d), heads(H, 0, E, d)], {}),
    "no query": lambda d: ([heads(H, 0, E, d), heads(H, S, E, d), heads(H, S, E, d)], {}),
}


def run(f, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach() * 9))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torchs(name, device):
    tensors, options = CASES[name](device)

    def f(q, k, v, *mask):
        return sdpa(q, k, v, *mask, **options)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = run(f, tensors)
    with mode.batch_invariant_backward_mode():
        got = run(f, tensors)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_mask_and_causal_both_hold(device):
    """torch's math refuses the pair, its CPU kernel takes it so."""
    q, k, v = (heads(H, n, E, device) for n in (L, S, S))
    for mask in (left_padded(device), windowed(device)):
        both = mask & torch.ones(L, S, dtype=torch.bool, device=device).tril()
        with mode.batch_invariant_backward_mode():
            got = run(lambda q, k, v, m=mask: sdpa(q, k, v, attn_mask=m, is_causal=True), (q, k, v))
        want = run(lambda q, k, v, m=both: sdpa(q, k, v, attn_mask=m), (q, k, v))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_mask_has_the_bits_of_the_named_operator(device):
    q, k, v = (heads(H, n, 16, device).bfloat16() for n in (L, S, S))
    mask = left_padded(device)
    with mode.batch_invariant_backward_mode():
        got, alone = sdpa(q, k, v, attn_mask=mask), sdpa(q[1:], k[1:], v[1:], attn_mask=mask[1:])
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    want = attention.masked_attention(*rows, mask.expand(B, H, L, S)).transpose(1, 2)
    assert torch.equal(got, want)
    assert torch.equal(got[1:], alone)


REFUSED = {
    "dropout": (lambda q: sdpa(q, q, q, dropout_p=0.5), NotImplementedError, "is not served with dropout"),
    "heads": (lambda q: sdpa(q, q[:, :3], q[:, :3], enable_gqa=True), RuntimeError, "4 query heads over 3 key"),
    "head size": (lambda q: sdpa(q, q[..., :8], q), RuntimeError, "need one head size"),
    "tokens": (lambda q: sdpa(q, q, q[:, :, :3]), RuntimeError, "as many tokens"),
    "dtype": (lambda q: sdpa(q, q, q.bfloat16()), RuntimeError, "differ in dtype"),
    "mask dtype": (lambda q: sdpa(q, q, q, attn_mask=q[0, 0, :, :7].long()), RuntimeError, "attn_mask must be bool"),
    "mask shape": (lambda q: sdpa(q, q, q, attn_mask=q[0, :2, :, :7]), RuntimeError, "expand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name, device):
    call, error, message = REFUSED[name]
    with mode.batch_invariant_backward_mode(), pytest.raises(error, match=message):
        call(heads(H, L, E, device))


PADDING = torch.tensor([[False] * L, [False] * 4 + [True] * 3])
#: Options of a call of nn.MultiheadAttention.
MULTIHEAD: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "padding, weights": {"key_padding_mask": PADDING, "average_attn_weights": False},
    "causal": {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True, "need_weights": False},
    "bias": {"attn_mask": torch.randn(L, L), "need_weights": False},
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention(name, device):
    """torch's numbers, forward and backward, with and without a gradient: eval's fast path is torch's own sums."""
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in MULTIHEAD[name].items()}
    layer = nn.MultiheadAttention(E, 4, batch_first=True, device=device).eval()
    x = torch.randn(B, L, E, device=device)

    def f(x, *parameters):
        return layer(x, x, x, **options)[0]

    want = run(f, (x,))
    with mode.batch_invariant_backward_mode():
        got = run(f, (x,))
        with torch.no_grad():
            out = f(x)
            first = {n: o[:1] if n == "key_padding_mask" else o for n, o in options.items()}
            assert torch.equal(layer(x[:1], x[:1], x[:1], **first)[0], out[:1])
    assert torch.equal(out, got[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_multihead_attention_has_gradients_of_its_weights(device):
    layer = nn.MultiheadAttention(E, 2, kdim=12, vdim=8, add_bias_kv=True, add_zero_attn=True, device=device)
    q, k, v = (torch.randn(n, B, d, device=device) for n, d in ((L, E), (S, 12), (S, 8)))

    def gradients():
        layer.zero_grad()
        layer(q, k, v)[0].square().sum().backward()
        grads = [p.grad for p in layer.parameters()]
        return [g.clone() for g in grads if g is not None]

    want = gradients()
    with mode.batch_invariant_backward_mode():
        got = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_gradients_in_fp32_stand_large_scores(device):
    """Scores of a hundred: the logarithm of a row's sum is rounded to 4e-6, its maximum and its sum are not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((18 * torch.rand(B, H, n, 8, generator=generator) - 9).to(device) for n in (L, S, S))

    exact = run(sdpa, [t.double() for t in (q, k, v)])

    def error(f):
        """Of dv, which the weights alone decide."""
        leaf = v.clone().requires_grad_()
        (dv,) = torch.autograd.grad(f(q, k, leaf), leaf, torch.cos(exact[0] * 9).float())
        return float((dv - exact[3]).abs().max())

    def packed(q, k, v):
        rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        starts = [torch.arange(B + 1, dtype=torch.int32, device=device) * n for n in (L, S)]
        out = attention.flash_attention(
            *rows, starts[0], cu_seqlens_k=starts[1], max_seqlen=L, max_seqlen_k=S, causal=False
        )
        return out.view(B, L, H, 8).transpose(1, 2)

    with mode.batch_invariant_backward_mode():
        assert error(sdpa) < 1e-6
    assert error(packed) > 2e-6, "negative control: one logarithm is too coarse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_is_contiguous_where_torch_has_no_fused_kernel(dtype, device):
    """Three axes, axes to broadcast, and a mask with a gradient: there torch's math serves, and `view` works on it."""
    q, k, v = (heads(H, n, 16, device).to(dtype) for n in (L, S, S))
    bias = torch.zeros(L, S, device=device, dtype=dtype, requires_grad=True)
    with mode.batch_invariant_backward_mode():
        for out in (sdpa(q[0], k[0], v[0]), sdpa(q[0], k, v), sdpa(q, k, v, attn_mask=bias)):
            assert out.is_contiguous()
        assert sdpa(q, k, v).transpose(1, 2).is_contiguous()  # what models reshape, without a copy
        assert sdpa(q, k, v, attn_mask=bias.detach()).transpose(1, 2).is_contiguous()
