"""The index at ties: the same alone as in a batch, in every run, for every operator that returns one."""

from __future__ import annotations

import functools

import pytest
import torch

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import mode
from bi_ops.core import runtime
from bi_ops.verify import rerun_variant, row_variant

OPERATORS = {
    "median": lambda x: x.median(-1),
    "nanmedian": lambda x: x.nanmedian(-1),
    "kthvalue": lambda x: x.kthvalue(x.shape[-1] // 2 + 1, -1),
    "mode": lambda x: x.mode(-1),
    "sort": lambda x: x.sort(-1),
    "sort, descending": lambda x: x.sort(-1, descending=True),
    "topk": lambda x: x.topk(min(4, x.shape[-1]), -1),
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(-1),
    "max": lambda x: x.max(-1),
    "min": lambda x: x.min(-1),
    "cummax": lambda x: x.cummax(-1),
    "cummin": lambda x: x.cummin(-1),
    "searchsorted": lambda x: torch.searchsorted(x.sort(-1).values.contiguous(), x),
}
WIDTHS = (5, 33, 300) if runtime.INTERPRET else (5, 33, 300, 1500, 5000, 70000)
ROWS = 40 if runtime.INTERPRET else 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tie_has_one_index(name, dtype, device):
    def found(x):
        out = OPERATORS[name](x)
        return out if isinstance(out, torch.Tensor) else tuple(out)

    for width in WIDTHS:
        x = torch.randint(0, 3, (ROWS, width), device=device).to(dtype)
        with mode.batch_invariant_backward_mode():
            assert row_variant(found, (x,), (1, 7)) == [], width
            assert rerun_variant(functools.partial(found, x), 3) == [], width


FIRST = {
    "median": lambda x, **k: x.median(**k),
    "nanmedian": lambda x, **k: x.nanmedian(**k),
    "kthvalue": lambda x, **k: x.kthvalue(2, **k),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_of_equal_elements_is_taken(name, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32):
        x = torch.tensor([[3, 1, 1, 1, 0], [2, 2, 2, 2, 2], [0, 1, 2, 3, 4]], device=device).to(dtype)
        with mode.batch_invariant_backward_mode():
            for dim, keepdim in ((1, False), (-1, True), (0, False)):
                ours = FIRST[name](x, dim=dim, keepdim=keepdim)
                with mode.batch_invariant_backward_mode(enabled=False):
                    theirs = FIRST[name](x, dim=dim, keepdim=keepdim)
                assert torch.equal(ours.values, theirs.values)
                held = x == (theirs.values if keepdim else theirs.values.unsqueeze(dim))
                first = held.int().cumsum(dim).eq(0).sum(dim, keepdim=keepdim)
                assert torch.equal(ours.indices, first)


def test_the_gradient_goes_to_the_element_of_the_index(device):
    x = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], device=device).requires_grad_()
    with mode.batch_invariant_backward_mode():
        (grad,) = torch.autograd.grad(x.median(-1).values.sum(), x)
    assert grad.tolist() == [[0, 1, 0, 0, 0]]


def test_a_nan_is_the_median_at_its_first_place(device):
    x = torch.tensor([[3.0, float("nan"), 1.0, float("nan")]], device=device)
    with mode.batch_invariant_backward_mode():
        value, index = x.median(-1)
        assert (value.isnan().item(), index.item()) == (True, 1)
        assert tuple(t.item() for t in x.nanmedian(-1)) == (1.0, 2)
        assert x.median().isnan()
        assert x.nanmedian() == 1.0


def test_into_out_too(device):
    values, indices = torch.empty(1, device=device), torch.empty(1, dtype=torch.int64, device=device)
    with mode.batch_invariant_backward_mode():
        torch.median(torch.tensor([[2.0, 2.0, 1.0]], device=device), 1, out=(values, indices))
    assert (values.item(), indices.item()) == (2.0, 0)
