"""Qwen3-MoE: config and checkpoints as publishers and transformers write them, and transformers' function."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_moe_config, tiny_moe_model

from bi_ops import models
from bi_ops.core import runtime
from bi_ops.models import checkpoint
from bi_ops.models.packing import pack
from bi_ops.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", params=[True, False], ids=["one tensor an expert", "fused experts"])
def hugging_face(request, tmp_path_factory):
    """A tiny Qwen3-MoE written by transformers in one of its layouts: (folder, transformers' model)."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Qwen3MoeConfig(**SIZES, norm_topk_prob=request.param, mlp_only_layers=[1])
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("moe") / "hf"
    model.save_pretrained(folder, save_original_format=request.param)
    assert ("model.layers.0.mlp.experts.3.up_proj.weight" in load_file(folder / "model.safetensors")) is request.param
    return folder, model


def test_reading_and_saving_gives_the_same_bytes(hugging_face, tmp_path):
    folder, _ = hugging_face
    Qwen3MoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, folder))
    assert ours == theirs


def test_transformers_reads_what_was_saved(hugging_face, tmp_path):
    folder, theirs = hugging_face
    Qwen3MoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_experts_lie_as_vllm_has_them(hugging_face):
    """Gate before up, rows of outputs, one expert after the other."""
    folder, theirs = hugging_face
    ours = dict(Qwen3MoeForCausalLM.from_pretrained(folder, param_dtype=torch.bfloat16).named_parameters())
    experts = theirs.model.layers[0].mlp.experts
    assert torch.equal(ours["model.layers.0.mlp.experts.gate_up_proj.weight"].cpu(), experts.gate_up_proj)
    assert torch.equal(ours["model.layers.0.mlp.experts.down_proj.weight"].cpu(), experts.down_proj)


def test_it_is_the_function_transformers_computes(hugging_face, device):
    """Log-probabilities, and gradients of all weights but norms', in fp32 against transformers in fp64."""
    folder, theirs = hugging_face
    if not theirs.config.norm_topk_prob and runtime.INTERPRET:
        pytest.skip("once is enough in the interpreter")
    ours = Qwen3MoeForCausalLM.from_pretrained(folder, compute_dtype=torch.float32)
    theirs = type(theirs).from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    ids = [[5, 7, 11, 2, 9, 40, 3], [1, 2]]
    batch = pack([i[:1] for i in ids], [i[1:] for i in ids], device)
    for name, p in ours.named_parameters():
        p.requires_grad_(not name.endswith("norm.weight"))  # theirs is another test's, and takes the interpreter long
    scores = ours.token_logprobs(batch)
    scores.sum().backward()
    found = []
    for sequence in ids:
        logits = theirs(torch.tensor([sequence])).logits[0, :-1]
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0])
    expected = torch.cat(found)
    expected.sum().backward()
    torch.testing.assert_close(scores.cpu(), expected.float(), rtol=1e-3, atol=1e-3)
    stored = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for w in ours.weight_slices(fused_experts=True):
        if (grad := dict(ours.named_parameters())[w.parameter].grad) is None:
            continue
        mine = w.of(grad).cpu()
        torch.testing.assert_close(mine, gradients[w.name].float(), rtol=2e-3, atol=2e-3, msg=w.name)
        stored.discard(w.name)
    assert not stored
    gate = dict(ours.named_parameters())["model.layers.0.mlp.gate.weight"].grad
    assert gate is not None
    wrong = gradients["model.layers.0.mlp.gate.weight"].flip(0).float()  # negative control: other experts' rows
    assert not torch.allclose(gate.cpu(), wrong, rtol=2e-3, atol=2e-3)


