"""Bisect names the first operator in which a rollout and training differ."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import sweep
from tiny import tiny_model

from bi_ops import cli
from bi_ops.models import orders
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.bisect import FUSED, TOKENS, bisect, first_difference, of_rollout, of_training

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import planted_bits
from planted_bits import PROMPT, Flip, planted

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
IN_A_LAYER = (
    *("input_layernorm", "self_attn.qkv_proj", "self_attn.qkv", "self_attn.attn", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_up_proj", "mlp.act_fn", "mlp.down_proj"),
)
SITES = (
    "model.embed_tokens",
    *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in IN_A_LAYER),
    *("model.norm", "lm_head", TOKENS, FUSED),
)
PARAMS = SamplingParams(max_new_tokens=1, seed=3)


@pytest.fixture(scope="module")
def sides():
    model = tiny_model()
    return EmbeddedEngine(model), model


def found(sides, **options):
    engine, model = sides
    return bisect(engine, model, PROMPT, SamplingParams(**({"max_new_tokens": 1, "seed": 3} | options)))


def test_nothing_is_found_where_nothing_differs(sides):
    assert found(sides, max_new_tokens=2) is None


@pytest.fixture(scope="module")
def traces(sides):
    """Of both sides, with nothing planted."""
    engine, model = sides
    rollout, completion = of_rollout(engine, PROMPT, PARAMS)
    return rollout, of_training(model, completion), completion


def test_every_operator_of_both_sides_is_a_site(traces):
    rollout, training, _ = traces
    assert list(dict.fromkeys(site for site, _ in planted_bits.places(rollout, training))) == list(SITES)


EVERY = list(enumerate(SITES))


@sweep(("i", "site"), EVERY, EVERY[:12:2] + EVERY[13::3] + EVERY[-3:])
def test_a_planted_bit_is_found_at_its_operator(i, site, sides, traces):
    engine, model = sides
    rollout, training, completion = traces
    flip = Flip(random.Random(i))
    if i % 2 or site == FUSED:
        with planted(model, site, flip):
            training = of_training(model, completion)
    else:
        with planted(engine.model, site, flip, engine):
            rollout, _ = of_rollout(engine, PROMPT, PARAMS)
    difference = first_difference(rollout, training)
    assert difference is not None
    assert (difference.site, difference.kind) == (site, "operator"), str(difference)
    assert difference.elements == 1
    assert difference.values[0] != difference.values[1]
    assert flip.place is not None
    assert (difference.row, difference.column) == flip.place[:2]


def test_the_table_of_planted_bits_tells_what_is_missed(sides, monkeypatch):
    engine, model = sides
    chosen = [(SITES[2], "rollout"), (FUSED, "training")]
    monkeypatch.setattr(planted_bits, "places", lambda rollout, training: chosen)
    rows = planted_bits.examine(engine, model, seed=0)
    assert [row["found"] for row in rows] == [True] * 3
    monkeypatch.setattr(planted_bits.bisect, "first_difference", lambda rollout, training: None)
    assert [row["found"] for row in planted_bits.examine(engine, model, seed=0)] == [True, False, False]


def test_nothing_in_the_table_was_missed():
    record = json.loads((RESULTS / "cpu" / "bisect.json").read_text(encoding="utf-8"))
    places = {(row["model"], row["site"], row["side"]) for row in record["rows"] if "side" in row}
    assert len(places) == record["places"] >= 20
    assert {("qwen3", site, side) for site in SITES for side in ("rollout", "training")} - places == {
        ("qwen3", FUSED, "rollout")
    }
    assert all(row["found"] for row in record["rows"])
    assert record["missed"] == 0


def test_scores_of_a_sampled_distribution_are_compared_as_sampled(sides):
    engine, model = sides
    sampler = EmbeddedEngine(engine.model, logprobs_mode="processed_logprobs")
    params = dataclasses.replace(PARAMS, temperature=0.7, top_k=5)
    assert bisect(sampler, model, PROMPT, params) is None
    with planted(engine.model, TOKENS, Flip(random.Random(0)), sampler):
        difference = bisect(sampler, model, PROMPT, params)
    assert difference is not None
    assert difference.site == TOKENS


def test_the_order_and_backend_of_each_side_are_told(sides):
    engine, model = sides
    with planted(engine.model, "model.layers.1.mlp.down_proj", Flip(random.Random(0))):
        text = str(found(sides))
    assert "model.layers.1.mlp.down_proj: its inputs are equal, its output is not" in text
    assert "order GemmOrder" in text
    chosen = orders.chosen_backends(model.attention_backend, model.shapes(), model.device)
    assert f"backend {chosen['matmul']}" in text


def test_other_weights_are_called_so(sides):
    engine, _ = sides
    other: Any = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight[3, 2] += 1.0
    difference = found((engine, other))
    assert difference is not None
    assert (difference.site, difference.kind) == ("model.layers.1.self_attn.o_proj", "weights")


def test_the_command_names_the_operator_in_which_two_checkpoints_differ(tmp_path, capsys):
    model: Any = tiny_model()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] += 1.0
    model.save_pretrained(tmp_path / "after")
    paths = [str(tmp_path / name) for name in ("before", "after")]
    sizes = ["--prompts", "1", "--new-tokens", "1", "--max-prompt-tokens", "2"]
    assert cli.main(["parity", paths[0], "--against", paths[1], "--bisect", *sizes]) == 1
    assert "first difference at model.layers.0.mlp.down_proj: its inputs are equal, its weights are not" in (
        capsys.readouterr().err
    )


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_a_planted_bit_is_found_in_vllm(tmp_path):
    from bi_ops.rollout.vllm_engine import VllmEngine

    model = tiny_model(hidden_size=256, intermediate_size=512)
    model.save_pretrained(tmp_path)
    engine = VllmEngine(tmp_path, cuda_graphs=False, gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30)
    try:
        assert bisect(engine, model, PROMPT, SamplingParams(max_new_tokens=4, seed=3)) is None
        layer = ("self_attn.qkv_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
        for site in (*(f"model.layers.1.{name}" for name in layer), "lm_head", TOKENS):
            for where in (engine.model, model):
                with planted(where, site, Flip(random.Random(0)), engine if where is engine.model else None):
                    difference = bisect(engine, model, PROMPT, SamplingParams(max_new_tokens=4, seed=3))
                assert difference is not None
                assert difference.site == site, str(difference)
    finally:
        engine.close()
