"""Operators: past torch's dispatcher or through it the same, and on the GPU that holds their tensors."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc"
from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bi_ops import attention, embedding, logprob, matmul, reduction
from bi_ops.core import operators
from bi_ops.core.backends import Support
from bi_ops.core.operators import custom_op, is_plain, on_device_of_first
from bi_ops.matmul import TOKEN_STEP, cublaslt
from bi_ops.matmul.backends import CublasLt
from bi_ops.matmul.linear import through_binding
from bi_ops.models.packing import pack
from bi_ops.verify.properties import bits_equal

# --------------------------------------------------------------------------------------------------------------
# past the dispatcher and through it


@custom_op("bi_ops_tests::scaled")
def scaled(x: torch.Tensor, by: torch.Tensor | None = None, power: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    by = torch.ones_like(x) if by is None else by
    return x * by**power, by.sum()


@scaled.register_fake
def _(x, by=None, power=1.0):
    return torch.empty_like(x), x.new_empty(())


def setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.power = inputs[2]
    ctx.mark_non_differentiable(output[1])


def backward(ctx, g, _):
    x, by = ctx.saved_tensors
    return scaled(g, by, ctx.power)[0], squared(x, g) if ctx.needs_input_grad[1] else None, None


scaled.register_autograd(backward, setup_context=setup)


@custom_op("bi_ops_tests::squared")
def squared(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The gradient of `by`, at power 1. It has none of its own."""
    return x * g


@squared.register_fake
def _(x, g):
    return torch.empty_like(x)


@custom_op("bi_ops_tests::add_to", mutates_args=("total",))
def add_to(x: torch.Tensor, total: torch.Tensor) -> None:
    total.add_(x)


@add_to.register_fake
def _(x, total):
    return None


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The operators that are called through torch's dispatcher, from now on."""
    names = []

    class Watched:
        def __init__(self, op):
            self._op = op

        def __call__(self, *args):
            names.append(self._op._opoverload.name())
            return self._op(*args)

    for op in (scaled, squared, add_to):
        monkeypatch.setattr(op, "_op", Watched(op._op))
    return names


def results(x, by) -> list[torch.Tensor]:
    x, by = x.clone().requires_grad_(), by.clone().requires_grad_()
    out, total = scaled(x, by, 1.0)
    assert not total.requires_grad
    return [out.detach(), total, *torch.autograd.grad(out, (x, by), torch.cos(out.detach()))]


def test_both_ways_give_the_same(dispatched, device, monkeypatch):
    x, by = torch.randn(2, 5, device=device)
    direct = results(x, by)
    assert dispatched == []
    monkeypatch.setattr(operators, "dispatcher_is_watched", lambda: True)
    assert all(map(torch.equal, results(x, by), direct))
    assert dispatched == ["bi_ops_tests::scaled", "bi_ops_tests::scaled", "bi_ops_tests::squared"]


def test_an_argument_that_needs_no_gradient_gets_none(device):
    x = torch.randn(5, device=device, requires_grad=True)
    out, _ = scaled(x, None, 2.0)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))
    with torch.no_grad():
        assert not scaled(x, None, 2.0)[0].requires_grad


def test_arguments_may_be_left_out(device):
    x, by = torch.randn(2, 5, device=device).requires_grad_()
    for args in ((x,), (x, by), (x, by, 1.0)):
        given = [t for t in args if isinstance(t, torch.Tensor)]
        grads = torch.autograd.grad(scaled(*args)[0].sum(), given)
        assert torch.equal(grads[0], by if len(given) == 2 else torch.ones_like(x))
    with pytest.raises(TypeError, match="missing"):
        scaled()


def test_a_gradient_that_nobody_defined_is_refused(device):
    """And not silently zero: of an operator, and of another's backward."""
    x, by = torch.randn(2, 5, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="squared: has no derivative"):
        squared(x, by).sum().backward()
    grads = torch.autograd.grad(scaled(x, by, 1.0)[0].sum(), (x, by), create_graph=True)
    with pytest.raises(RuntimeError, match="squared: has no derivative"):
        grads[1].sum().backward()


def test_a_write_is_seen_by_autograd(device):
    x = torch.randn(5, device=device, requires_grad=True)
    total = torch.zeros(5, device=device)
    out = (x * total).sum()
    version = total._version
    add_to(x.detach(), total)
    assert total._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_what_the_dispatcher_resolves_converts_or_refuses_is_left_to_it(dispatched, device):
    x = torch.randn(5, device=device)
    assert torch.equal(scaled(torch._neg_view(x), None, 1.0)[0], -x)
    assert scaled(torch.empty(3, 4, device="meta"), None, 1.0)[0].shape == (3, 4)
    for power in (2, numpy.float32(2), torch.tensor(2.0)):
        assert torch.equal(scaled(x, x, power)[0], x * x**2)
    with pytest.raises(RuntimeError, match="Expected a value of type 'float' for argument 'power'"):
        scaled(x, None, "2")
    assert dispatched == ["bi_ops_tests::scaled"] * 6


class Subclass(torch.Tensor):
    pass


def through_compile(x, by):
    return torch.compile(lambda a, b: scaled(a, b, 1.0)[0], fullgraph=True, backend="aot_eager")(x, by)


def through_trace(x, by):
    return torch.jit.trace(lambda a, b: scaled(a, b, 1.0)[0], (x + 1, by))(x, by)


