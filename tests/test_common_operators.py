"""Operators run on the GPU that holds their tensors, whichever is the current one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from bi_ops import attention, embedding, logprob, matmul, reduction
from bi_ops._common.operators import on_device_of_first
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.packing import pack
from bi_ops.verify.properties import bits_equal

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
    found = {}
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
