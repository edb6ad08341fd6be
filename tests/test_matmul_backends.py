"""A backend that a user adds: one class, one registration, and the public calls take its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bi_ops import matmul
from bi_ops.core.arch import PORTABLE, SM_90
from bi_ops.core.backends import Support
from bi_ops.matmul.backends import GemmBackend
from bi_ops.matmul.order import Problem


class Toy(GemmBackend):
    """Exact sums of small whole numbers, in any order. It notes what it computes: (batch axis, shape of the result)."""

    name = "toy"
    automatic = False

    def __init__(self, forward_only: bool = False) -> None:
        self.forward_only = forward_only
        self.computed: list[Any] = []

    def supports(self, problem, arch):
        return Support(problem.dtype != torch.float16, f"{problem.dtype}")

    def gemm(self, a, b, bias, out, batch_axis):
        self.computed.append((batch_axis, tuple(out.shape)))
        total = a.float() @ b.float()
        out.copy_(total if bias is None else total + bias.float())
        return True


@pytest.fixture(params=[False, True], ids=["with gradients", "forward only"])
def toy(request):
    yield matmul.backends.register(Toy(request.param))
    matmul.backends.unregister("toy")


def whole(*shape, device, learned=True):
    return torch.randint(-4, 5, shape, device=device).bfloat16().requires_grad_(learned)


T, N, K = 5, 6, 8
FORWARD, DX, DW = ("m", (T, N)), ("m", (T, K)), ("k", (N, K))


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_runs_on_it_with_gradients(toy, with_bias, device):
    x, weight = whole(T, K, device=device), whole(N, K, device=device)
    bias = whole(N, device=device) if with_bias else None
    g = whole(T, N, device=device, learned=False)
    wanted = [t for t in (x, weight, bias) if t is not None]
    out = matmul.linear(x, weight, bias, backend="toy")
    grads = torch.autograd.grad(out, wanted, g)
    assert toy.computed == ([FORWARD] if toy.forward_only else [FORWARD, DX, DW])
    default = matmul.linear(x, weight, bias)
    assert torch.equal(out, default)
    assert all(map(torch.equal, grads, torch.autograd.grad(default, wanted, g)))


def test_a_main_grad_is_accumulated_by_the_own_kernel_and_dx_by_the_backend(toy, device):
    x, weight = whole(T, K, device=device), whole(N, K, device=device)
    g = whole(T, N, device=device, learned=False)
    buffer = torch.zeros(N, K, device=device)
    (dx,) = torch.autograd.grad(matmul.linear(x, weight, main_grad=buffer, backend="toy"), x, g)
    assert toy.computed == ([FORWARD] if toy.forward_only else [FORWARD, DX])
    assert torch.equal(dx, (g.float() @ weight.float()).bfloat16())
    assert torch.equal(buffer, g.float().t() @ x.float())


def test_a_compiled_call_runs_on_it(toy, device):
    x, weight = whole(T, K, device=device, learned=False), whole(N, K, device=device, learned=False)
    compiled = torch.compile(lambda x, w: matmul.linear(x, w, backend="toy"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), matmul.linear(x, weight))
    assert toy.computed == [FORWARD]


def test_it_serves_only_where_it_is_named_and_what_it_supports(toy, device):
    a = whole(4, 4, device=device, learned=False)
    matmul.mm(a, a)
    assert toy.computed == []
    matmul.mm(a, a, backend="toy")
    matmul.addmm(a[0], a, a, backend="toy")
    matmul.matmul(a[0], a, backend="toy")
    assert [shape for _, shape in toy.computed] == [(4, 4), (4, 4), (1, 4)]
    with pytest.raises(RuntimeError, match=r"matmul: backend 'toy' cannot serve torch\.float16"):
        matmul.mm(a.half(), a.half(), backend="toy")


def test_batches_of_matrices_refuse_another_backend(toy, device):
    """And do not run the Triton kernel under its name."""
    a = torch.ones(2, 3, 3, device=device)
    for call in (matmul.bmm, matmul.matmul):
        assert torch.equal(call(a, a, backend="triton"), call(a, a))
        with pytest.raises(RuntimeError, match="backend 'toy' cannot serve batches of matrices"):
            call(a, a, backend="toy")
        with pytest.raises(ValueError, match="matmul: no backend 'magma'"):
            call(a, a, backend="magma")
    assert toy.computed == []


def test_vllms_kernel_is_no_backend_where_its_order_was_not_examined():
    """Else equal orders would be claimed of bits that nobody compared."""
    vllm = matmul.backends.get("vllm")
    assert vllm.supports(Problem(torch.bfloat16), SM_90)
    assert not vllm.supports(Problem(torch.bfloat16), PORTABLE)
