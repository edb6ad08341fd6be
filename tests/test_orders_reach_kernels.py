"""Every number of an order that shapes a sum reaches the kernels: with another one, the bits are others.

Attention's orders: test_attention_orders.py; the norm of gradients: test_optim_properties.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bi_ops import logprob, matmul, moe, norm, reduction, rope
from bi_ops.core import runtime
from bi_ops.logprob import order as logprob_order
from bi_ops.matmul import launch as matmul_launch
from bi_ops.moe import launch as moe_launch
from bi_ops.norm import order as norm_order
from bi_ops.reduction import order as reduction_order

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="steps of the interpreter; a GPU has its own tests of bits"
)

ROWS, COLUMNS = 20, 3000


@dataclass(frozen=True)
class Case:
    """module, name: where the launches look the order up. changed: another order, of the one in use. results: tensors
    by name; those in `differs` must have other bits under it, the others the same. A norm's dweight takes the rows'
    sums too, so it depends on both of its orders."""

    module: Any
    name: str
    changed: Callable[[Any], Any]
    results: Callable[[], dict[str, torch.Tensor]]
    differs: frozenset[str]


def norms() -> dict[str, torch.Tensor]:
    x, g = (torch.randn(ROWS, COLUMNS).requires_grad_() for _ in range(2))
    weight = torch.randn(COLUMNS, requires_grad=True)
    y, total = norm.add_rms_norm(x, g.detach(), weight)
    dx, dweight = torch.autograd.grad((y, total), (x, weight), (g, g))
    return {"y": y, "dx": dx, "dweight": dweight}


def heads() -> dict[str, torch.Tensor]:
    qkv, g = torch.randn(40, 3 * 64, requires_grad=True), torch.randn(40, 64)
    weights = [torch.randn(64, requires_grad=True) for _ in range(2)]
    positions, cos_sin = torch.arange(40), rope.cos_sin_cache(64, 40)
    q, k, _ = norm.qk_norm_rope(qkv, *weights, positions, cos_sin, num_heads=1)
    dx, dweight, _ = torch.autograd.grad((q.flatten(1), k.flatten(1)), (qkv, *weights), (g, g))
    return {"y": q, "dx": dx, "dweight": dweight}


def log_softmaxes() -> dict[str, torch.Tensor]:
    x, g, ids = torch.randn(ROWS, COLUMNS, requires_grad=True), torch.randn(ROWS, COLUMNS), torch.arange(ROWS)
    y, picked = logprob.log_softmax(x), logprob.token_logprobs(x, ids)
    return {"y": y, "dx": torch.autograd.grad(y, x, g)[0], "picked": picked}


def sums() -> dict[str, torch.Tensor]:
    x = torch.randn(4, 300_000)
    return {"sum": reduction.sum(x, 1), "mean": reduction.mean(x, 1)}


def gemms() -> dict[str, torch.Tensor]:
    x, weight = torch.randn(100, 300, requires_grad=True), torch.randn(200, 300, requires_grad=True)
    y = matmul.linear(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), torch.randn(100, 200))
    return {"y": y, "dx": dx, "dweight": dw}


def expert_layers() -> dict[str, torch.Tensor]:
    hidden, gate_up = torch.randn(40, 300, requires_grad=True), torch.randn(3, 300, 300, requires_grad=True)
    down, routing = torch.randn(3, 300, 150), torch.rand(40, 2, requires_grad=True)
    experts = moe.router(torch.randn(40, 3), 2)[1]
    y = moe.experts(hidden, gate_up, down, routing, experts)
    dx, dw, drouting = torch.autograd.grad(y, (hidden, gate_up, routing), torch.randn(40, 300))
    weights, _ = moe.router(torch.randn(40, 60), 2, normalize=False)
    return {"weights": weights, "y": y, "dx": dx, "dweight": dw, "drouting": drouting}


def rows(**changes: int) -> Callable[[Any], Any]:
    return lambda o: replace(o, rows=replace(o.rows, **changes))


def tokens(**changes: int) -> Callable[[Any], Any]:
    return lambda o: replace(o, tokens=replace(o.tokens, **changes))


ALL, DWEIGHT = frozenset({"y", "dx", "dweight"}), frozenset({"dweight"})
CASES = {
    "norm.rows.block": Case(norm_order, "order", rows(block=256), norms, ALL),
    "norm.tokens.chunk": Case(norm_order, "order", tokens(chunk=8), norms, DWEIGHT),
    "qk_norm_rope.tokens.chunk": Case(norm_order, "order", tokens(chunk=8), heads, DWEIGHT),
    "logprob.block": Case(
        logprob_order, "order", lambda o: replace(o, block=256), log_softmaxes, frozenset({"y", "dx", "picked"})
    ),
    "reduction.lanes": Case(
        reduction_order, "order", lambda o: replace(o, lanes=o.lanes // 4), sums, frozenset({"sum", "mean"})
    ),
    "reduction.span": Case(
        reduction_order, "order", lambda o: replace(o, span=o.span // 4), sums, frozenset({"sum", "mean"})
    ),
    "moe.gemm.k_step": Case(
        *(moe_launch, "order_of", lambda o: replace(o, gemm=replace(o.gemm, k_step=2 * o.gemm.k_step)), expert_layers),
        frozenset({"y", "dx", "dweight", "drouting"}),
    ),
    "moe.router.lanes": Case(
        *(moe_launch, "order_of", lambda o: replace(o, router=replace(o.router, lanes=8)), expert_layers),
        frozenset({"weights"}),
    ),
    "moe.dot_lanes": Case(
        *(moe_launch, "order_of", lambda o: replace(o, dot_lanes=32), expert_layers),
        frozenset({"drouting"}),
    ),
    "matmul.k_step": Case(matmul_launch, "order_of", lambda o: replace(o, k_step=2 * o.k_step), gemms, ALL),
}


@pytest.mark.parametrize("name", CASES)
def test_another_order_has_other_bits(name, monkeypatch):
    case = CASES[name]
    usual = getattr(case.module, case.name)

    def results() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return case.results()

    first, again = results(), results()
    monkeypatch.setattr(case.module, case.name, lambda *given: case.changed(usual(*given)))
    other = results()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert {n for n in first if not torch.equal(first[n], other[n])} == case.differs
    for n in first:  # another order of the same sum
        torch.testing.assert_close(other[n], first[n], rtol=1e-3, atol=1e-3)
