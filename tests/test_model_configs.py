"""config.json in every form publishers write it: what transformers reads, or refused with field, value and hint."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from bi_ops import models
from bi_ops.models.packing import pack
from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}

#: Forms that are read. The fields that change numbers must be those that transformers reads.
READ = {
    "no theta": {},
    "theta": {"rope_theta": 5e5},
    "theta as an integer": {"rope_theta": 500000},
    "theta in rope_parameters": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "another theta beside it": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "theta beside rope_parameters without": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "no theta in rope_parameters": {"rope_parameters": {"rope_type": "default"}},
    "theta in rope_scaling": {"rope_theta": 1e4, "rope_scaling": {"type": "default", "rope_theta": 3e5}},
    "no scaling, older spelling": {"rope_scaling": None, "rope_theta": 1e6},
    "both spellings of one thing": {"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 7.0}},
    "key heads null": {"num_key_value_heads": None},
    "swish": {"hidden_act": "swish"},
    "windows off": {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
    "windows on, in no layer": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "windows on, of no size": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "layers listed": {"layer_types": ["full_attention"] * 2},
    "layers listed in older words": {"layer_types": ["attention"] * 2},
    "dtype": {"dtype": "float16"},
    "torch_dtype": {"torch_dtype": "float32"},
    "both dtypes": {"dtype": "float16", "torch_dtype": "float32"},
    "tied": {"tie_word_embeddings": True},
    "no epsilon": {"rms_norm_eps": ...},
    "another epsilon": {"rms_norm_eps": 1e-5},
    "odd vocabulary": {"vocab_size": 51},
    "no rotation of a part": {"partial_rotary_factor": 1.0},
}


def config(change) -> dict:
    return {n: v for n, v in (BASE | change).items() if v is not ...}


@pytest.mark.parametrize("form", READ)
def test_fields_that_change_numbers_are_those_that_transformers_reads(form):
    transformers = pytest.importorskip("transformers", minversion="5.0")  # where rope_parameters came
    values = config(READ[form])
    try:
        theirs = transformers.Qwen3Config(**json.loads(json.dumps(values)))
    except Exception as error:
        if form != "layers listed in older words":
            raise
        pytest.skip(f"transformers {transformers.__version__} does not read it: {error}")  # releases differ in it
    ours = Qwen3Config.from_dict(values)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    for name in (*same, "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert theirs.rope_parameters["rope_type"] == "default"
    assert theirs.layer_types == ["full_attention"] * 2 or theirs.sliding_window is None
    assert ours.dtype == (theirs.dtype or torch.bfloat16)


@pytest.mark.parametrize("form", READ)
def test_what_was_read_comes_back_and_a_change_is_what_is_read_again(form):
    values = config(READ[form])
    ours = Qwen3Config.from_dict(values)
    written = ours.to_dict()
    if not {"dtype", "torch_dtype"} & set(values):
        assert written.pop("dtype") == "bfloat16"
    expected = values | ({"torch_dtype": "float16"} if form == "both dtypes" else {})
    assert written == expected
    changed = replace(ours, rope_theta=123.0, rms_norm_eps=1e-3, dtype=torch.float16)
    again = Qwen3Config.from_dict(changed.to_dict())
    assert (again.rope_theta, again.rms_norm_eps, again.dtype) == (123.0, 1e-3, torch.float16)


def test_a_head_size_of_null_is_the_hidden_size_shared_by_the_heads():
    """As vLLM and Llama's configs have it."""
    assert Qwen3Config.from_dict(config({"head_dim": None, "hidden_size": 64})).head_dim == 32
    assert Qwen3Config.from_dict(config({"head_dim": ...})).head_dim == 128
    with pytest.raises(ValueError, match=r"hidden_size 33 is no multiple of 2 heads"):
        Qwen3Config.from_dict(config({"head_dim": None, "hidden_size": 33}))


#: Forms that are refused, and what of field, value and hint the error must say.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        "quantization_config .*'fp8'.*unquantized",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'.*unquantized"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'.*unquantized"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    "yarn, new": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' .*remove the scaling"),
    "yarn, old": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' .*remove the scaling"),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
    "two types": ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "type 'yarn'"),
    "a factor alone": ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling \{'factor': 4.0\}"),
    "by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters .*full_attention"),
    "two ropes": ({"rope_scaling": {"rope_theta": 1.0}, "rope_parameters": {"rope_theta": 2.0}}, "remove one of them"),
    "no object": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'"),
    "theta null": ({"rope_theta": None}, "rope_theta is None"),
    "theta text": ({"rope_theta": "1e6"}, "rope_theta is '1e6', it must be a finite number without quotes"),
    "theta inside text": ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
    "theta 0": ({"rope_theta": 0}, "rope_theta 0 must be positive"),
    "hidden text": ({"hidden_size": "32"}, "hidden_size is '32', it must be a whole number"),
    "hidden 32.0": ({"hidden_size": 32.0}, "hidden_size is 32.0"),
    "layers text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "heads true": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "eps text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    "eps nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "eps below 0": ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06 must not be negative"),
    "tied text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', it must be true or false"),
    "bias": ({"attention_bias": True}, "attention_bias True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu' .*silu"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1 .*set it to 0"),
    "windows": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window 8"),
    "windows by default": ({"use_sliding_window": True, "num_hidden_layers": 30}, "sliding_window 4096, max_window_l"),
    "windows listed": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
    "too few types": ({"layer_types": ["full_attention"]}, "num_hidden_layers 2 layers"),
    "part rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "part rotated, inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    "not causal": ({"is_causal": False}, "is_causal False"),
    "bidirectional": ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    "layers unlike": ({"per_layer_config": {"1": {"num_key_value_heads": 2}}}, "per_layer_config"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights 'other.safetensors'"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    "huge": ({"num_hidden_layers": 10**12, "layer_types": ["full_attention"]}, "num_hidden_layers 1000000000000"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_computed_is_refused_before_any_tensor_is_read(form, tmp_path):
    change, message = REFUSED[form]
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))  # and no weights: they are not looked for
    for read in (models.load_config, models.load_model):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_quantized_tensors_are_refused_by_their_dtype(tmp_path):
    """Where the config does not say it."""
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"dtype: {name} is stored as F8_E4M3; BF16, F16, F32 are read"):
        models.load_model(tmp_path)


def test_the_rotation_is_transformers_where_two_wavelengths_are_stated(tmp_path, device):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config({"initializer_range": 0.2})))
    theirs.save_pretrained(tmp_path)
    stated = {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(BASE | stated))
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    ours = Qwen3ForCausalLM.from_pretrained(tmp_path, compute_dtype=torch.float32)
    ids = [5, 7, 11, 2, 9, 40, 3]
    with torch.no_grad():
        scores = ours.token_logprobs(pack([ids[:1]], [ids[1:]], device))
        logits = theirs(torch.tensor([ids])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-3, atol=1e-3)
