"""Attention of tensors whose strides lead past 2**31 elements: the bits of contiguous ones.

The memory between elements is never touched, so that little of it exists.
"""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc"
from __future__ import annotations

import pytest
import torch
from own_attention import cu

from bi_ops import attention
from bi_ops.core import runtime

pytestmark = pytest.mark.memory

LENGTHS = [3, 70]
TOKENS, HEADS, KV_HEADS, DIM = sum(LENGTHS), 6, 3, 16
SHAPES = {"q": (TOKENS, HEADS, DIM), "k": (TOKENS, KV_HEADS, DIM), "v": (TOKENS, KV_HEADS, DIM)}


def far(t: torch.Tensor, axis: int) -> torch.Tensor:
    """A copy of t whose last index of `axis` lies past 2**31 elements; the last axis stays dense."""
    strides = list(t.contiguous().stride())
    strides[axis] = 2**31 // (t.shape[axis] - 1) // 16 * 16 + 16
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    # Not `torch.empty`, which tests fill with NaN.
    storage = torch.UntypedStorage(size * t.element_size(), device=t.device)
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, t.shape, strides).copy_(t)


def results(q, k, v, g, device, **options):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = attention.flash_attention(q, k, v, cu(LENGTHS, device), backend="triton", **options)
    return out, *torch.autograd.grad(out, (q, k, v), g)


# A GPU has room for one such tensor in 16 bits, and other head sizes have other kernels.
@pytest.mark.parametrize("dim", [DIM] if runtime.INTERPRET else [64, 96, 128, 256])
@pytest.mark.parametrize("axis", [0, 1], ids=["token", "head"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_dense(name, axis, dim, device):
    shapes = {n: (*s[:2], dim) for n, s in (SHAPES | {"g": SHAPES["q"]}).items()}
    tensors = {n: torch.randn(s, device=device).bfloat16() for n, s in shapes.items()}
    want = results(*tensors.values(), device)
    got = results(*(tensors | {name: far(tensors[name], axis)}).values(), device)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dim", [DIM] if runtime.INTERPRET else [64, 96, 128, 256])
@pytest.mark.parametrize(
    ("name", "axis"), [("q", 0), ("q", 1), *((name, axis) for name in "kv" for axis in range(3)), ("table", 0)]
)
def test_paged(name, axis, dim, device):
    """Pages of a cache and tokens of a page, for one step of decoding and for a chunk of queries."""
    page, used = 16, torch.tensor([20, 33], dtype=torch.int32, device=device)
    for n_queries in ([1, 1], [2, 30]):
        tensors = {
            "q": torch.randn(sum(n_queries), HEADS, dim, device=device).bfloat16(),
            "k": torch.randn(6, page, KV_HEADS, dim, device=device).bfloat16(),
            "v": torch.randn(6, page, KV_HEADS, dim, device=device).bfloat16(),
            "table": torch.tensor([[4, 2, 0], [1, 5, 3]], dtype=torch.int32, device=device),
        }
        rest = {"cu_seqlens_q": cu(n_queries, device), "seqlens_k": used, "max_seqlen_q": max(n_queries)}

        def run(q, k, v, table, rest=rest):
            return attention.paged_attention(q, k, v, table, **rest, backend="triton")

        want = run(**tensors)
        assert torch.equal(run(**tensors | {name: far(tensors[name], axis)}), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_decoding_has_the_same_bits_at_both_offset_widths(dim, device):
    """The Gluon kernel takes 64-bit offsets only where some stride asks for them."""
    n, page = 8, 64
    q = torch.randn(n, HEADS, dim, device=device).bfloat16()
    k, v = (torch.randn(n, page, KV_HEADS, dim, device=device).bfloat16() for _ in range(2))
    table = torch.arange(n, dtype=torch.int32, device=device)[:, None].contiguous()
    rest = (cu([1] * n, device), torch.full((n,), 50, dtype=torch.int32, device=device))
    want = attention.paged_attention(q, k, v, table, *rest, max_seqlen_q=1, backend="triton")
    for given in ((far(q, 1), table), (q, far(table, 0))):
        got = attention.paged_attention(given[0], k, v, given[1], *rest, max_seqlen_q=1, backend="triton")
        assert torch.equal(got, want)
