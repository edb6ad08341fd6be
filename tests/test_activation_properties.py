"""Gated activations: accuracy against fp64, bits that do not depend on the batch and equal vLLM's."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from bi_ops.activation import reference, silu_and_mul
from bi_ops.core import runtime
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

D, M = (200, 300) if runtime.INTERPRET else (6144, 8192)
RERUNS = 2 if runtime.INTERPRET else 100
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 16), (300, 400), (1, 2), (6,)])
def test_gradients_match_fp64(dtype, shape, device):
    x = randn(*shape, dtype=dtype, device=device) * 3
    errors = gradient_errors(silu_and_mul, reference.silu_and_mul, {"x": x})
    assert all(e.ok for e in errors), errors


def test_silu_is_rounded_before_the_product(device):
    x = randn(64, 128, device=device)
    gate, up = x.chunk(2, -1)
    ours = silu_and_mul(torch.cat((gate, torch.ones_like(up)), -1))
    assert bits_equal(silu_and_mul(x), (ours.float() * up.float()).to(x.dtype))


def test_rows_of_a_larger_tensor_and_empty_batches(device):
    wide = randn(6, 96, device=device)
    assert bits_equal(silu_and_mul(wide[:, 32:64]), silu_and_mul(wide[:, 32:64].contiguous()))
    assert bits_equal(silu_and_mul(wide.t()), silu_and_mul(wide.t().contiguous()))
    assert silu_and_mul(wide[:0]).shape == (0, 48)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
def test_large_and_special_gates(device):
    gates = [0.0, -0.0, 1e-30, 88.0, -88.0, 3e38, -3e38, float("inf"), float("nan")]
    x = torch.tensor([gates, [2.0] * len(gates)], device=device).reshape(1, -1)
    torch.testing.assert_close(silu_and_mul(x), reference.silu_and_mul(x), equal_nan=True)


def with_gradient(x, g):
    x = x.clone().requires_grad_()
    y = silu_and_mul(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def test_rows_do_not_depend_on_the_batch(device):
    rows = (randn(M, 2 * D, device=device), randn(M, D, device=device))
    counts = ((1, 17, 257),) if runtime.INTERPRET else ()
    assert row_variant(with_gradient, rows, *counts) == []
    assert order_variant(with_gradient, rows, trials=1) == []


def test_an_activation_that_changes_its_precision_at_256_rows_is_caught(device):
    """Negative control: a kernel choice made by the row count."""

    def changes_precision(x):
        gate, up = x.chunk(2, -1)
        if x.shape[0] < 256:
            return torch.nn.functional.silu(gate) * up
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)

    assert row_variant(changes_precision, (randn(300, 128, device=device),), (1, 16, 255, 256)) == [1, 16, 255]


def test_gradients_are_the_same_on_every_run(device):
    x, g = randn(M, 2 * D, device=device), randn(M, D, device=device)
    assert rerun_variant(lambda: with_gradient(x, g), RERUNS) == []


def test_the_operator_is_registered_and_compiles(device):
    x = randn(5, 24, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.bi_ops.silu_and_mul, (x,))
    compiled = torch.compile(lambda t: silu_and_mul(t), fullgraph=True, backend=BACKEND)
    g = torch.ones(5, 12, device=device, dtype=x.dtype)
    assert bits_equal(compiled(x), silu_and_mul(x))
    assert bits_equal(torch.autograd.grad(compiled(x), x, g)[0], torch.autograd.grad(silu_and_mul(x), x, g)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: silu_and_mul(x.long()), TypeError, "int64"),
        (lambda x: silu_and_mul(x[:, :7]), ValueError, "even"),
        (lambda x: silu_and_mul(x[:, :0]), ValueError, "even"),
        (lambda x: silu_and_mul(cast(Any, [1.0, 2.0])), TypeError, "must be a tensor"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 8, device=device))


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_equal_vllms_kernel(dtype, device):
    import vllm._custom_ops  # noqa: F401  (registers torch.ops._C)

    def vllms(x):
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        torch.ops._C.silu_and_mul(out, x)
        return out

    if dtype is not torch.float32:
        every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)[None]
        for up in (1.0, -3.140625, 1e-3):
            x = torch.cat((every, torch.full_like(every, up)), -1)
            ours, theirs = silu_and_mul(x), vllms(x)
            same = (ours.view(torch.int16) == theirs.view(torch.int16)) | (ours.isnan() & theirs.isnan())
            assert same.all(), every[~same].tolist()[:20]
    for m, d in ((1, 3072), (17, 6144), (300, 12288), (5, 100)):
        x = randn(m, 2 * d, dtype=dtype, device=device) * 4
        assert bits_equal(silu_and_mul(x), vllms(x)), (m, d)