def through_a_mode(x, by):
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        out = scaled(x, by, 1.0)[0]
    assert seen == ["bi_ops_tests::scaled"]
    return out


def through_a_function_mode(x, by):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        out = scaled(x, by, 1.0)[0]
    assert any("scaled" in name for name in seen)
    return out


def through_a_subclass(x, by):
    return scaled(x.as_subclass(Subclass), by, 1.0)[0].as_subclass(torch.Tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "call", [through_compile, through_trace, through_a_mode, through_a_function_mode, through_a_subclass]
)
def test_whoever_watches_the_dispatcher_sees_the_operator(call, device):
    x, by = torch.randn(2, 5, device=device)
    assert torch.equal(call(x, by), x * by)


def test_the_binding_is_not_asked_where_the_operator_is_to_be_seen(device, monkeypatch):
    """It is C++ that no mode sees into: a trace through it would lack the GEMM."""
    asked = []
    binding = SimpleNamespace(linear=lambda x, weight: asked.append(x))
    monkeypatch.setattr(cublaslt, "loaded", lambda: binding)

    class Chosen(CublasLt):
        def available(self):
            return Support(True)

    x, weight = torch.randn(2, 4, 4, device=device).bfloat16()
    matmul.backends.register(Chosen(), first=True)
    try:
        assert through_binding(x, weight) is None
        assert len(asked) == 1
        with FlopCounterMode(display=False):
            assert through_binding(x, weight) is None
        assert through_binding(torch._neg_view(x), weight) is None
        assert len(asked) == 1
    finally:
        matmul.backends.register(CublasLt(), first=True)


def judged(device) -> list[tuple[str, object, bool]]:
    """(what it is, an object, is it a plain tensor)."""
    t = torch.randn(4, 4, device=device)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(t)
    return [
        ("tensor", t, True),
        ("parameter", torch.nn.Parameter(t), True),
        ("strided view", t[::2].t(), True),
        ("subclass", t.as_subclass(Subclass), False),
        ("meta tensor", torch.empty(2, device="meta"), False),
        ("negative view", torch._neg_view(t), False),
        ("fake tensor", fake, False),
        ("number", 3.0, False),
        ("None", None, False),
    ]


def test_what_is_plain(device):
    assert [what for what, t, plain in judged(device) if is_plain(t) is not plain] == []


def test_shapes_alone_are_enough_to_trace(device):
    with torch._subclasses.FakeTensorMode():
        assert scaled(torch.empty(3, 4), None, 1.0)[0].shape == (3, 4)


# --------------------------------------------------------------------------------------------------------------
# the GPU


PROMPTS, COMPLETIONS = [[1, 2, 3], [4], [5, 6]], [[7] * 5, [*range(8, 38)], [9, 10]]


@pytest.mark.parametrize(
    ("where", "entered"),
    [("cpu", []), ("cuda:0", []), ("cuda:1", ["cuda:1"])],
)
def test_the_gpu_of_the_first_tensor_is_made_current(where, entered, monkeypatch):
    seen = []

    def make_current(device):
        seen.append(str(device))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", make_current)
    device = torch.device(where)
    first = SimpleNamespace(device=device, is_cuda=device.type == "cuda")
    assert on_device_of_first(lambda t, a, b: (t, a, b))(first, 1, 2) == (first, 1, 2)
    assert seen == entered


def trained(device: torch.device) -> dict[str, torch.Tensor]:
    """Weights' gradients of a model with and without fp32 buffers, and what it does not call."""
    model = tiny_model().to(device)
    batch = pack(PROMPTS, COMPLETIONS, device, align=TOKEN_STEP)
    found: dict[str, Any] = {}
    for carried in (False, True):
        model.zero_grad()
        if carried:
            model.allocate_main_grads()
        scores = model.token_logprobs(batch)
        scores.sum().backward()
        if carried:
            model.collect_main_grads()
        found |= {f"{name}, carried {carried}": p.grad for name, p in model.named_parameters()}
        found[f"scores, carried {carried}"] = scores.detach()
    return found


def others(device: torch.device) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, 128, generator=gen).to(device, torch.bfloat16)
    pages = torch.randn(2, 8, 16, 2, 128, generator=gen).to(device, torch.bfloat16)
    table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    starts = torch.tensor([0, 1, 33], dtype=torch.int32, device=device)
    lengths = torch.tensor([50, 64], dtype=torch.int32, device=device)
    q = torch.randn(33, 4, 128, generator=gen).to(device, torch.bfloat16)
    return {
        "bmm": matmul.bmm(x, x.mT),
        "sum": reduction.sum(x.float(), dim=1),
        "softmax": logprob.softmax(x),
        "embedding": embedding.embedding(torch.tensor([3, 5, 3], device=device), x[0]),
        "paged": attention.paged_attention(q, *pages, table, starts, lengths, max_seqlen_q=32),
    }


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("computed", [trained, others])
def test_bits_on_a_gpu_that_is_not_the_current_one(computed):
    found = []
    for current, place in ((0, 0), (1, 1), (0, 1), (1, 0)):
        with torch.cuda.device(current):
            found.append({k: t.cpu() for k, t in computed(torch.device("cuda", place)).items()})
            assert torch.cuda.current_device() == current
    for other in found[1:]:
        assert [name for name in other if not bits_equal(other[name], found[0][name])] == []
