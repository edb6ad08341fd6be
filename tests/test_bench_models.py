"""bench/models.py without vLLM or a GPU: its checkpoints, its verdicts, and what counts as a difference."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import models
import models_worker

from bi_ops.rollout.base import Completion

GOOD = {
    **{"tokens": models.LEAST, "distinct": models.LEAST, "alone": 1024, "alone_different": 0, "rescored_different": 0},
    "operators": {"linear": 12, "norm": 7, "activation": 3, "qk_norm_rope": 3},
}
SMALL = {
    **{"hidden_size": 32, "intermediate_size": 16, "vocab_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3},
    **{"num_key_value_heads": 1, "head_dim": 16},
}


def test_every_model_of_the_contract_has_a_row_and_enough_tokens():
    families = {m.family for m in models.MODELS.values()}
    assert families >= {"Qwen2", "Llama", "Mistral", "Gemma3", "Phi3", "Olmo2", "GptOss", "Qwen3Moe"}
    assert {name for name, m in models.MODELS.items() if m.refused} == {"gpt-oss, mxfp4"}
    assert models_worker.PROMPTS * models_worker.NEW_TOKENS >= models.LEAST
    assert models_worker.OPTIONS["max_model_len"] > models_worker.LONGEST + models_worker.NEW_TOKENS
    lengths = [len(p) for p in models_worker.prompts(100)]
    assert (len(lengths), min(lengths), max(lengths)) == (models_worker.PROMPTS, 1, models_worker.LONGEST)


@pytest.mark.parametrize(
    ("model", "found", "said", "why"),
    [
        ("Llama", GOOD, "right", ""),
        ("Llama", GOOD | {"alone_different": 2}, "wrong", "2 of 1024 different alone"),
        ("Llama", GOOD | {"rescored_different": 5}, "wrong", "5 of 10000 rescored"),
        ("Llama", GOOD | {"tokens": 9}, "wrong", "only 9 tokens"),
        ("Llama", GOOD | {"distinct": 3}, "wrong", "only 3 log-probabilities are distinct"),
        ("Llama", GOOD | {"operators": {"linear": 12}}, "wrong", "bi_ops does not compute activation, norm"),
        ("Llama", {"failed": "no memory"}, "wrong", "no memory"),
        ("Llama", {"refused": "vllm_plugin: no"}, "wrong", "vllm_plugin: no"),
        ("Gemma 3", GOOD | {"operators": {"linear": 12}}, "right", ""),
        ("Qwen3-MoE", GOOD | {"operators": {"linear": 12, "norm": 7}}, "wrong", "qk_norm_rope"),
        ("gpt-oss, mxfp4", {"refused": "vllm_plugin: is quantized"}, "refused", "is quantized"),
        ("gpt-oss, mxfp4", {"refused": "no backend"}, "wrong", "no backend"),
        ("gpt-oss, mxfp4", GOOD, "wrong", "not refused"),
    ],
)
def test_verdicts(model, found, said, why):
    verdict = models.verdict(models.MODELS[model], found)
    assert verdict[0] == said
    assert why in verdict[1]
    assert bool(verdict[1]) is bool(why)


def test_what_is_done_is_not_run_again_and_a_failure_is():
    rows: list = []
    for name, found in (("Llama", GOOD), ("Qwen2", {"failed": "no"}), ("gpt-oss", GOOD)):
        rows = models.merged(rows, {"release": "0.26.0", "model": name, "plugin": found})
    assert [r["model"] for r in rows] == ["Qwen2", "Llama", "gpt-oss"]
    wanted = ["Qwen2", "Llama", "Mistral"]
    assert models.missing(rows, "0.26.0", wanted, False) == ["Qwen2", "Mistral"]
    assert models.missing(rows, "0.26.0", wanted, True) == wanted
    assert models.missing(rows, "0.33.0", wanted, False) == wanted
    again = models.merged(rows, {"release": "0.26.0", "model": "Qwen2", "plugin": GOOD})
    assert [r["plugin"] for r in again] == [GOOD] * 3


def completion(tokens, logprobs):
    return Completion((1, 2), tuple(tokens), torch.tensor(logprobs), "length")


def test_a_difference_is_another_token_or_another_bit():
    one = [completion([3, 4], [-0.5, -1.5]), completion([5], [-0.25])]
    assert models_worker.differences(one, one) == 0
    bit = torch.tensor([-0.5, -1.5])
    bit.view(torch.int32)[1] ^= 1
    assert models_worker.differences(one, [completion([3, 4], bit.tolist()), one[1]]) == 1
    assert models_worker.differences(one, [completion([3, 9], [-0.5, -1.5]), one[1]]) == 1
    assert models_worker.differences(one, [completion([9, 9], [-0.5, -2.5]), completion([6], [-0.25])]) == 3


def test_the_score_of_a_completion_is_read_off_a_prompt_with_and_without_the_most_likely_token():
    asked = completion([3, 4], [-0.5, -1.5])
    plain = types.SimpleNamespace(start_indices=[0, 0, 1, 2], token_ids=[2, 3, 4], logprobs=[-9.0, -0.5, -1.25])
    assert models_worker.rescored(asked, plain).logprobs.tolist() == [-0.5, -1.25]
    more = types.SimpleNamespace(
        start_indices=[0, 0, 2, 4], token_ids=[2, 7, 3, 7, 4, 7], logprobs=[-9.0, -1.0, -0.5, -1.0, -1.25, -1.0]
    )
    assert models_worker.rescored(asked, more).logprobs.tolist() == [-0.5, -1.25]
    with pytest.raises(RuntimeError, match="no log-probability"):
        models_worker.rescored(completion([3, 5], [-0.5, -1.5]), plain)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_checkpoint_is_written_by_transformers_and_has_nothing_constant(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = models.MODELS[name]
    sizes = {**model.sizes, **SMALL}
    sizes |= {k: 4 for k in ("num_experts", "num_local_experts") if k in sizes}
    sizes |= {k: 2 for k in ("num_experts_per_tok",) if k in sizes}
    if "longrope" in str(sizes.get("rope_parameters")):
        pairs = 6 if "partial_rotary_factor" in sizes else 8
        sizes["rope_parameters"] = sizes["rope_parameters"] | {f"{k}_factor": [1.0] * pairs for k in ("short", "long")}
    models.write_checkpoint(tmp_path, dataclasses.replace(model, sizes=sizes))
    config = json.loads((tmp_path / "config.json").read_text())
    made = f"{model.family}ForCausalLM"
    assert config["architectures"] == [made]
    if model.refused:
        assert config["quantization_config"]["quant_method"] == "mxfp4"
        return
    loaded = getattr(transformers, made).from_pretrained(tmp_path)
    for key, p in loaded.named_parameters():
        assert p.dtype == torch.bfloat16, key
        assert len(p.flatten()[:8].unique()) > 1, key
