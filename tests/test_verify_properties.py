"""The checks themselves: what they find, and that they refuse to find nothing by comparing nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from bi_ops.verify import order_variant, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal, gradient_errors


def test_bits_are_compared_and_not_values():
    zero, nan = torch.zeros(1), torch.tensor([float("nan")])
    assert bits_equal(nan, nan.clone())
    assert not bits_equal(zero, -zero)
    assert not bits_equal(zero, zero.double())
    assert not bits_equal(zero, torch.zeros(1, 1))


def test_a_row_that_sees_its_place_or_its_neighbours_is_caught():
    x = torch.randn(20, 3)
    assert row_variant(lambda t: t * 2, (x,), (1, 8, 19)) == []
    assert row_variant(lambda t: t + len(t), (x,), (1, 8, 20)) == [1, 8]
    assert order_variant(lambda t: t * 2, (x,)) == []
    assert order_variant(lambda t: t + torch.arange(20.0)[:, None], (x,)) == [0, 1, 2]


def test_a_result_that_changes_by_run_is_caught():
    results = iter([1.0, 1.0, 2.0, 1.0])
    assert rerun_variant(lambda: torch.tensor(next(results)), 4) == [2]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: row_variant(torch.neg, (x,), ()),
        lambda x: row_variant(torch.neg, (x,), (4, 5)),
        lambda x: order_variant(torch.neg, (x,), trials=0),
        lambda x: order_variant(torch.neg, (x[:1],)),
        lambda x: rerun_variant(lambda: x, 1),
    ],
)
def test_a_comparison_of_nothing_is_refused(call):
    with pytest.raises(ValueError, match="nothing to compare"):
        call(torch.ones(4, 2))


def test_numbers_are_drawn_on_the_cpu_whatever_device_is_the_default():
    """As under `torch.device("cuda")`: seeds mean the same numbers everywhere."""
    row = torch.randn(40, 8)
    want = [t.clone() for t in tiny_model(3).state_dict().values()]
    model = tiny_model(4)
    errors = gradient_errors(lambda x: x * x, lambda x: x * x, {"x": row})
    with torch.device("meta"):
        model.init_weights(3)
        assert gradient_errors(lambda x: x * x, lambda x: x * x, {"x": row}) == errors
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), want, strict=True))
