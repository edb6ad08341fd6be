"""A rollout drawn again: the same tokens, and another one is named."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from tiny import tiny_model

from bi_ops.rollout import vllm_requests
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.draws import Draw, redrawn

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def rollout():
    """A model, a closed engine, and what it sampled."""
    model = tiny_model(num_hidden_layers=1)
    engine = EmbeddedEngine(model)
    params = [SamplingParams(4, seed=11 + i) for i in range(len(PROMPTS))]
    completions = engine.generate(PROMPTS, params)
    engine.close()
    return model, engine, completions, params


def test_every_token_is_the_one_that_its_seed_draws(rollout):
    model, engine, completions, params = rollout
    seen: list[tuple[int, int]] = []
    report = redrawn(model, engine, completions, params, progress=lambda *at: seen.append(at))
    assert report is not None
    assert (report.tokens_checked, report.tokens_different, report.first_difference) == (12, 0, None)
    assert seen == [(3, 3)]
    assert redrawn(model, engine, completions, params, max_tokens_per_pack=1) == report  # each in a pack of its own


def test_a_token_from_elsewhere_is_named(rollout):
    model, engine, completions, params = rollout
    given = list(completions)
    tokens = list(given[1].tokens)
    tokens[3] = (tokens[3] + 1) % model.config.vocab_size
    given[1] = dataclasses.replace(given[1], tokens=tuple(tokens))
    report = redrawn(model, engine, given, params)
    assert report is not None
    assert report.first_difference == Draw(1, 3, tokens[3], completions[1].tokens[3])
    assert str(report).startswith("12 tokens drawn again, 1 others; first: sequence 1, completion position 3: token")


def test_filtered_tokens_are_not_what_the_seed_draws(rollout):
    """The case that it is for: two of all tokens may be drawn, and nobody said so."""
    model, engine, _, params = rollout
    filtering = EmbeddedEngine(model)
    found = filtering.generate(PROMPTS, [dataclasses.replace(p, top_k=2) for p in params])
    report = redrawn(model, engine, found, params)
    assert report is not None
    assert report.tokens_different > 3


def test_what_is_not_drawn_from_the_logits_alone_is_left_out(rollout):
    model, engine, completions, params = rollout
    others = [dataclasses.replace(params[0], temperature=0.0), dataclasses.replace(params[1], top_p=0.5), params[2]]
    report = redrawn(model, engine, completions, others)
    assert report is not None
    assert report.tokens_checked == 4
    assert redrawn(model, engine, completions[:2], others[:2]) is None
    assert redrawn(model, object(), completions, params) is None
    with pytest.raises(ValueError, match="3 completions but 1 sampling parameters"):
        redrawn(model, engine, completions, params[:1])


@pytest.mark.parametrize("drafts", [False, True])
def test_vllm_is_asked_with_positions_and_a_temperature_of_one(monkeypatch, drafts):
    """0.33 also wants to know whether a draft is drawn."""
    asked: dict[str, object] = {}

    def newer(logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting):
        asked.update(locals())
        return logits.argmax(1)

    def older(logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature):
        asked.update(locals())
        return logits.argmax(1)

    module = types.ModuleType("vllm.v1.worker.gpu.sample.gumbel")
    monkeypatch.setattr(module, "gumbel_sample", newer if drafts else older, raising=False)
    for name in ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    logits = torch.tensor([[0.0, 1.0], [3.0, 2.0]], dtype=torch.bfloat16)
    found = vllm_requests.redraw(logits, torch.tensor([7, 8]), torch.tensor([3, 9]))
    assert found.tolist() == [1, 0]
    assert asked["pos"].tolist() == [2, 8]  # type: ignore[attr-defined]
    assert asked["temperature"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    assert asked["logits"].dtype == torch.float32  # type: ignore[attr-defined]
    assert asked.get("is_drafting", False) is asked["apply_temperature"] is False
