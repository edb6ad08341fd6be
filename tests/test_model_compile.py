"""A whole model under torch.compile(fullgraph=True) has the bits of eager, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweeps import sweep
from tiny import tiny_model

from bi_ops.core import runtime
from bi_ops.logprob import Distribution
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.packing import pack
from bi_ops.verify.properties import bits_equal

BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"
PROMPTS, COMPLETIONS = [[5, 6, 7], [8] * 17], [[1, 2], [3, 4, 5]]

CASES: list[dict[str, Any]] = [
    {"recompute": "selective", "tensors": True},
    {"recompute": "layer", "tensors": True},
    {"recompute": "none", "tensors": False},
    {"recompute": "selective", "tensors": True, "chunk": TOKEN_STEP},
    {"recompute": "selective", "tensors": False, "chunk": TOKEN_STEP},
    {"recompute": "selective", "tensors": False, "distribution": Distribution(temperature=0.5, top_k=15)},
]


def batch_of(model, distribution=None, swap=False):
    prompts = [p[::-1] if swap else p for p in PROMPTS]
    distributions = None if distribution is None else [distribution] * 2
    return pack(prompts, COMPLETIONS, model.device, TOKEN_STEP, distributions)


def gradients(model, call, batch, tensors):
    """Scores of two backwards, and every weight's gradient: `tensors` in main_grads, else autograd's."""
    model.zero_grad()
    if tensors:
        model.allocate_main_grads(tensors=True)
    for _ in range(2 if tensors else 1):
        scores = call(batch)
        (scores * torch.cos(batch.targets.float())).sum().backward()
    if tensors:
        model.collect_main_grads()
    return {"scores": scores.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def differing(a, b):
    return [name for name in a if not bits_equal(a[name], b[name])]


@sweep("case", CASES, [CASES[0], CASES[4]])
def test_a_compiled_model_has_the_bits_of_eager(case):
    torch._dynamo.reset()
    tensors = case["tensors"]
    model = tiny_model(recompute=case["recompute"], num_hidden_layers=1 if runtime.INTERPRET else 3, vocab_size=16)
    model.head_chunk_rows = case.get("chunk")
    batch, other = (batch_of(model, case.get("distribution"), swap) for swap in (False, True))
    expected = gradients(model, model.token_logprobs, batch, tensors)
    assert all(t.any() for t in expected.values())
    compiled = torch.compile(model.token_logprobs, fullgraph=True, backend=BACKEND)
    for _ in range(2):  # with buffers of another step's
        assert differing(gradients(model, compiled, batch, tensors), expected) == []
    # Negative control: other tokens of the same shapes are seen.
    found = gradients(model, compiled, other, tensors)
    assert "scores" in differing(found, expected)
    assert differing(found, gradients(model, model.token_logprobs, other, tensors)) == []


def test_a_buffer_that_takes_its_memory_later_is_refused_with_the_way_out():
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1, vocab_size=16)
    batch = batch_of(model)
    model.allocate_main_grads()
    with pytest.raises(Exception, match=r"allocate_main_grads\(tensors=True\)"):
        torch.compile(model.token_logprobs, fullgraph=True, backend=BACKEND)(batch)
