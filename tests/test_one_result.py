"""One name, one result: whichever door an operator is called through, outputs and gradients have the same bits.

The doors are in operator_doors.py.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_doors import ONE_DOOR_ATEN, ONE_DOOR_FUNCTIONS, OPERATORS, SHAPES, Make, Operator
from sweeps import sweep

import bi_ops
from bi_ops import logprob, matmul, mode, nn, reduction
from bi_ops.mode.functions import FUNCTIONS
from bi_ops.mode.served import SERVED

Tensor = torch.Tensor


# --------------------------------------------------------------------------------------------------------------
# through one door


def is_torchs(door: str) -> bool:
    return door.startswith("torch")


def results(door: str, fn: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of what has one; torch's doors under the mode."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    with mode.batch_invariant_backward_mode() if is_torchs(door) else contextlib.nullcontext():
        out = fn(*leaves.values())  # many of torch's functions have other names for them
        outs = (out,) if isinstance(out, Tensor) else tuple(out)
        of = [n for n, t in leaves.items() if t.requires_grad and outs[0].requires_grad]
        grads = torch.autograd.grad(outs, [leaves[n] for n in of], cotangents(outs), allow_unused=True) if of else ()
    found = {f"out {i}": t.detach() for i, t in enumerate(outs)}
    return found | {f"gradient of {n}": g for n, g in zip(of, grads, strict=True) if g is not None}


def cotangents(outs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(t.shape, generator=generator).to(t) for t in outs]


def through_buffers(op: Operator, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `results`, with gradients summed in fp32 buffers, then rounded."""
    assert op.main_grad is not None
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    buffers = {n: torch.zeros(leaves[n].shape, device=leaves[n].device) for n in op.buffers}
    out = op.main_grad(*leaves.values(), *buffers.values())
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    torch.autograd.backward(outs, cotangents(outs))
    assert all(leaves[n].grad is None for n in buffers)
    found = {f"out {i}": t.detach() for i, t in enumerate(outs)}
    grads = {n: buffers[n].to(t.dtype) if n in buffers else t.grad for n, t in leaves.items()}
    return found | {f"gradient of {n}": g for n, g in grads.items() if g is not None}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs, in bits, dtype or shape, or is missing."""
    return [
        name
        for name in sorted({*found, *expected})
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or not torch.equal(found[name], expected[name])
    ]


def wrong_doors(name: str, shape: str, dtype: torch.dtype, device: torch.device) -> dict[str, list[str]]:
    """The doors whose bits are not those of the first, and what differs."""
    op = OPERATORS[name]
    inputs = op.inputs(Make(SHAPES[shape], dtype, device))
    (first, ours), *others = op.doors.items()
    expected = results(first, ours, inputs)
    assert all(t.isfinite().all() for t in expected.values())
    found = {door: results(door, fn, inputs) for door, fn in others}
    if op.main_grad is not None:
        found["main_grad"] = through_buffers(op, inputs)
    return {door: bad for door, f in found.items() if (bad := differing(f, expected))}


EVERY = [(name, dtype, shape) for name, op in OPERATORS.items() for dtype in op.dtypes for shape in op.shapes]


@sweep(("name", "dtype", "shape"), EVERY, [e for e in EVERY if e[1] is torch.bfloat16 or e[2] == "strided"])
def test_every_door_has_one_result(name, dtype, shape, device):
    assert wrong_doors(name, shape, dtype, device) == {}


@sweep("backend", ["eager", "aot_eager"], ["aot_eager"])
@pytest.mark.parametrize("name", [n for n, op in OPERATORS.items() if op.compiled])
def test_compiling_changes_no_bit(name, backend, device):
    """aot_eager traces with dynamo, as eager does, and takes the gradients apart as well."""
    torch._dynamo.reset()
    op = OPERATORS[name]
    inputs = op.inputs(Make(SHAPES["rows"], torch.bfloat16, device))
    door, ours = next(iter(op.doors.items()))
    compiled = torch.compile(lambda *leaves: ours(*leaves), backend=backend)
    assert differing(results(door, compiled, inputs), results(door, ours, inputs)) == []


def test_a_gradient_of_a_gradient_has_one_result(device):
    """And is there: a penalty on gradients goes through the operators of bi_ops under the mode."""
    make = Make(SHAPES["rows"], torch.float32, device)
    x, w = make.matrix().requires_grad_(), make.randn(make.shape.n, make.shape.k).requires_grad_()

    def penalty(product):
        (dx,) = torch.autograd.grad(product(x, w).pow(3).mean(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), (x, w))

    plain = penalty(F.linear)
    with mode.batch_invariant_backward_mode():
        ours, theirs = penalty(matmul.linear), penalty(F.linear)
    for a, b, c in zip(ours, theirs, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------
# negative controls: a door with another order, or another formula


def test_torchs_own_sum_is_another_result(device):
    x = torch.randn(5, 3001, device=device)
    expected = results("bi_ops", lambda x: reduction.sum(x, 1), {"x": x})
    with mode.batch_invariant_backward_mode(), mode.batch_invariant_backward_mode(enabled=False):
        plain = results("plain", lambda x: torch.sum(x, 1), {"x": x})
    assert differing(plain, expected) == ["out 0"]


def test_a_bias_added_before_the_rounding_is_caught(device):
    inputs = OPERATORS["addmm"].inputs(Make(SHAPES["rows"], torch.bfloat16, device))
    expected = results("bi_ops", matmul.addmm, inputs)

    def fused(bias, a, b):
        return (matmul.mm(a.float(), b.float()) + bias.float()).to(a.dtype)

    assert "out 0" in differing(results("bi_ops", fused, inputs), expected)


def test_a_softmax_whose_gradient_is_written_in_torch_is_caught(device):
    inputs = {"x": torch.randn(37, 400, device=device)}

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = logprob.log_softmax(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g - y.exp() * reduction.sum(g, -1, keepdim=True)

    assert differing(results("bi_ops", Own.apply, inputs), results("bi_ops", logprob.log_softmax, inputs)) == [
        "gradient of x"
    ]


# --------------------------------------------------------------------------------------------------------------
# the table is complete


def doors() -> set[str]:
    return {door for op in OPERATORS.values() for door in op.doors}


def resolved(name: str) -> Any:
    """``torch.Tensor.mm`` as the object of that name; None for a door that is no name."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def test_every_public_function_has_its_doors_in_the_table():
    families = sorted(p.parent.name for p in Path(bi_ops.__file__).parent.glob("*/ops.py"))
    public = set()
    for family in families:
        package = importlib.import_module(f"bi_ops.{family}")
        functions = [n for n in package.__all__ if callable(getattr(package, n)) and not n[0].isupper()]
        public |= {f"{family}.{n}" for n in functions}
    listed = {door.removeprefix("bi_ops.") for door in doors() if door.startswith("bi_ops.")}
    assert public - listed - ONE_DOOR_FUNCTIONS.keys() == set()
    assert listed & ONE_DOOR_FUNCTIONS.keys() == set()
    layers = {f"nn.{n}" for n in nn.__all__ if n[0].isupper() and issubclass(getattr(nn, n), torch.nn.Module)}
    assert layers <= listed


def test_every_function_that_the_mode_replaces_has_its_doors_in_the_table():
    through = [resolved(door) for door in doors() if door.startswith("torch.")]
    # bi_ops has no function of these.
    products = (torch.prod, torch.Tensor.prod, torch.cumprod, torch.Tensor.cumprod)
    one_door = (*products, torch.linalg.multi_dot, torch.chain_matmul, torch.einsum)
    assert [f for f in FUNCTIONS if f not in through and f not in one_door] == []


def test_every_aten_operator_that_is_served_has_its_doors_in_the_table():
    served = {op._schema.name.removeprefix("aten::") for op in SERVED}
    served = {name.removesuffix("_") if name.removesuffix("_") in served else name for name in served}
    listed = frozenset().union(*(op.serves for op in OPERATORS.values()))
    assert served - listed - ONE_DOOR_ATEN == set()
    assert (listed | ONE_DOOR_ATEN) - served == set()
