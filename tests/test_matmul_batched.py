"""`bmm` and `addmm`: rows whose bits do not depend on how many there are, gradients that are the same on every run."""

from __future__ import annotations

import functools

import pytest
import torch

from bi_ops import matmul
from bi_ops.core import runtime
from bi_ops.verify import ROW_COUNTS, rerun_variant, row_variant

# The interpreter pays milliseconds per tile; a GPU takes the sizes that matter.
K, N, M = (48, 40, 257) if runtime.INTERPRET else (1024, 512, 8192)
COUNTS = (1, 17, 64, 256) if runtime.INTERPRET else ROW_COUNTS
RERUNS = 2 if runtime.INTERPRET else 100
BATCH = 2


def randn(*shape, device, dtype=torch.bfloat16):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.fixture(params=["bmm", "addmm"])
def gemm(request, device):
    """A function of rows x [M, K], the same for every row, with its other operands."""
    if request.param == "bmm":
        b = randn(BATCH, K, N, device=device).requires_grad_()
        return lambda x: matmul.bmm(x.expand(BATCH, *x.shape), b).transpose(0, 1).flatten(1), (b,)
    b, bias = randn(K, N, device=device).requires_grad_(), randn(N, device=device).requires_grad_()
    return lambda x: matmul.addmm(bias, x, b), (b, bias)


def test_rows_do_not_depend_on_the_batch(gemm, device):
    fn, _ = gemm

    def with_gradient(x, g):
        x = x.clone().requires_grad_()
        out = fn(x)
        return out.detach(), torch.autograd.grad(out, x, g)[0]

    x = randn(M, K, device=device)
    assert row_variant(with_gradient, (x, torch.randn_like(fn(x))), COUNTS) == []


def test_a_gemm_split_by_the_row_count_is_caught(device):
    """Negative control."""
    b = randn(BATCH, K, N, device=device, dtype=torch.float32)

    def split_k(x):
        x = x.expand(BATCH, *x.shape)
        halves = [x] if x.shape[1] >= 64 else x.chunk(2, -1)
        parts = zip(halves, b.chunk(len(halves), 1), strict=True)
        products = [matmul.bmm(h.contiguous(), w.contiguous()) for h, w in parts]
        return functools.reduce(torch.add, products).transpose(0, 1).flatten(1)

    x = randn(M, K, device=device, dtype=torch.float32)
    assert row_variant(split_k, (x,), (16, 17, 64, 256)) == [16, 17]


def test_gradients_are_the_same_on_every_run(gemm, device):
    fn, others = gemm
    x = randn(65, K, device=device).requires_grad_()
    g = torch.randn_like(fn(x))
    assert rerun_variant(lambda: torch.autograd.grad(fn(x), (x, *others), g), RERUNS) == []


def test_addmm_takes_a_bias_for_every_row_or_a_matrix(device):
    a, b = randn(5, K, device=device), randn(K, N, device=device)
    given: tuple[tuple[int, ...], ...] = ((N,), (5, N))
    for shape in given:
        bias = randn(*shape, device=device)
        expected = matmul.mm(a, b) * 2 + bias * 0.5
        assert torch.equal(matmul.addmm(bias, a, b, beta=0.5, alpha=2), expected)
    for shape in ((N - 1,), (5, 1), ()):
        with pytest.raises(ValueError, match=r"addmm: bias .* must be \[N\] or \[M, N\]"):
            matmul.addmm(torch.ones(shape, device=device), a, b)
