"""The chunked LM head against the two operators that it stands for."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from sweeps import sweep

from bi_ops import logprob, matmul
from bi_ops.nn.lm_head import linear_token_logprobs
from bi_ops.verify.properties import bits_equal

T, K, V = 70, 48, 90


def inputs(device, dtype, weight_dtype):
    hidden = torch.randn(T, K, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, K, device=device).to(weight_dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (T,), device=device), torch.randn(T, device=device)


BF16, FP32 = torch.bfloat16, torch.float32


@sweep(
    ("chunk_rows", "dtypes"),
    itertools.product([16, 32, 64, 80, None], [(BF16, BF16), (BF16, FP32), (FP32, FP32)]),
    [(16, (BF16, FP32)), (64, (BF16, BF16)), (80, (FP32, FP32)), (None, (BF16, FP32))],
)
def test_any_chunk_has_the_bits_of_the_two_operators(chunk_rows, dtypes, device):
    hidden, weight, ids, g = inputs(device, *dtypes)
    expected = logprob.token_logprobs(matmul.linear(hidden, weight), ids)
    got = linear_token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows)
    assert bits_equal(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, weight), g), torch.autograd.grad(expected, (hidden, weight), g), strict=True
    ):
        assert bits_equal(ours, theirs)


@pytest.mark.parametrize("chunk_rows", [16, 48, None])
def test_main_grad_goes_on_from_what_it_holds(device, chunk_rows):
    hidden, weight, ids, g = inputs(device, torch.bfloat16, torch.float32)
    buffers = [torch.full((V, K), 0.5, device=device) for _ in range(2)]
    logprob.token_logprobs(matmul.linear(hidden, weight, main_grad=buffers[0]), ids).backward(g)
    expected, hidden.grad = hidden.grad, None
    linear_token_logprobs(hidden, weight, ids, buffers[1], chunk_rows).backward(g)
    assert bits_equal(hidden.grad, expected)
    assert bits_equal(*buffers)
    assert weight.grad is None


@pytest.mark.parametrize("chunk_rows", [16, 48, None])
def test_the_entropy_and_its_gradient_know_no_chunks(device, chunk_rows):
    hidden, weight, ids, g = inputs(device, torch.bfloat16, torch.float32)
    g_entropy = torch.randn(T, device=device)
    expected = logprob.token_logprobs(matmul.linear(hidden, weight), ids, return_entropy=True)
    got = linear_token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows, return_entropy=True)
    plain = linear_token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows)
    assert [bits_equal(*pair) for pair in zip(got, expected, strict=True)] == [True, True]
    assert bits_equal(got[0], plain)
    ours, theirs = (torch.autograd.grad(out, (hidden, weight), (g, g_entropy)) for out in (got, expected))
    assert [bits_equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True, True]
    # Negative control: the entropy has a gradient.
    assert not bits_equal(torch.autograd.grad(plain, hidden, g)[0], ours[0])


@pytest.mark.parametrize("kept_rows", [31, 63, 69])
def test_large_logits_are_cut_by_themselves(device, monkeypatch, kept_rows):
    """No tensor of [T, V] is made of them, in any dtype; the first are kept, for one backward."""
    from bi_ops.nn import lm_head

    hidden, weight, ids, g = inputs(device, torch.bfloat16, torch.float32)
    expected = linear_token_logprobs(hidden, weight, ids)
    whole = torch.autograd.grad(expected, (hidden, weight), g)
    rows, real = [], matmul.linear
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def counted(x, *rest, **named):
        rows.append(len(x))
        logits = real(x, *rest, **named)
        alive.add(logits)
        return logits

    monkeypatch.setattr(matmul, "linear", counted)
    monkeypatch.setattr(lm_head, "WHOLE_BYTES", kept_rows * V * 2)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 40 * V * 2)
    got = linear_token_logprobs(hidden, weight, ids)
    assert bits_equal(got, expected)
    assert rows == [32, 32, 6]
    assert sorted(map(len, alive)) == [32, 32, 6][: kept_rows // 32]
    for again in ([32, 32, 6][kept_rows // 32 :], [32, 32, 6]):
        rows.clear()
        parts = torch.autograd.grad(got, (hidden, weight), g, retain_graph=True)
        assert [bits_equal(*pair) for pair in zip(parts, whole, strict=True)] == [True, True]
        assert rows == again
    with torch.no_grad():  # no backward will ask for them
        assert bits_equal(linear_token_logprobs(hidden, weight, ids), expected)
    assert not alive


def test_chunks_in_another_order_would_have_other_bits(device):
    """Negative control: the weight gradient tells in which order its rows came."""
    hidden, _weight, _, _ = inputs(device, torch.bfloat16, torch.bfloat16)
    dlogits = torch.randn(T, V, device=device).bfloat16()
    forth, back = (torch.zeros(V, K, device=device) for _ in range(2))
    for part in (slice(0, 32), slice(32, T)):
        matmul.accumulate_weight_grad(forth, dlogits[part], hidden[part].detach())
    for part in (slice(32, T), slice(0, 32)):
        matmul.accumulate_weight_grad(back, dlogits[part], hidden[part].detach())
    assert not bits_equal(forth, back)


def test_a_frozen_weight_or_hidden_state_gets_no_gradient(device):
    hidden, weight, ids, g = inputs(device, torch.bfloat16, torch.bfloat16)
    linear_token_logprobs(hidden, weight.detach(), ids, chunk_rows=16).backward(g)
    assert hidden.grad is not None
    linear_token_logprobs(hidden.detach(), weight, ids, chunk_rows=16).backward(g)
    assert weight.grad is not None


def test_no_rows_are_no_scores(device):
    hidden, weight, ids, _ = inputs(device, torch.bfloat16, torch.bfloat16)
    assert linear_token_logprobs(hidden[:0], weight, ids[:0]).shape == (0,)


@pytest.mark.parametrize("chunk_rows", [0, -16, 8, 17])
def test_a_chunk_that_would_cut_a_step_is_refused(device, chunk_rows):
    hidden, weight, ids, _ = inputs(device, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match=f"multiple of 16, got {chunk_rows}"):
        linear_token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows)


def test_shapes_that_do_not_fit_are_refused(device):
    hidden, weight, ids, _ = inputs(device, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"linear_token_logprobs: needs hidden \[T, K\]"):
        linear_token_logprobs(hidden, weight, ids[:-1])


def test_the_backward_of_chunks_is_registered(device):
    hidden, weight, ids, g = (t.detach() for t in inputs(device, torch.bfloat16, torch.bfloat16))
    stats = logprob.token_stats(matmul.linear(hidden, weight), ids)
    for need_hidden, need_weight, accumulate in ((True, True, True), (False, True, False), (True, False, True)):
        buffer = torch.zeros(V, K, device=device)
        given = (
            buffer,
            [torch.randn(32, V, device=device).bfloat16()],
            g,
            None,
            hidden,
            weight,
            ids,
            *stats,
            32,
            need_hidden,
            need_weight,
            accumulate,
        )
        torch.library.opcheck(torch.ops.bi_ops.linear_token_logprobs_backward, given)
