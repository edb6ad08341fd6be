"""A tiny Qwen3-MoE sampled by vLLM on a GPU and scored by training: no bit differs, whoever computes the experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bi_ops.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from bi_ops.rl import PRESETS, run
from bi_ops.rollout import vllm_engine
from bi_ops.rollout.base import Completion, SamplingParams
from bi_ops.verify.compositions import rescore

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.engine]

#: A cache of a known size, so that an engine starts beside other tests on one GPU.
MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "max_model_len": 512}
PROMPTS = [[5, 6, 7], [9] * 300, list(range(1, 130)), [3]]
PARAMS = [SamplingParams(24, temperature=t, seed=s) for s, t in enumerate((1.0, 0.0, 0.7, 1.0))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two of random weights; one layer of three is dense, and experts get unequal numbers of tokens."""
    config = Qwen3MoeConfig(
        vocab_size=1000,  # no multiple of 64, to which vLLM pads
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
        initializer_range=0.07,
    )
    folders = []
    for seed in (0, 1):
        model = Qwen3MoeForCausalLM(config)
        model.init_weights(seed)
        folders.append(tmp_path_factory.mktemp(f"moe{seed}"))
        model.save_pretrained(folders[-1])
    return folders


def same(a: list[Completion], b: list[Completion]) -> bool:
    return all(x.tokens == y.tokens and torch.equal(x.logprobs, y.logprobs) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def sampled() -> dict[tuple[str, bool], list[Completion]]:
    """What each engine sampled from the first checkpoint."""
    return {}


@pytest.mark.parametrize("kernels", ["bi_ops", "vllm"])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_what_vllm_samples_is_scored_with_the_same_bits(checkpoints, sampled, kernels, cuda_graphs):
    engine = vllm_engine.VllmEngine(checkpoints[0], kernels=kernels, cuda_graphs=cuda_graphs, **MEMORY)
    try:
        backends = engine.describe()["backends"]
        assert (backends["router"], backends["experts"]) == ("bi_ops", kernels)
        first = engine.generate(PROMPTS, PARAMS)
        alone = [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
        assert same(first, alone)
        sampled[kernels, cuda_graphs] = first
        model = Qwen3MoeForCausalLM.from_pretrained(checkpoints[0])
        assert engine.orders is not None
        model.adopt(engine.orders)
        reports = rescore(model, first, orders=engine.orders)
        assert all(r.identical and r.tokens_checked == 96 for r in reports.values()), reports
        # Other weights: into vLLM's own tensors, which graphs read.
        other = Qwen3MoeForCausalLM.from_pretrained(checkpoints[1])
        other.adopt(engine.orders)
        assert not rescore(other, first, ("together",))["together"].identical  # negative control
        engine.update_weights(other)
        updated = engine.generate(PROMPTS, PARAMS)
        assert not same(first, updated)
        reports = rescore(other, updated, orders=engine.orders)
        assert all(r.identical for r in reports.values()), reports
    finally:
        engine.close()


def test_every_engine_sampled_the_same(sampled):
    """Whoever computes the experts, with graphs and without."""
    if len(sampled) < 2:
        pytest.skip("compares what the tests before it sampled")
    first, *others = sampled.values()
    assert [key for key, found in sampled.items() if not same(first, found)] == []
    assert others


@pytest.mark.memory  # its engine measures what is free
def test_training_with_vllm_agrees_bit_for_bit(tmp_path):
    summary = run(dataclasses.replace(PRESETS["h100-moe"], steps=2), tmp_path / "run")
    assert (summary.tokens_checked > 0, summary.tokens_different) == (True, 0)
