"""A verdict over a degenerate run must not read as proof: nothing compared, one value, no numbers, an empty model."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg"
from __future__ import annotations

import json
import math
from typing import cast

import pytest
import torch
from tiny import tiny_model

from bi_ops import cli, matmul
from bi_ops.matmul import verification
from bi_ops.models.base import CausalLM
from bi_ops.rollout.base import Completion
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant
from bi_ops.verify.compositions import rescore
from bi_ops.verify.parity import compare, joined
from bi_ops.verify.properties import GradientErrors

NAN, INF = math.nan, math.inf


def report(rollout, training=None):
    """Of one sequence for each list of values."""
    ours, theirs = ([torch.tensor(v) for v in values] for values in (rollout, training or rollout))
    return compare(ours, theirs, [[0] * len(v) for v in rollout])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([[-1.0, NAN]], "1 of 2 log-probabilities are NaN or infinite"),
        ([[-INF, -1.0], [NAN]], "2 of 3 log-probabilities are NaN or infinite"),
        ([[-3.5, -3.5], [], [-3.5]], "all 3 log-probabilities are -3.5, as from constant logits"),
        ([[0.0], [0.0]], "all 2 log-probabilities are 0.0"),
    ],
)
def test_equal_bits_that_show_nothing_say_so(values, why):
    r = report(values)
    assert r.identical
    assert why in r.inconclusive
    assert r.verdict.startswith("NOTHING SHOWN")
    assert "bitwise identical" not in str(r)
    parts = joined([report([v]) for v in values if v])
    assert parts.inconclusive == r.inconclusive, "one report or several"


def test_equal_bits_of_different_values_are_identical():
    for values in ([[-1.0, -2.0]], [[-1.0], [-2.0]], [[-1.0]], [[], [-1.0, -1.0, -2.0]]):
        r = report(values)
        assert (r.identical, r.inconclusive, r.verdict) == (True, "", "bitwise identical")
        assert joined([report([v]) for v in values if v]).verdict == "bitwise identical"


def test_a_difference_stays_a_difference():
    r = report([[-1.0, NAN]], [[-1.0, -2.0]])
    assert (r.verdict, r.tokens_different, r.max_delta) == ("DIFFERENT", 1, INF)


@pytest.mark.parametrize("call", [lambda: joined([]), lambda: report([[], []]), lambda: report([])])
def test_no_token_is_no_report(call):
    with pytest.raises(ValueError, match=r"no (reports|tokens)"):
        call()


def test_rescoring_nothing_is_refused():
    done = [Completion((1,), (2,), torch.tensor([-1.0]), "length")]
    with pytest.raises(ValueError, match="no compositions"):
        rescore(tiny_model(), done, ())
    with pytest.raises(ValueError, match="no parameters"):
        rescore(cast(CausalLM, torch.nn.Module()), done)
    with pytest.raises(ValueError, match="sequence 0 has 1 prompt and 0 completion"):
        rescore(tiny_model(), [Completion((1,), (), torch.empty(0), "length")])


def degenerate(kind: str):
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(NAN if kind == "nan" else 0.0)
    return model


@pytest.mark.parametrize(("kind", "why"), [("zero", "as from constant logits"), ("nan", "NaN or infinite")])
def test_parity_of_a_degenerate_model_is_exit_code_1_and_a_plain_sentence(capsys, tmp_path, monkeypatch, kind, why):
    degenerate(kind).save_pretrained(tmp_path)
    argv = ["parity", str(tmp_path), "--prompts", "2", "--new-tokens", "2", "--max-prompt-tokens", "3"]
    if kind == "nan":  # the engine itself stops at them: an engine that does not
        honest = tiny_model(num_hidden_layers=1)
        monkeypatch.setattr(
            "bi_ops.rollout.embedded.EmbeddedEngine.generate",
            lambda self, prompts, params: [
                Completion(tuple(p), (1, 2), torch.full((2,), NAN), "length") for p in prompts
            ],
        )
        monkeypatch.setattr(type(honest), "token_logprobs", lambda self, b: torch.full((len(b.targets),), NAN))
    code = cli.main(argv)
    out = capsys.readouterr().out
    assert code == 1
    assert out.rstrip().splitlines()[-1].startswith("NOTHING SHOWN")
    assert why in out
    assert "bitwise identical" not in out
    assert cli.main([*argv, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert all(why in row["inconclusive"] for row in rows if row["composition"] != "draws")
    assert {key for row in rows for key in row} == set(rows[-1])


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.zeros_like(x),
        lambda x: torch.full_like(x, NAN),
        lambda x: x.new_empty(len(x), 0),
        lambda x: (torch.full_like(x, -INF), torch.ones(len(x), dtype=torch.int64)),
    ],
    ids=["one value", "nan", "empty", "several"],
)
def test_the_checks_refuse_results_in_which_nothing_could_show(op):
    x = torch.randn(6, 3)
    for call in (
        lambda: row_variant(op, (x,), (2,)),
        lambda: order_variant(op, (x,)),
        lambda: rerun_variant(lambda: op(x), 2),
    ):
        with pytest.raises(ValueError, match="equal bits show nothing"):
            call()


def test_one_output_with_something_to_show_is_enough():
    x = torch.randn(6, 3)
    assert row_variant(lambda t: (t, torch.zeros_like(t)), (x,), (2,)) == []
    assert row_variant(lambda t: torch.where(t > 0, t, NAN), (x,), (2,)) == []
    assert rerun_variant(lambda: torch.tensor(1.0), 2) == []


def test_every_shuffle_moves_a_row():
    seen: list[torch.Tensor] = []
    x = torch.randn(2, 3)

    def keep(t):
        seen.append(t)
        return t

    order_variant(keep, (x,), trials=8)
    assert not any(torch.equal(t, x) for t in seen[1:])


def test_an_error_that_is_no_number_is_not_ok():
    assert GradientErrors("out", 1e-7, 1e-7).ok
    for ours, plain in ((INF, INF), (NAN, 1e-7), (NAN, NAN), (INF, 1e-7)):
        assert not GradientErrors("out", ours, plain).ok


@pytest.mark.parametrize(
    ("inputs", "reference", "why"),
    [
        ({"x": torch.ones(0, 3)}, torch.neg, "empty results"),
        ({"x": torch.ones(2, dtype=torch.int64)}, torch.neg, "no floating-point input"),
        ({"x": torch.ones(2, 3)}, lambda x: x.sum(0), "shapes"),
    ],
)
def test_gradients_of_nothing_are_refused(inputs, reference, why):
    with pytest.raises(ValueError, match=why):
        gradient_errors(torch.neg, reference, inputs)


def test_a_warm_up_that_verified_nothing_says_why(monkeypatch):
    monkeypatch.setattr(
        matmul.warmup.__globals__["backends"], "get", lambda name: type("B", (), {"available": lambda s: True})()
    )
    assert matmul.warmup(torch.nn.ReLU()).reason == "the model has no two-dimensional weight on a GPU"
    monkeypatch.setattr(verification, "wanted", list)
    assert matmul.warmup().reason == "no GEMM has run unverified"
