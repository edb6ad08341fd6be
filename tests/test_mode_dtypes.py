"""Results have torch's dtype: its promotion and its autocast, under the mode and in the layers of bi_ops.nn."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bi_ops
from bi_ops import mode
from bi_ops.core import dtypes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: Functions of x [6, 8] and w [5, 8], in the dtype of each; b has that of w.
FUNCTIONS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "mm": lambda x, w, b: torch.mm(x, w.t()),
    "matmul": lambda x, w, b: x[None] @ w.t(),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "bmm": lambda x, w, b: torch.bmm(x[None], w.t()[None]),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.t()[None]),
    "mv": lambda x, w, b: torch.mv(x, w[0]),
    "dot": lambda x, w, b: torch.dot(x[0], w[0]),
    "einsum": lambda x, w, b: torch.einsum("bd,nd->bn", x, w),
    "rms_norm": lambda x, w, b: F.rms_norm(x, (8,), w[0]),
    "rms_norm, no weight": lambda x, w, b: F.rms_norm(x, (8,)),
    "softmax": lambda x, w, b: F.softmax(x, -1) + x.softmax(0),
    "log_softmax": lambda x, w, b: torch.log_softmax(x, -1),
    "softmax, dtype": lambda x, w, b: F.softmax(x, -1, dtype=FP32),
    "logsumexp": lambda x, w, b: torch.logsumexp(x, -1),
    "sum": lambda x, w, b: x.sum(0) + x.sum(),
    "sum, dtype": lambda x, w, b: x.sum(0, dtype=FP32),
    "mean": lambda x, w, b: x.mean(-1),
    "mse_loss": lambda x, w, b: F.mse_loss(x[:5], w),
    "smooth_l1_loss": lambda x, w, b: F.smooth_l1_loss(x[:5], w, reduction="sum"),
    "huber_loss": lambda x, w, b: F.huber_loss(x[:5], w.to(x.dtype)),
    "soft_margin_loss": lambda x, w, b: F.soft_margin_loss(x[:5], w),
    "binary_cross_entropy_with_logits": lambda x, w, b: F.binary_cross_entropy_with_logits(x[:5], w.sigmoid()),
    "cross_entropy": lambda x, w, b: F.cross_entropy(x, torch.arange(6, device=x.device)),
    "nll_loss": lambda x, w, b: F.nll_loss(x, torch.arange(6, device=x.device), reduction="sum"),
    "embedding": lambda x, w, b: F.embedding(torch.tensor([0, 3], device=w.device), w),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(x.repeat(1, 1, 1, 2), *[w.repeat(1, 1, 1, 2)] * 2),
    "broadcast": lambda x, w, b: x * w[0],
}


def outcome(fn, *args):
    """(the dtype and value, None), or (None, the error's type); gradients' dtypes with the former."""
    leaves = [a.detach().requires_grad_() for a in args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = fn(*leaves)
            out.float().sum().backward()
        except Exception as error:
            return None, type(error)
    return out.detach(), [None if t.grad is None else t.grad.dtype for t in leaves]


@pytest.mark.parametrize("autocast", [None, BF16, pytest.param(FP16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_torchs_dtype(name, autocast, device):
    x, w, b = (torch.randn(*shape, device=device) for shape in ((6, 8), (5, 8), (5,)))
    on = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    for kinds in ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16), (FP16, BF16)):
        given = x.to(kinds[0]), w.to(kinds[1]), b.to(kinds[1])
        with on:
            theirs, their_grads = outcome(FUNCTIONS[name], *given)
            with mode.batch_invariant_backward_mode():
                ours, our_grads = outcome(FUNCTIONS[name], *given)
        if theirs is None:  # torch refuses these dtypes together
            assert ours is None, f"{kinds}: {ours} where torch raises"
            continue
        assert ours is not None, f"{kinds}: {our_grads}, torch takes them"
        assert ours.dtype == theirs.dtype, kinds
        assert our_grads == their_grads, kinds
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


LAYERS = {
    "Linear": lambda **k: nn.Linear(8, 5, **k),
    "Linear, no bias": lambda **k: nn.Linear(8, 5, bias=False, **k),
    "RMSNorm": lambda **k: nn.RMSNorm(8, **k),
    "RMSNorm, two axes": lambda **k: nn.RMSNorm((6, 8), **k),
    "RMSNorm, no weight": lambda **k: nn.RMSNorm(8, elementwise_affine=False, **k),
}


@pytest.mark.parametrize("autocast", [None, BF16, pytest.param(FP16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_has_torchs_dtype(name, autocast, device):
    on = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    for x_dtype, w_dtype in ((FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, BF16)):
        theirs = LAYERS[name](device=device, dtype=w_dtype)
        ours = LAYERS[name](device=device, dtype=w_dtype)
        ours.load_state_dict(theirs.state_dict())
        bi_ops.nn.convert(ours)
        x = torch.randn(6, 8, device=device, dtype=x_dtype)
        with on:
            expected, _ = outcome(theirs, x)
            found, _ = outcome(ours, x)
        if expected is None:  # an fp32 weight under a 16-bit input is a master weight here, torch refuses it
            continue
        assert found is not None, (x_dtype, w_dtype)
        assert found.dtype == expected.dtype, (x_dtype, w_dtype)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_converted_embedding_ignores_autocast_as_torchs(device):
    layer = bi_ops.nn.convert(nn.Embedding(4, 8, device=device))
    with torch.autocast(device.type, BF16):
        assert layer(torch.tensor([1], device=device)).dtype == FP32


def test_attention_under_autocast_has_autocasts_dtype(device):
    layer = bi_ops.nn.Attention(2, 16)
    q, starts = torch.randn(5, 2, 16, device=device), torch.tensor([0, 5], dtype=torch.int32, device=device)
    with torch.autocast(device.type, BF16):
        out = layer(q, q, q, starts)
        x = q.transpose(0, 1)[None]
        expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert out.dtype == expected.dtype == BF16
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=0.02, atol=0.02)


def test_a_linear_under_autocast_keeps_its_main_grad(device):
    layer = bi_ops.nn.Linear(8, 5, device=device)
    bi_ops.nn.allocate_main_grads(layer)
    with torch.autocast(device.type, BF16):
        layer(torch.ones(16, 8, device=device)).float().sum().backward()
    assert isinstance(layer.main_grad, bi_ops.nn.MainGrad)
    assert torch.equal(layer.main_grad.collect(), torch.full((5, 8), 16.0, device=device))


def test_where_autocast_computes_in_fp32_is_asked_of_torch(device):
    x = torch.ones(2, 8, device=device, dtype=BF16)
    with torch.autocast(device.type, BF16):
        own = F.rms_norm(x, (8,)).dtype
    assert (own == FP32) == (device.type in dtypes.IN_FP32["aten::rms_norm"])


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_compile_under_autocast(autocast, device):
    layer = torch.nn.Sequential(bi_ops.nn.Linear(16, 8, device=device), bi_ops.nn.RMSNorm(8, device=device))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 16, device=device)
    with torch.autocast(device.type, BF16, enabled=autocast):
        ours, eager = compiled(x), layer(x)
    assert ours.dtype == eager.dtype
    assert torch.equal(ours, eager)
    torch._dynamo.reset()
