"""torch.func and second derivatives: torch's number, or an error that names the operator. Never another number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad

import bi_ops
from bi_ops import activation, attention, embedding, logprob, matmul, mode, norm, reduction, rope
from bi_ops import nn as bnn
from bi_ops.nn.lm_head import linear_token_logprobs

Tensor = torch.Tensor
Fn = Callable[[Tensor], Tensor]
DIM = 16


class Fixed:
    """Parameters beside x [4, 16]."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(8, DIM, generator=generator).to(device)
        self.scale = torch.rand(DIM, generator=generator).to(device) + 0.5
        self.ids = torch.tensor([1, 2, 0, 3], device=device)
        self.cos_sin = rope.cos_sin_cache(DIM, 8, device=device)
        self.cu = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)


def rotated(x: Tensor, p: Fixed) -> Tensor:
    cos, sin = (t[:, None] for t in p.cos_sin[p.ids].chunk(2, -1))
    a, b = x.view(4, 1, DIM).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attended(x: Tensor, p: Fixed) -> Tensor:
    q = x.view(4, 1, DIM)
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], device=x.device).bool()
    scores = (q[:, 0] @ q[:, 0].mT / DIM**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ q[:, 0])[:, None]


#: Operator to (through bi_ops, in plain torch).
OPERATORS: dict[str, tuple[Callable[[Tensor, Fixed], Tensor], Callable[[Tensor, Fixed], Tensor]]] = {
    "mm": (lambda x, p: matmul.mm(x, p.weight.t()), lambda x, p: x @ p.weight.t()),
    "bmm": (lambda x, p: matmul.bmm(x[None], p.weight.t()[None]), lambda x, p: (x @ p.weight.t())[None]),
    "matmul": (lambda x, p: matmul.matmul(x, p.weight.t()), lambda x, p: x @ p.weight.t()),
    "addmm": (
        lambda x, p: matmul.addmm(p.weight[:, 0], x, p.weight.t()),
        lambda x, p: torch.addmm(p.weight[:, 0], x, p.weight.t()),
    ),
    "linear": (
        lambda x, p: matmul.linear(x, p.weight, p.weight[:, 0]),
        lambda x, p: F.linear(x, p.weight, p.weight[:, 0]),
    ),
    "rms_norm": (lambda x, p: norm.rms_norm(x, p.scale), lambda x, p: F.rms_norm(x, (DIM,), p.scale, 1e-6)),
    "add_rms_norm": (
        lambda x, p: norm.add_rms_norm(x, x, p.scale)[0],
        lambda x, p: F.rms_norm(x + x, (DIM,), p.scale, 1e-6),
    ),
    "silu_and_mul": (
        lambda x, p: activation.silu_and_mul(x),
        lambda x, p: F.silu(x[..., : DIM // 2]) * x[..., DIM // 2 :],
    ),
    "apply_rope": (lambda x, p: rope.apply_rope(x.view(4, 1, DIM), p.ids, p.cos_sin), rotated),
    "embedding": (lambda x, p: embedding.embedding(p.ids, x), lambda x, p: F.embedding(p.ids, x)),
    "log_softmax": (lambda x, p: logprob.log_softmax(x), lambda x, p: F.log_softmax(x, -1)),
    "softmax": (lambda x, p: logprob.softmax(x), lambda x, p: F.softmax(x, -1)),
    "token_logprobs": (
        lambda x, p: logprob.token_logprobs(x, p.ids),
        lambda x, p: F.log_softmax(x, -1).gather(1, p.ids[:, None])[:, 0],
    ),
    "linear_token_logprobs": (  # logits that are kept whole: two operators, which torch.func can see into
        lambda x, p: linear_token_logprobs(x, p.weight, p.ids),
        lambda x, p: F.log_softmax(x @ p.weight.t(), -1).gather(1, p.ids[:, None])[:, 0],
    ),
    "sum": (lambda x, p: reduction.sum(x, -1), lambda x, p: x.sum(-1)),
    "mean": (lambda x, p: reduction.mean(x, -1), lambda x, p: x.mean(-1)),
    "flash_attention": (
        lambda x, p: attention.flash_attention(x[:, None], x[:, None], x[:, None], p.cu, max_seqlen=3),
        attended,
    ),
}


def energy(fn: Fn) -> Fn:
    return lambda x: fn(x).pow(3).sum()


def twice(fn: Fn, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(fn)(x), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


def tangent(fn: Fn, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(fn(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert found is not None, "the tangent is lost"
    return found


def pulled_back(fn: Fn, x: Tensor) -> Tensor:
    out, back, *_ = func.vjp(fn, x)
    return back(torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape))[0]


REVERSE: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "vjp": pulled_back,
    "grad": lambda fn, x: func.grad(energy(fn))(x),
    "jacrev": lambda fn, x: func.jacrev(fn)(x),
    "vmap": lambda fn, x: func.vmap(fn)(torch.stack((x, 2 * x))),
    "vmap_grad": lambda fn, x: func.vmap(func.grad(energy(fn)))(torch.stack((x, 2 * x))),
    "functionalize": lambda fn, x: func.functionalize(fn)(x),
}
REFUSABLE: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "jvp": lambda fn, x: func.jvp(fn, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda fn, x: func.jacfwd(fn)(x),
    "hessian": lambda fn, x: func.hessian(energy(fn))(x),
    "reverse_twice": lambda fn, x: func.grad(lambda x: func.grad(energy(fn))(x).square().sum())(x),
    "double_backward": twice,
    "dual_numbers": tangent,
}
#: Operators whose gradient has a gradient.
TWICE = {"mm", "bmm", "matmul", "addmm", "linear", "sum", "mean", "apply_rope"}


#: Transforms that call an operator once per element, which takes the interpreter long.
MANY_CALLS = {"jacrev", "jacfwd", "hessian", "vmap_grad", "reverse_twice"}


@pytest.mark.parametrize("often", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", ["bi_ops", "mode"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_transform_returns_torchs_number_or_names_the_operator(name, door, often, device):
    p = Fixed(device)
    x = torch.linspace(-1, 1, 4 * DIM, device=device).view(4, DIM).sin()
    through, plain = ((lambda x, f=f: f(x, p)) for f in OPERATORS[name])
    for transform, run in (REVERSE | REFUSABLE).items():
        if (transform in MANY_CALLS) != often:
            continue
        expected = run(plain, x)
        ours = plain if door == "mode" and name != "flash_attention" else through
        with mode.batch_invariant_backward_mode() if door == "mode" else contextlib.nullcontext():
            found, error = None, ""
            try:
                found = run(ours, x)
            except (NotImplementedError, RuntimeError) as raised:
                error = str(raised)
        if found is None:
            assert transform in REFUSABLE, f"{transform}: {error}"
            assert "bi_ops" in error or "aten::" in error, f"{transform}: {error}"
            if transform in ("reverse_twice", "double_backward"):
                assert name not in TWICE, f"{transform}: {error}"
                assert "Way out: " in error, f"{transform}: {error}"
            continue
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=transform)


def test_vmap_has_the_bits_of_each_slice(device):
    p, x = Fixed(device), torch.randn(3, 4, DIM, device=device)
    mapped = func.vmap(lambda x: norm.rms_norm(matmul.linear(x, p.weight, p.weight[:, 0]), p.scale[:8]))(x)
    alone = torch.stack([norm.rms_norm(matmul.linear(t, p.weight, p.weight[:, 0]), p.scale[:8]) for t in x])
    assert torch.equal(mapped, alone)


def test_nodes_that_write_into_a_buffer_or_walk_chunks_are_refused_by_name(device):
    p, x = Fixed(device), torch.randn(4, DIM, device=device)
    buffer = torch.zeros_like(p.weight)
    calls: dict[str, Fn] = {
        "linear": lambda x: matmul.linear(x, p.weight, main_grad=buffer),
        "rms_norm": lambda x: norm.rms_norm(x, p.scale, main_grad=torch.zeros_like(p.scale)),
        "embedding": lambda x: embedding.embedding(p.ids, x, main_grad=torch.zeros_like(x)),
        "linear_token_logprobs": lambda x: linear_token_logprobs(x, p.weight, p.ids, chunk_rows=matmul.TOKEN_STEP),
    }
    for name, call in calls.items():
        for run in (REVERSE["grad"], REVERSE["vmap"], REFUSABLE["jvp"], tangent):
            with pytest.raises((NotImplementedError, RuntimeError), match=name):
                run(call, x)


def test_layers_are_transformed_as_their_functions(device):
    layer = bnn.Linear(DIM, 8, device=device)
    x = torch.randn(4, DIM, device=device)
    found = func.jacrev(layer)(x)
    torch.testing.assert_close(found, func.jacrev(lambda x: F.linear(x, layer.weight, layer.bias))(x))


def test_autograd_in_inference_mode_says_what_torch_says(device):
    x = torch.randn(4, DIM, device=device).requires_grad_()

    def message(*options: Any) -> str:
        with torch.inference_mode(), pytest.raises(RuntimeError) as error:
            torch.autograd.grad((x * 2).sum(), x)
        return str(error.value)

    plain = message()
    with mode.batch_invariant_backward_mode():
        assert message() == plain


def test_a_lost_tangent_is_caught():
    """Negative control: an autograd function that knows no tangents."""

    def lossy(x: Tensor) -> Tensor:
        return x.detach() * 2

    with pytest.raises(AssertionError, match="lost"):
        tangent(lossy, torch.ones(3))
    assert bi_ops.__name__ == "bi_ops"
