"""Rollouts under temperature, top-k, top-p and min-p: training has the log-probabilities of what was sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

from bi_ops.core.rows import TOKEN_STEP
from bi_ops.logprob import Distribution
from bi_ops.models import packing
from bi_ops.models.packing import common_distributions, pack
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.tasks import Alphabet, Repeat
from bi_ops.rl.trainer import Trainer
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.rollout.sampling import sample
from bi_ops.verify.compositions import rescore
from bi_ops.verify.parity import compare

PROMPTS = [[1, 2, 3], [4], list(range(5, 30)), [7] * 17, [9, 8], [3, 3]]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {},
    {"temperature": 1.7},
    {"min_p": 0.2},
    {"top_p": 0.5},
)
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 2}
PARAMS = [SamplingParams(4, seed=i, **o) for i, o in enumerate((*OPTIONS, GREEDY))]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def completions(model):
    return EmbeddedEngine(model, logprobs_mode="processed_logprobs").generate(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def raw(model):
    return EmbeddedEngine(model).generate(PROMPTS, PARAMS)


def test_the_mode_changes_log_probabilities_and_no_token(completions, raw):
    assert [c.tokens for c in completions] == [c.tokens for c in raw]
    assert [c.distribution for c in raw] == [None] * len(PROMPTS)
    assert completions[0].distribution == Distribution(0.7, 5, 0.9, 0.0)
    assert completions[-1].distribution == Distribution()  # greedy
    assert not any(torch.equal(a.logprobs, b.logprobs) for a, b in zip(completions[:1], raw[:1], strict=True))
    assert all(bool(torch.isfinite(c.logprobs).all()) for c in completions)


@pytest.mark.parametrize("align", [1, TOKEN_STEP])
def test_rollout_and_training_are_the_same_bits(model, completions, align):
    prompts, tokens = [c.prompt for c in completions], [c.tokens for c in completions]
    batch = pack(prompts, tokens, model.device, align, common_distributions([c.distribution for c in completions]))
    scores = model.token_logprobs(batch)  # with gradients: the path that trains
    assert compare([c.logprobs for c in completions], batch.split(scores), tokens).identical
    scores.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_every_composition_has_the_same_bits(model, completions):
    reports = rescore(model, completions)
    assert all(r.identical and r.tokens_checked == 24 for r in reports.values())


@pytest.mark.parametrize("changed", [{"temperature": 0.7001}, {"top_p": 0.6}, {"top_k": 4}])
def test_another_distribution_is_seen(model, completions, changed):
    """Negative control."""
    other = [dataclasses.replace(c, distribution=dataclasses.replace(c.distribution, **changed)) for c in completions]
    assert not rescore(model, other, ("together",))["together"].identical


def test_raw_and_processed_are_not_mixed(model, completions, raw):
    with pytest.raises(ValueError, match="some have raw"):
        rescore(model, [completions[0], raw[1]])
    with pytest.raises(ValueError, match="2 distributions"):
        pack([[1]], [[2]], "cpu", distributions=[Distribution()] * 2)
    with pytest.raises(ValueError, match="logprobs_mode is 'processed'; it must be raw_logprobs or processed_logprobs"):
        EmbeddedEngine(model, logprobs_mode="processed")  # type: ignore[arg-type]


def test_a_request_does_not_see_its_neighbours(model, completions):
    engine = EmbeddedEngine(model, logprobs_mode="processed_logprobs")
    for prompt, params, together in zip(PROMPTS, PARAMS, completions, strict=True):
        [alone] = engine.generate([prompt], params)
        assert alone.tokens == together.tokens
        assert torch.equal(alone.logprobs, together.logprobs)


def test_what_is_dropped_is_never_drawn():
    logits = torch.full((64, 40), float("-inf"))
    logits[:, 3], logits[:, 9] = 0.0, -1.0
    drawn = sample(logits, torch.zeros(64, dtype=torch.bool), torch.arange(64), torch.arange(64))
    assert set(drawn.tolist()) == {3, 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "SamplingParams: temperature"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 1.5}, "min_p must be in"),
    ],
)
def test_what_no_token_can_be_sampled_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(1, **options)


def trained(steps, **changes):
    """Metrics of each step, and the weights after it."""
    settings: dict[str, Any] = {
        "prompts_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    small = {"num_hidden_layers": 1}
    config = TrainConfig(**(settings | {"top_k": 20, "architecture": tiny_config(**small).to_dict()} | changes))
    model = tiny_model(**small)
    engine = EmbeddedEngine(model, logprobs_mode=config.logprobs_mode)
    trainer = Trainer(config, model, engine, Repeat(Alphabet.integers(48, 8), config.max_new_tokens))
    found = []
    for i in range(steps):
        metrics = trainer.step(i + 1)
        found.append((metrics, [p.detach().clone() for p in model.parameters()]))
    return found


def test_training_learns_from_the_distribution_that_was_sampled(monkeypatch):
    monkeypatch.setattr(packing, "UNIT_TOKENS", 1)  # or there is nothing to cut
    (first, weights), (second, later) = trained(2)
    assert [first.tokens_different, second.tokens_different] == [0, 0]
    assert not all(map(torch.equal, weights, later))
    [(cut, others)] = trained(1, max_tokens_per_microbatch=1)
    assert cut.reward_mean == first.reward_mean
    assert all(map(torch.equal, weights, others))
    assert TrainConfig(temperature=0.7).engine_options()["logprobs_mode"] == "processed_logprobs"
    assert "logprobs_mode" not in TrainConfig().engine_options()
