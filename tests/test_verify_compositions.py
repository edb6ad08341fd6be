"""Scoring in other batch compositions, with a stand-in model whose rule is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bi_ops.rollout.base import Completion
from bi_ops.verify import compositions
from bi_ops.verify.compositions import COMPOSITIONS

VOCAB = 50
rescore: Any = compositions.rescore  # whose model is a stand-in here


class Model(torch.nn.Module):
    """Scores a token by its sequence alone: a hash of the ids before it. `leak` adds what a broken kernel would."""

    def __init__(self, leak=lambda batch: 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.leak = leak
        self.batches = []

    def token_logprobs(self, batch, attention_backend=None):
        assert not torch.is_grad_enabled()
        self.batches.append(batch)
        starts = torch.repeat_interleave(batch.cu_seqlens[:-1], batch.cu_seqlens.diff()).long()
        sums = torch.cat((torch.zeros(1), batch.input_ids.cumsum(0)))
        before = sums[batch.logit_indices + 1] - sums[starts[batch.logit_indices]]
        return -(before * 7 + batch.targets) / 13 + self.leak(batch)


def completions():
    made = []
    generator = torch.Generator().manual_seed(0)
    for prompt_len, length in ((3, 4), (1, 1), (20, 9), (7, 2), (2, 12)):
        ids = torch.randint(VOCAB, (prompt_len + length,), generator=generator).tolist()
        prompt, tokens = tuple(ids[:prompt_len]), tuple(ids[prompt_len:])
        scores = torch.tensor(
            [-(sum(prompt + tokens[:i]) * 7 + t) / 13 for i, t in enumerate(tokens)], dtype=torch.float64
        )
        made.append(Completion(prompt, tokens, scores.float(), "length"))
    return made


def test_every_composition_scores_every_token():
    model, calls = Model(), []
    reports = rescore(model, completions(), max_tokens_per_pack=40, progress=lambda *a: calls.append(a))
    assert list(reports) == list(COMPOSITIONS)
    assert all(r.identical and r.tokens_checked == 28 for r in reports.values()), reports
    assert [c for c in calls if c[1] == c[2]] == [(name, 5, 5) for name in COMPOSITIONS]
    assert max(int(b.cu_seqlens[-1]) for b in model.batches) <= 40


def test_alone_is_one_sequence_per_batch_and_together_is_one_batch():
    model = Model()
    rescore(model, completions(), ("alone", "together"))
    assert [len(b.lengths) for b in model.batches] == [1, 1, 1, 1, 1, 5]


def test_a_sequence_longer_than_a_pack_gets_its_own():
    model = Model()
    assert rescore(model, completions(), ("together",), max_tokens_per_pack=1)["together"].identical
    assert [len(b.lengths) for b in model.batches] == [1] * 5


def test_distractors_are_among_them_and_their_scores_are_not_compared():
    model = Model()
    report = rescore(model, completions(), ("distractors",))["distractors"]
    assert len(model.batches[0].lengths) == 10
    assert report.identical
    assert report.tokens_checked == 28


def test_a_composition_is_the_same_whatever_else_is_asked_for():
    one, all_ = Model(), Model()
    rescore(one, completions(), ("shuffled",))
    rescore(all_, completions())
    assert torch.equal(one.batches[0].input_ids, all_.batches[6].input_ids)
    assert not torch.equal(all_.batches[5].input_ids, all_.batches[6].input_ids)


def test_a_model_that_looks_at_its_batch_is_caught():
    """Negative control: a score that depends on how many tokens share the batch."""
    reports = rescore(Model(lambda batch: 1e-3 * (len(batch.input_ids) > 40)), completions())
    assert reports["alone"].identical
    for name in ("together", "shuffled", "distractors"):
        assert reports[name].tokens_different > 0, name
        assert 0 < reports[name].max_delta < 2e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rescore(Model(), completions(), ("alone", "reversed")), "reversed"),
        (lambda: rescore(Model(), []), "no completions"),
        (lambda: rescore(Model(), completions(), max_tokens_per_pack=0), "max_tokens_per_pack"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
