"""The advice of the mode's errors, followed: it leads to torch's numbers."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import mode
from bi_ops.core import runtime
from bi_ops.mode import errors

aten = torch.ops.aten


def backend_of_attention(q):
    if runtime.INTERPRET:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]
    return aten._scaled_dot_product_efficient_attention(q, q, q, None, False)[0]


def replaced_softmax(q):
    """What reaches aten::softmax whole, as where someone replaced it by a kernel without a derivative."""
    from bi_ops.mode.dispatch import DispatchMode, call

    return call(aten.softmax.int, (q.requires_grad_(), -1), {}, DispatchMode())


#: Of each hint: what is refused, what the hint says to write, and what torch computes.
FOLLOWED = {
    "_scaled_dot_product": (
        backend_of_attention,
        lambda q: F.scaled_dot_product_attention(q, q, q),
        lambda q: F.scaled_dot_product_attention(q, q, q),
    ),
    "scaled_dot_product": (
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0),
        lambda q: F.scaled_dot_product_attention(q, q, q),
    ),
    "softmax": (replaced_softmax, lambda q: F.softmax(q, -1), lambda q: torch.softmax(q, -1)),
}


def test_every_hint_is_followed_here():
    assert FOLLOWED.keys() == errors._HINTS.keys()


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_a_hint_says_gives_torchs_numbers_and_gradients(name, device):
    refused, advised, torchs = FOLLOWED[name]
    q = torch.randn(1, 2, 6, 16, device=device)
    with mode.batch_invariant_backward_mode(), pytest.raises(NotImplementedError) as error:
        refused(q.clone())
    assert errors._HINTS[name] in str(error.value)
    results = []
    for fn, enabled in ((advised, True), (torchs, False)):
        x = q.clone().requires_grad_()
        with mode.batch_invariant_backward_mode(enabled):
            out = fn(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


#: Calls that are refused, at an operator, at a function that is replaced, and in a backward.
REFUSED = {
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "inverse": lambda x: torch.linalg.inv(x[:, :6] + 9 * torch.eye(6, device=x.device)),
    "svd": lambda x: torch.linalg.svdvals(x),
    "scatter_reduce": lambda x: x.scatter_reduce(
        1, torch.arange(8, device=x.device).expand(6, 8), x.detach(), "prod", include_self=False
    ),
    "fp64": lambda x: (x.double() @ x.double().t()).float(),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, 6, 8), x.view(1, 1, 6, 8), x.view(1, 1, 6, 8), dropout_p=1e-9
    ),
}


def gradient_of(fn, x):
    out = fn(x)
    return out, *torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("name", REFUSED)
def test_outside_the_contract_it_is_torchs(name, device):
    x = torch.randn(6, 8, device=device).requires_grad_()
    plain = gradient_of(REFUSED[name], x)
    with mode.batch_invariant_backward_mode():
        with pytest.raises(NotImplementedError, match=r"batch_invariant_backward_mode\(enabled=False\)"):
            REFUSED[name](x)
        with mode.batch_invariant_backward_mode(enabled=False):
            ours = gradient_of(REFUSED[name], x)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_that_is_vouched_for_is_torchs(name, device, monkeypatch):
    """Each error names the operator that stands in the way; in the end the backward's too."""
    monkeypatch.setattr("bi_ops.mode.allowlist.trusted_operators", set())
    x = torch.randn(6, 8, device=device).requires_grad_()
    plain, followed = gradient_of(REFUSED[name], x), []
    for _ in range(10):
        try:
            with mode.batch_invariant_backward_mode():
                ours = gradient_of(REFUSED[name], x)
            break
        except NotImplementedError as error:
            message = str(error)
        advised = re.search(r"`bi_ops\.mode\.allow_operator\('([^']+)'\)`", message)
        assert advised, message
        assert advised[1] not in followed, message
        followed.append(advised[1])
        mode.allow_operator(advised[1])
    assert followed
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
