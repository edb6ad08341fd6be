"""Qwen3 checkpoints: lossless both ways, and the same function as transformers' model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model

from bi_ops.models.packing import pack
from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def hugging_face(request, tmp_path):
    """A tiny Qwen3 written by transformers: (folder, transformers' model)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=request.param,
        initializer_range=0.2,
        rope_theta=10_000.0,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def test_reading_and_saving_gives_the_same_bytes(hugging_face, tmp_path):
    folder, _ = hugging_face
    (folder / "tokenizer.json").write_text("{}")
    Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes(), name
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", folder))
    assert ours == theirs


def test_transformers_reads_what_was_saved(hugging_face, tmp_path):
    folder, theirs = hugging_face
    Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_it_is_the_function_transformers_computes(hugging_face, device):
    folder, theirs = hugging_face
    ours = Qwen3ForCausalLM.from_pretrained(folder, compute_dtype=torch.float32)
    ids = [[5, 7, 11, 2, 9, 40, 3], [1, 2]]
    batch = pack([i[:1] for i in ids], [i[1:] for i in ids], device)
    with torch.no_grad():
        scores = batch.split(ours.token_logprobs(batch))
        for sequence, score in zip(ids, scores, strict=True):
            logits = theirs.float()(torch.tensor([sequence])).logits[0, :-1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            torch.testing.assert_close(score.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_shards_are_read(hugging_face, tmp_path):
    folder, _ = hugging_face
    whole = Qwen3ForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parts = Qwen3ForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    (folder / "part-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-0"):
        Qwen3ForCausalLM.from_pretrained(folder)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(5)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    for expected in ("missing: model.layers.1.self_attn.k_proj.weight", "unknown: extra.weight", "shape: model.norm"):
        assert expected in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"<!DOCTYPE html>" + b])
def test_a_damaged_file_is_named_with_its_folder_and_the_way_out(tmp_path, damage):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* download it again") as error:
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json cannot be read .* download it again"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)


def test_a_trained_model_is_saved_without_loss(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert again.config.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type"),
        ({"num_key_value_heads": 3}, "cannot be shared"),
        ({"head_dim": 24}, "multiple of 16"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"torch_dtype": "float8"}, "float8"),
    ],
)
def test_configs_that_are_not_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(tiny_config().to_dict() | change)


def test_a_config_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        Qwen3Config.from_pretrained(tmp_path)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)


def test_a_sequence_over_the_models_length_is_named(device):
    model = tiny_model(max_position_embeddings=4)
    with pytest.raises(ValueError, match="4 positions"):
        model.token_logprobs(pack([[1, 2, 3]], [[4, 5]], device))


def test_no_token_has_no_hidden_state(device):
    """As a share of a batch may be empty."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    hidden = tiny_model()(none, none, lambda layer, q, k, v: q)
    assert hidden.shape == (0, tiny_config().hidden_size)
