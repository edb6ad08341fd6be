"""`MainGrad`: memory is taken by the first backward, whose sum begins from zero with the bits of a buffer of zeros."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import bi_ops
from bi_ops import embedding, matmul
from bi_ops.core import runtime
from bi_ops.matmul import TOKEN_STEP
from bi_ops.nn import MainGrad, linear_token_logprobs
from bi_ops.verify.properties import bits_equal

#: Tokens, rows and columns of the weight. The last is split along the tokens by Hopper's kernel, tile by tile.
SIZES = [(48, 24, 40), *([(160, 160, 144)] if runtime.INTERPRET else [(160, 384, 256), (8192, 6144, 1024)])]


def drawn(device, *shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def calls(device, tokens, n, k):
    """name -> (call(buffer, part of the tokens), what the buffer sums for)."""
    x, weight = drawn(device, tokens, k).requires_grad_(), drawn(device, n, k, dtype=torch.float32).requires_grad_()
    g = drawn(device, tokens, n)
    g[:, 0] = -0.0  # a first sum of these is +0.0, as is one that goes on from zeros
    ids = torch.arange(tokens, device=device) % n
    frozen = drawn(device, n, k)

    def head(buffer, part):
        linear_token_logprobs(x[part], frozen.requires_grad_(), ids[part], buffer, 2 * TOKEN_STEP).sum().backward()

    return {
        "linear": lambda buffer, part: matmul.linear(x[part], weight, main_grad=buffer).backward(g[part]),
        "accumulate_weight_grad": lambda buffer, part: matmul.accumulate_weight_grad(buffer, g[part], x[part].detach()),
        "embedding": lambda buffer, part: embedding.embedding(
            ids[part], weight, torch.bfloat16, main_grad=buffer
        ).backward(x[part].detach()),
        "linear_token_logprobs": head,
    }


@pytest.mark.parametrize(("tokens", "n", "k"), SIZES)
def test_a_sum_from_nothing_has_the_bits_of_one_from_zeros(tokens, n, k, device):
    for name, call in calls(device, tokens, n, k).items():
        cut = TOKEN_STEP * (tokens // TOKEN_STEP // 2)
        zeros, main_grad = torch.zeros(n, k, device=device), MainGrad(torch.Size((n, k)), device)
        first = None
        for part in (slice(0, cut), slice(cut, tokens)):
            call(zeros, part)
            call(main_grad, part)
            assert bits_equal(main_grad.open()[0], zeros), name
            first = zeros.clone() if first is None else first
        assert first is not None
        assert not bits_equal(first, zeros), name  # negative control: the second backward added something
        assert bits_equal(main_grad.collect(), zeros), name


def test_what_the_memory_held_before_is_not_read(device):
    for name, call in calls(device, 48, 24, 40).items():
        main_grad, everything = MainGrad(torch.Size((24, 40)), device), slice(0, 48)
        buffer, holds_sum = main_grad.open()
        assert not holds_sum
        buffer.fill_(float("nan"))  # now it counts as a sum, so what follows is the negative control
        call(main_grad, everything)
        assert main_grad.collect().isnan().all() or name == "embedding", name
        main_grad = MainGrad(torch.Size((24, 40)), device)  # its memory is poisoned by conftest.py
        call(main_grad, everything)
        assert main_grad.collect().isfinite().all(), name


def test_a_sum_that_nobody_wrote_is_zeros(device):
    found = MainGrad(torch.Size((3, 5)), device).collect()
    assert bits_equal(found, torch.zeros(3, 5, device=device))


def test_memory_is_taken_by_the_backward_and_no_graph_keeps_it(device):
    layer = bi_ops.nn.Linear(32, 16, bias=False, device=device)
    bi_ops.nn.allocate_main_grads(layer)
    main_grad = layer.main_grad
    assert isinstance(main_grad, MainGrad)
    out = layer(drawn(device, TOKEN_STEP, 32, dtype=torch.float32))
    assert main_grad._buffer is None
    out.sum().backward()
    seen = StorageWeakRef(main_grad.open()[0].untyped_storage())
    bi_ops.nn.collect_main_grads(layer)
    assert layer.weight.grad is not None
    layer.weight.grad = None
    gc.collect()
    assert out.grad_fn is not None  # the loss of the last step, which a training loop holds until the next
    assert seen.expired()


def test_a_backward_behind_the_collection_raises(device):
    layer = bi_ops.nn.Linear(32, 16, bias=False, device=device)
    bi_ops.nn.allocate_main_grads(layer)
    out = layer(drawn(device, TOKEN_STEP, 32, dtype=torch.float32)).sum()
    out.backward(retain_graph=True)
    bi_ops.nn.collect_main_grads(layer)
    with pytest.raises(RuntimeError, match=r"main_grad \[16, 32\]: a backward came after collect_main_grads"):
        out.backward()


@pytest.mark.parametrize(
    ("shape", "where", "message"),
    [((24, 39), None, r"main_grad must be contiguous \[24, 40\], got \[24, 39\]"), ((24, 40), "meta", "on meta")],
)
def test_one_for_another_weight_is_refused(shape, where, message, device):
    main_grad = MainGrad(torch.Size(shape), device if where is None else torch.device(where))
    with pytest.raises(ValueError, match=message):
        matmul.linear(drawn(device, 16, 40), drawn(device, 24, 40), main_grad=main_grad)


def test_buffers_that_are_tensors_share_no_memory(device):
    """Inductor of torch 2.11 reads a slice of a larger buffer, if it copies one, from twice its offset."""
    layers = torch.nn.Sequential(
        bi_ops.nn.Linear(32, 16, bias=False, device=device), bi_ops.nn.RMSNorm(16, device=device)
    )
    bi_ops.nn.allocate_main_grads(layers, tensors=True)
    layer: Any
    for layer in layers:
        assert layer.main_grad.shape == layer.weight.shape
        assert layer.main_grad.untyped_storage().nbytes() == 4 * layer.weight.numel()
        assert not layer.main_grad.any()
