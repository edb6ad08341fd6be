"""The plugin's samplers against a stand-in for vLLM's: log-probabilities that training has, whatever shares a batch."""

from __future__ import annotations

import types

import pytest
import torch
from fake_vllm import installed
from fake_vllm_sampling import V1, V2

from bi_ops import logprob, vllm_plugin
from bi_ops.core import runtime

#: temperature, top-k, top-p, min-p of each request, as vLLM has them after its own checks.
V = 600
OPTIONS = [
    *((0.7, 50, 0.9, 0.0), (1.0, V, 1.0, 0.0), (0.0, V, 1.0, 0.0), (1.5, V, 0.5, 0.1)),
    *((1.0, 3, 1.0, 0.0), (2.0, V, 1.0, 0.0)),
]
MODES = ("raw_logprobs", "processed_logprobs")


@pytest.fixture(params=["0.26.0", "0.33.0"])
def vllm(monkeypatch, request):
    if not runtime.INTERPRET:
        pytest.skip("the stand-in for vLLM computes on the CPU")
    with installed(monkeypatch, request.param) as modules:
        yield modules


@pytest.fixture
def logits():
    return (torch.randn(len(OPTIONS), V, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()


def v2(vllm, logits, rows, mode):
    states = vllm[f"{V2}.states"].SamplingStates(OPTIONS)
    at = torch.tensor(rows)
    return vllm[f"{V2}.sampler"].Sampler(states, mode)(logits[at].clone(), at)


def scored(vllm, logits):
    """All that vLLM's v2 runner reports of raw log-probabilities."""
    sampler = vllm[f"{V2}.sampler"].Sampler(vllm[f"{V2}.states"].SamplingStates(OPTIONS), MODES[0])
    sampler(logits.clone(), torch.arange(len(OPTIONS)))
    return sampler.scores


def v1(vllm, logits, rows, mode):
    t, k, p, least = (torch.tensor(c)[rows] for c in zip(*OPTIONS, strict=True))
    processor = vllm[f"{V1}.logits_processor.builtin"].MinPLogitsProcessor(least)
    greedy = bool((t == 0).all())
    metadata = types.SimpleNamespace(temperature=t, top_k=k.int(), top_p=p, min_p=processor, all_greedy=greedy)
    sampled, logprobs = vllm[f"{V1}.sampler"].Sampler(mode).sample(logits[rows].float(), metadata)
    return sampled, None if logprobs is None else logprobs.gather(1, sampled[:, None])[:, 0]


def expected(logits, sampled):
    t, k, p, least = (torch.tensor(c) for c in zip(*OPTIONS, strict=True))
    t = torch.where(t == 0, torch.ones_like(t), t)
    return logprob.sampled_logprobs(logits, sampled, temperature=t, top_k=k, top_p=p, min_p=least)


@pytest.mark.parametrize("runner", [v2, v1])
def test_processed_log_probabilities_are_those_of_training(vllm, logits, runner):
    rows = list(range(len(OPTIONS)))
    stock = runner(vllm, logits, rows, MODES[1])
    vllm_plugin.register()
    sampled, logprobs = runner(vllm, logits, rows, MODES[1])
    assert torch.equal(sampled, logits.float().argmax(1))
    assert torch.equal(logprobs, expected(logits, sampled))
    assert not torch.equal(stock[1], logprobs)  # negative control
    for row in rows:
        alone = runner(vllm, logits, [row], MODES[1])
        assert torch.equal(alone[1], logprobs[row : row + 1]), row
    vllm_plugin.unregister()
    assert torch.equal(runner(vllm, logits, rows, MODES[1])[1], stock[1])


def test_raw_log_probabilities_stay_those_of_the_logits(vllm, logits):
    rows = list(range(len(OPTIONS)))
    before = v2(vllm, logits, rows, MODES[0])
    vllm_plugin.register()
    sampled, found = v2(vllm, logits, rows, MODES[0])
    assert torch.equal(found, logprob.token_logprobs(logits, sampled))  # on a GPU vLLM's own kernel has these bits
    torch.testing.assert_close(found, before[1])
    assert v1(vllm, logits, rows, MODES[0])[1] is None
    assert not torch.equal(before[1], expected(logits, before[0]))


def test_scores_and_ranks_of_sampled_tokens_are_reported_as_vllm_does(vllm, logits, monkeypatch):
    logits[1, :7] = logits[1].max()  # tokens of one logit share a rank
    stock = scored(vllm, logits)
    vllm_plugin.register()
    found = scored(vllm, logits)
    assert type(found) is type(stock)
    assert torch.equal(found.logprob_token_ids, stock.logprob_token_ids)
    assert torch.equal(found.selected_token_ranks, stock.selected_token_ranks)
    assert found.cu_num_generated_tokens == stock.cu_num_generated_tokens
    assert torch.equal(found.logprobs[:, 0], logprob.token_logprobs(logits, found.logprob_token_ids[:, 0]))
    # vLLM's own kernels where more is asked for
    of = vllm[f"{V2}.sampler"].compute_topk_scores
    monkeypatch.setattr(logprob, "ranked_logprobs", None)
    raw = of(logits, 0, stock.logprob_token_ids[:, 0], None, logits_mode=True)
    assert torch.equal(raw.logprobs, of(logits.float(), 0, stock.logprob_token_ids[:, 0]).logprobs)


def test_a_plain_batch_is_left_alone(vllm, logits, monkeypatch):
    """Nothing is launched for requests that change no logit."""
    vllm_plugin.register()
    with monkeypatch.context() as context:
        context.setattr(logprob, "processed_logits", None)
        sampled, logprobs = v2(vllm, logits, [1, 2], MODES[1])
    assert torch.equal(logprobs, expected(logits, logits.float().argmax(1))[1:3])
    assert torch.equal(sampled, logits[1:3].float().argmax(1))
