"""Sums and means: accuracy against fp64, and bits that do not depend on what else is reduced."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import reduction
from bi_ops.core import runtime
from bi_ops.reduction import ops, order_of, reference
from bi_ops.reduction.config import SumConfig
from bi_ops.verify import ROW_COUNTS, gradient_errors, order_variant, rerun_variant, row_variant

N, M = (1500, 300) if runtime.INTERPRET else (20_000, 8192)
RERUNS = 2 if runtime.INTERPRET else 100
LONG = 3 * order_of(1).span + 17  # several spans


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "dim"), [((7, 40), -1), ((9, 5, 6), 1), ((3, 4, 5, 6), (0, 2)), ((33, 3), None), ((5,), 0), ((4, 0), 1)]
)
def test_values_and_gradients_match_fp64(dtype, shape, dim, device):
    inputs = {"x": randn(*shape, dtype=dtype, device=device)}
    for name in ("sum", "mean"):
        ours, plain = getattr(reduction, name), getattr(reference, name)
        if 0 in shape:
            torch.testing.assert_close(ours(inputs["x"], dim), plain(inputs["x"], dim), equal_nan=True)
            continue
        errors = gradient_errors(lambda x, f=ours: f(x, dim), lambda x, f=plain: f(x, dim), inputs)
        # A bf16 sum that torch rounds exactly leaves no error to double: one rounding of the dtype is allowed.
        assert all(e.ok or e.ours <= torch.finfo(dtype).eps for e in errors), errors


@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (2, 0), (0, 1), (1, 2), ()])
@pytest.mark.parametrize("keepdim", [False, True])
def test_shapes_are_torchs(dim, keepdim, device):
    x = randn(3, 5, 4, dtype=torch.float32, device=device)
    for name in ("sum", "mean"):
        got = getattr(reduction, name)(x, dim, keepdim)
        torch.testing.assert_close(got, getattr(reference, name)(x, dim, keepdim))
    scalar = torch.tensor(2.5, device=device)
    assert torch.equal(reduction.sum(scalar), scalar)
    assert torch.equal(reduction.mean(scalar, 0), scalar)


def test_several_spans_match_fp64(device):
    x = randn(2, LONG, dtype=torch.float32, device=device)
    torch.testing.assert_close(reduction.sum(x, 1).double(), x.double().sum(1), rtol=1e-4, atol=1e-3)
    assert torch.equal(reduction.sum(x, 1)[1], reduction.sum(x[1]))


def test_a_sum_does_not_depend_on_the_others(device):
    x = randn(M, N, dtype=torch.float32, device=device)
    counts = (1, 17, 257) if runtime.INTERPRET else ROW_COUNTS
    assert row_variant(lambda x: (reduction.sum(x, 1), reduction.mean(x, 1)), (x,), counts) == []
    assert order_variant(lambda x: reduction.sum(x, 1), (x,), trials=1) == []


def test_a_sum_does_not_depend_on_where_it_lies(device):
    """The same numbers as a row, a column, the middle of a block and a strided view."""
    x = randn(6, N, dtype=torch.float32, device=device)
    rows = reduction.sum(x, 1)
    assert torch.equal(reduction.sum(x.t().contiguous(), 0), rows)
    assert torch.equal(reduction.sum(x.t()[:, :1].contiguous(), 0), rows[:1])
    assert torch.equal(reduction.sum(x.view(2, 3, N).transpose(1, 2).contiguous(), 1).flatten(), rows)
    assert torch.equal(reduction.sum(torch.stack([x, x], -1)[..., 0], 1), rows)
    assert torch.equal(reduction.sum(x.view(6, 2, N // 2).permute(1, 0, 2).contiguous(), (0, 2)), rows)


def test_the_config_changes_no_bit(device):
    x = randn(5, 300, 3, dtype=torch.float32, device=device)
    expected = reduction.sum(x, 1)
    for config in (SumConfig(1, False), SumConfig(16, False, 1), SumConfig(2, True, 8)):
        assert torch.equal(ops.launch(x, x.dtype, config), expected), config


def test_a_sum_split_by_the_row_count_is_caught(device):
    """Negative control: two halves when there are few rows."""

    def split(x):
        if x.shape[0] >= 16:
            return reduction.sum(x, 1)
        return reduction.sum(x[:, : N // 3], 1) + reduction.sum(x[:, N // 3 :], 1)

    assert row_variant(split, (randn(32, N, dtype=torch.float32, device=device),), (8, 12, 16, 17)) == [8, 12]


def test_the_result_is_the_same_on_every_run(device):
    x = randn(4, LONG // 2, device=device)
    assert rerun_variant(lambda: (reduction.sum(x), reduction.mean(x, 0)), RERUNS) == []


def test_dtype_is_that_of_the_rounding(device):
    x = randn(4, 700, device=device)
    wide = reduction.sum(x, 1, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(reduction.sum(x, 1), wide.bfloat16())
    assert torch.equal(reduction.mean(x, 1), (wide / 700).bfloat16())


def test_under_torch_compile(device):
    x = randn(5, 70, device=device).requires_grad_()

    def fn(x):
        return reduction.sum(x, 1) + reduction.mean(x)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fn(x))
    ours, theirs = torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(fn(x).sum(), x)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: reduction.sum(x.long()), TypeError, "int64"),
        (lambda x: reduction.sum(x, 2), ValueError, "out of range"),
        (lambda x: reduction.mean(x, (0, -2)), ValueError, "twice"),
        (lambda x: reduction.sum(x, dtype=torch.float64), TypeError, "float64"),
        (lambda x: reduction.mean(cast(Any, [1.0])), TypeError, "must be a tensor"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 8, device=device))