def test_shards_are_read_tensor_by_tensor(hugging_face, tmp_path):
    folder, _ = hugging_face
    whole = Qwen3MoeForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    weight_map = {n: f"part-{i % 3}.safetensors" for i, n in enumerate(sorted(tensors))}
    for part in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    parts = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_large_checkpoint_is_saved_in_shards_and_read_by_transformers(hugging_face, tmp_path, monkeypatch):
    folder, theirs = hugging_face
    ours = Qwen3MoeForCausalLM.from_pretrained(folder)
    ours.save_pretrained(tmp_path)  # in one file, which the shards replace
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8000)
    ours.save_pretrained(tmp_path)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors*"))
    assert files[0].startswith("model-00001-of-0000")
    assert files[-1] == "model.safetensors.index.json"
    assert all((tmp_path / f).stat().st_size < 12000 for f in files[:-1])
    for name, p in type(theirs).from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(p, theirs.state_dict()[name]), name
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    monkeypatch.undo()
    again.save_pretrained(tmp_path)  # one file again
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shards_that_were_interrupted_are_no_checkpoint(tmp_path, monkeypatch):
    model = tiny_moe_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8000)
    real, renames = checkpoint.save_file, []

    def fails_later(tensors, file, **rest):
        if "00003" in file.name:
            raise OSError("the disk is full")
        real(tensors, file, **rest)

    def fails_second(source, target, rename=os.replace):
        renames.append(target)
        if len(renames) == 2:
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(checkpoint, "save_file", fails_later)
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]  # the earlier one, whole
    assert (tmp_path / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(checkpoint, "save_file", real)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", fails_second)
        with pytest.raises(OSError, match="no rename"):
            model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        models.load_model(tmp_path)
    model.save_pretrained(tmp_path)
    models.load_model(tmp_path)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    tiny_moe_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    tensors["model.layers.0.mlp.experts.9.up_proj.weight"] = torch.zeros(3)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_model(tmp_path)
    for expected in ("missing: model.layers.0.mlp.experts.2.up", "unknown: model.layers.0.mlp.experts.9", "mlp.gate"):
        assert expected in str(error.value)


# ----------------------------------------------------------------------------------------------------------------
# config.json

BASE = {"model_type": "qwen3_moe", **{k: v for k, v in SIZES.items() if k != "initializer_range"}}

#: Forms that are read. Fields that change numbers must be those that transformers reads.
READ: dict[str, dict[str, Any]] = {
    "as published": {"output_router_logits": False, "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1},
    "defaults": dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), ...),
    "transformers' spelling": {"num_experts": ..., "num_local_experts": 4},
    "both spellings": {"num_local_experts": 4},
    "weights not normalised": {"norm_topk_prob": False},
    "weights normalised": {"norm_topk_prob": True},
    "every other layer": {"decoder_sparse_step": 2},
    "a dense layer": {"mlp_only_layers": [0]},
    "no dense layers": {"mlp_only_layers": []},
    "dense layers null": {"mlp_only_layers": None},
    "no head size": {"head_dim": ...},
    "windows off": {"use_sliding_window": False, "sliding_window": 4},
    "windows on, of no size": {"use_sliding_window": True, "sliding_window": None},
}


def config(change: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in (BASE | change).items() if v is not ...}


@pytest.mark.parametrize("form", READ)
def test_fields_that_change_numbers_are_those_that_transformers_reads(form):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    values = config(READ[form])
    if "num_local_experts" in values and "num_experts" not in transformers.Qwen3MoeConfig.attribute_map:
        pytest.skip(f"transformers {transformers.__version__} does not spell it so")
    theirs = transformers.Qwen3MoeConfig(**json.loads(json.dumps(values)))
    ours = Qwen3MoeConfig.from_dict(values)
    for name in (
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
        *("mlp_only_layers", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    sparse = [i not in theirs.mlp_only_layers and (i + 1) % theirs.decoder_sparse_step == 0 for i in range(2)]
    assert [ours.has_experts(i) for i in range(2)] == sparse
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert theirs.sliding_window is None


@pytest.mark.parametrize("form", READ)
def test_what_was_read_comes_back_and_a_change_is_what_is_read_again(form):
    values = config(READ[form])
    ours = Qwen3MoeConfig.from_dict(values)
    assert ours.to_dict() == values | {"dtype": "bfloat16"}
    changed = replace(ours, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[1])
    again = Qwen3MoeConfig.from_dict(json.loads(json.dumps(changed.to_dict())))
    assert (again.num_experts, again.num_experts_per_tok, again.mlp_only_layers) == (6, 3, [1])


#: Forms that are refused, and what of field, value and hint the error must say.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "auxiliary loss": ({"output_router_logits": True}, "output_router_logits True .*set it to false"),
    "shared expert": ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64"),
    "windows": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 48}, "sliding_window 8"),
    "two counts": ({"num_local_experts": 8}, "num_experts 4 beside another num_local_experts 8"),
    "too many": ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_experts 4"),
    "none": ({"num_experts": 0, "num_experts_per_tok": 0}, "num_experts must be at least 1"),
    "step": ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
    "text": ({"norm_topk_prob": "true"}, "norm_topk_prob is 'true', it must be true or false"),
    "a fraction": ({"num_experts": 4.0}, "num_experts is 4.0"),
    "layers": ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*unquantized"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_computed_is_refused_before_any_tensor_is_read(form, tmp_path):
    change, message = REFUSED[form]
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))
    for read in (models.load_config, models.load_model):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_a_config_that_is_written_anew_is_read_by_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    ours = tiny_moe_config(mlp_only_layers=[1])
    theirs = transformers.Qwen3MoeConfig(**json.loads(json.dumps(ours.to_dict())))
    assert (theirs.num_experts, theirs.mlp_only_layers) == (ours.num_experts, [1])
