"""The embedded engine: its log-probabilities are those of training, whatever shares a batch."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from bi_ops.core import runtime
from bi_ops.models.packing import pack
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.rollout.sampling import sample, uniform
from bi_ops.verify.parity import compare

PROMPTS = [[1, 2, 3], [4], list(range(5, 30)), [7] * 17, [9, 8]]


def params(n=4):
    return [SamplingParams(max_new_tokens=n, seed=i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def completions(model):
    return EmbeddedEngine(model).generate(PROMPTS, params())


def test_rollout_and_training_are_the_same_bits(model, completions):
    batch = pack([c.prompt for c in completions], [c.tokens for c in completions], model.device)
    scores = batch.split(model.token_logprobs(batch))  # with gradients: the path that trains
    report = compare([c.logprobs for c in completions], scores, [c.tokens for c in completions])
    assert report.identical, report
    assert report.tokens_checked == 20


def test_one_wrong_bit_is_reported(model, completions):
    """Negative control: the comparison sees a single flipped bit, and says where."""
    batch = pack([c.prompt for c in completions], [c.tokens for c in completions], model.device)
    with torch.no_grad():
        scores = [s.cpu().clone() for s in batch.split(model.token_logprobs(batch))]
    scores[3].view(torch.int32)[2] ^= 1
    report = compare([c.logprobs for c in completions], scores, [c.tokens for c in completions])
    assert (report.tokens_different, report.first_difference.sequence, report.first_difference.position) == (1, 3, 2)


def test_a_request_does_not_see_its_neighbours(model, completions):
    engine = EmbeddedEngine(model, max_model_len=64, block_size=16, max_batch_tokens=64)  # in waves, other pages
    again = engine.generate(PROMPTS[::-1], params()[::-1])[::-1]
    for a, b in zip(completions, again, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.logprobs, b.logprobs)


def test_new_weights_are_those_of_a_new_engine(model):
    other = tiny_model(seed=1)
    engine = EmbeddedEngine(model)
    before = engine.generate(PROMPTS[:1], SamplingParams(3))[0]
    engine.update_weights(other)
    updated, fresh = (e.generate(PROMPTS[:1], SamplingParams(3))[0] for e in (engine, EmbeddedEngine(other)))
    assert torch.equal(updated.logprobs, fresh.logprobs)
    assert not torch.equal(updated.logprobs, before.logprobs)
    with pytest.raises(ValueError, match="config"):
        engine.update_weights(tiny_model(hidden_size=16))


def test_a_stop_token_ends_the_completion_and_is_part_of_it(model, completions):
    stop = completions[0].tokens[1]
    p = SamplingParams(max_new_tokens=4, seed=0, stop_token_ids=(stop,))
    stopped = EmbeddedEngine(model).generate([PROMPTS[0]], p)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == completions[0].tokens[: completions[0].tokens.index(stop) + 1]


def test_greedy_takes_the_largest_logit(device):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    assert sample(logits, zeros.double(), zeros, zeros).tolist() == [1, 0]


def test_sampling_follows_the_distribution(device):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], device=device)
    n = 20000
    seeds, ones = torch.arange(n, device=device), torch.ones(n, dtype=torch.int64, device=device)
    counts = sample(p.log().expand(n, 4), ones.double(), seeds, ones).bincount(minlength=4)
    expected = p.cpu() * n
    assert ((counts.cpu() - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_uniform_numbers_depend_on_seed_position_and_column(device):
    seeds, positions = torch.tensor([0, 0, 1, 2**62], device=device), torch.tensor([0, 1, 0, 0], device=device)
    u = uniform(seeds, positions, 1000)
    assert u.unique().numel() == 4000
    assert (u.min() > 0) & (u.max() < 1) & ((u.mean() - 0.5).abs() < 0.02)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [([[]], 1, "empty"), ([[99]], 1, "vocabulary"), ([[1] * 60], 5, "length is 64"), ([[1]], 0, "max_new_tokens")],
)
def test_bad_requests_are_refused(model, prompts, new, message):
    engine = EmbeddedEngine(model, max_model_len=64)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(new))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="finite and not negative"):
        SamplingParams(1, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 0}, r"max_model_len must be in \[2, 256\]"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_sizes_that_no_cache_has_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedEngine(model, **options)


def test_what_generates_decides_what_trains(model, completions):
    engine = EmbeddedEngine(model, attention="triton")
    assert engine.describe()["providers"]["attention"] == "triton"
    again = engine.generate(PROMPTS[:2], params()[:2])
    if runtime.INTERPRET:
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(again, completions, strict=False))
    batch = pack([c.prompt for c in again], [c.tokens for c in again], model.device)
    scored = model.token_logprobs(batch, engine.attention)
    assert torch.equal(scored.cpu(), torch.cat([c.logprobs for c in again]))
    assert EmbeddedEngine(model).attention is None  # it was given none: selected alike on both sides


def test_a_backend_that_cannot_run_is_refused(model):
    with pytest.raises(ValueError, match="no backend 'flash'"):
        EmbeddedEngine(model, attention="flash")
    if runtime.INTERPRET:
        with pytest.raises(RuntimeError, match="backend 'vllm' cannot run here"):
            EmbeddedEngine(model, attention="vllm")


def test_a_closed_engine_says_so(model):
    engine = EmbeddedEngine(model)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate([[1]], SamplingParams(1)), lambda: engine.update_weights(model)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()
