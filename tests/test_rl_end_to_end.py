"""Training the real model: the bits of rollout and training agree, and so do two runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bi_ops.core import runtime
from bi_ops.rl import PRESETS, read_metrics, run

SMALL: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2, "save_every": 1}


def config(steps):
    if runtime.INTERPRET:
        return dataclasses.replace(PRESETS["demo"], steps=steps, **SMALL)
    return dataclasses.replace(PRESETS["h100"], steps=steps, engine="embedded")


def test_two_runs_and_a_resumed_one_agree_bit_for_bit(tmp_path):
    one = run(config(3), tmp_path / "one")
    two = run(config(2), tmp_path / "two")
    assert two.weights_sha256 != one.weights_sha256
    two = run(config(3), tmp_path / "two", resume=True)
    assert two.weights_sha256 == one.weights_sha256
    assert one.tokens_different == two.tokens_different == 0
    records = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert all(r["tokens_checked"] > 0 and r["max_delta"] == 0 for r in records)
    assert any(r["grad_norm"] > 0 for r in records)


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.memory  # its engine measures what is free
def test_training_with_vllm_agrees_bit_for_bit(tmp_path):
    summary = run(dataclasses.replace(PRESETS["h100"], steps=3), tmp_path / "run")
    assert summary.tokens_different == 0


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.memory  # its engine measures what is free
def test_training_with_own_attention_in_vllm_agrees_bit_for_bit(tmp_path):
    """At a head size that FlashAttention 3 cannot keep."""
    preset = PRESETS["h100"]
    small = dataclasses.replace(
        preset, steps=3, attention="triton", architecture={**preset.architecture, "head_dim": 64}
    )
    summary = run(small, tmp_path / "run")
    assert summary.tokens_different == 0
    assert summary.engine["backends"]["attention"] == "bi_ops triton"
