"""Bisect names the first operator in which a rollout and training differ."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from sweeps import sweep
from tiny import tiny_model

from bi_ops import cli, norm
from bi_ops.models import orders
from bi_ops.models.base import CausalLM
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.bisect import bisect, first_difference, of_rollout, of_training

PROMPT = [5, 1, 7, 2]
IN_A_LAYER = (
    *("input_layernorm", "self_attn.qkv_proj", "self_attn.qkv", "self_attn.attn", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_up_proj", "mlp.act_fn", "mlp.down_proj"),
)
SITES = (
    *("model.embed_tokens", "model.norm", "lm_head"),
    *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in IN_A_LAYER),
)


@pytest.fixture(scope="module")
def sides():
    model = tiny_model()
    return EmbeddedEngine(model), model


def flipped(t: torch.Tensor) -> torch.Tensor:
    """`t` with the last bit of one element flipped, in the row of the prompt's last token."""
    out = t.clone()
    row = out.reshape(out.shape[0], -1)[min(len(PROMPT), len(out)) - 1]
    row[:1] = torch.bitwise_xor(row[:1].view(torch.int16), 1).view(t.dtype)
    return out


@contextlib.contextmanager
def planted(model: Any, site: str):
    """One bit of what `site` gives, inside the block."""
    stem, _, last = site.rpartition(".")
    if last == "qkv":
        weight, rotate = model.get_submodule(f"{stem}.q_norm").weight, norm.qk_norm_rope

        def rotated(*given, **options):
            q, k, v = rotate(*given, **options)
            return (flipped(q) if given[1] is weight else q), k, v

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norm, "qk_norm_rope", rotated)
            yield
        return

    def after(module, args, out):
        return flipped(out) if isinstance(out, torch.Tensor) else (flipped(out[0]), *out[1:])

    def before(module, args):
        def attention_fn(layer, *qkv):
            out = args[-1](layer, *qkv)
            return flipped(out) if f"layers.{layer}." in site else out

        return (*args[:-1], attention_fn)

    own = last == "attn" and isinstance(model, CausalLM)  # attention is no module there
    where = model.register_forward_pre_hook(before) if own else model.get_submodule(site).register_forward_hook(after)
    try:
        yield
    finally:
        where.remove()


def found(sides, **options):
    engine, model = sides
    return bisect(engine, model, PROMPT, SamplingParams(**({"max_new_tokens": 1, "seed": 3} | options)))


def test_nothing_is_found_where_nothing_differs(sides):
    assert found(sides, max_new_tokens=2) is None


@pytest.fixture(scope="module")
def traces(sides):
    """Of both sides, with nothing planted."""
    engine, model = sides
    rollout, tokens = of_rollout(engine, PROMPT, SamplingParams(max_new_tokens=1, seed=3))
    return rollout, of_training(model, PROMPT, tokens), tokens


EVERY = list(enumerate(SITES))


@sweep(("i", "site"), EVERY, EVERY[:12:2] + EVERY[15::3])
def test_a_planted_bit_is_found_at_its_operator(i, site, sides, traces):
    engine, model = sides
    rollout, training, tokens = traces
    if i % 2:
        with planted(model, site):
            training = of_training(model, PROMPT, tokens)
    else:
        with planted(engine.model, site):
            rollout, _ = of_rollout(engine, PROMPT, SamplingParams(max_new_tokens=1, seed=3))
    difference = first_difference(rollout, training)
    assert difference is not None
    assert (difference.site, difference.kind) == (site, "operator"), str(difference)
    assert difference.elements == 1
    assert difference.values[0] != difference.values[1]
    assert difference.row == (0 if site == "lm_head" else len(PROMPT) - 1)


def test_the_order_and_backend_of_each_side_are_told(sides):
    engine, model = sides
    with planted(engine.model, "model.layers.1.mlp.down_proj"):
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
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"):
            site = f"model.layers.1.{name}"
            for where in (engine.model, model):
                with planted(where, site):
                    difference = bisect(engine, model, PROMPT, SamplingParams(max_new_tokens=4, seed=3))
                assert difference is not None
                assert difference.site == site, str(difference)
    finally:
        engine.close()
