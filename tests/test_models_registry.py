"""A new model is one file and one registration: here a small Llama-like one, which has no norm of queries and keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny_config

from bi_ops import activation, matmul, models, nn, rope
from bi_ops.models import registry, warmup
from bi_ops.models.base import CausalLM
from bi_ops.models.config import CausalLMConfig
from bi_ops.rl import TrainConfig, run
from bi_ops.rollout import factory
from bi_ops.rollout.base import SamplingParams
from bi_ops.verify.compositions import rescore


def test_a_model_is_warmed_up_in_its_own_dtype(monkeypatch):
    asked = []
    monkeypatch.setattr(warmup, "compile_step", lambda *_: 0)  # GEMMs are what is asked about

    def verified(model, dtype, *rest, **options):
        asked.append((model, dtype))
        return matmul.Warmup(0, ())

    monkeypatch.setattr(matmul, "warmup", verified)
    model = models.Qwen3ForCausalLM(tiny_config())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.compute_dtype = dtype
        model.warmup()
    assert asked == [(m, dtype) for dtype in (torch.bfloat16, torch.float16) for m in (model, None)]


@dataclass(frozen=True, kw_only=True)
class ToyConfig(CausalLMConfig):
    model_type: ClassVar[str] = "toy"
    architecture: ClassVar[str] = "ToyForCausalLM"


class Layer(torch.nn.Module):
    def __init__(self, c: ToyConfig, **factory) -> None:
        super().__init__()
        self.c = c
        self.qkv_proj = nn.Linear(c.hidden_size, c.q_size + 2 * c.kv_size, bias=False, **factory)
        self.o_proj = nn.Linear(c.q_size, c.hidden_size, bias=False, **factory)
        self.up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False, **factory)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False, **factory)
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(c.hidden_size, c.rms_norm_eps, **factory) for _ in range(2))

    def forward(self, i, x, positions, cos_sin, attention_fn):
        sizes = (self.c.q_size, self.c.kv_size, self.c.kv_size)
        q, k, v = (t.unflatten(1, (-1, self.c.head_dim)) for t in self.qkv_proj(self.attention_norm(x)).split(sizes, 1))
        q, k = (rope.apply_rope(t, positions, cos_sin) for t in (q, k))
        x = x + self.o_proj(attention_fn(i, q, k, v).flatten(1))
        return x + self.down_proj(activation.silu_and_mul(self.up_proj(self.mlp_norm(x))))


class Decoder(torch.nn.Module):
    def __init__(self, c: ToyConfig, **factory) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.layers = torch.nn.ModuleList(Layer(c, **factory) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)


class ToyForCausalLM(CausalLM):
    config_class = ToyConfig
    config: ToyConfig

    def decoder(self, **factory):
        return Decoder(self.config, **factory)

    def packed_modules(self):
        c = self.config
        return {"qkv_proj": {"q_proj": c.q_size, "k_proj": c.kv_size, "v_proj": c.kv_size}}

    def forward(self, input_ids, positions, attention_fn):
        c, dtype = self.config, self.compute_dtype
        cos_sin = rope.cos_sin_cache(c.head_dim, c.max_position_embeddings, c.rope_theta, dtype, self.device)
        x = self.model.embed_tokens(input_ids, dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(i, x, positions, cos_sin, attention_fn)
        return self.model.norm(x)


CONFIG = {**tiny_config(num_hidden_layers=1, tie_word_embeddings=False).to_dict(), "model_type": "toy"}


@pytest.fixture
def toy():
    models.register("toy", ToyConfig, ToyForCausalLM)
    yield
    models.unregister("toy")


def test_a_registered_model_is_sampled_and_scored_with_the_same_bits(toy, tmp_path):
    made = models.make_model(CONFIG)
    made.init_weights(0)
    made.save_pretrained(tmp_path)
    model = models.load_model(tmp_path)
    assert type(model) is ToyForCausalLM
    assert models.load_config(tmp_path).model_type == "toy"
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert "model.layers.0.k_proj.weight" in {s.name for s in model.weight_slices()}
    engine = factory.make_engine("embedded", tmp_path, model)
    assert engine.orders is not None
    model.adopt(engine.orders)
    completions = engine.generate([[1, 2, 3], [4] * 9], [SamplingParams(3, seed=i) for i in range(2)])
    reports = rescore(model, completions, ("together", "distractors"), orders=engine.orders)
    assert all(r.identical and r.tokens_checked == 6 for r in reports.values()), reports
    with torch.no_grad():  # negative control: other weights
        model.lm_head.weight.mul_(1.5)
    assert not rescore(model, completions, ("together",))["together"].identical


def test_a_registered_model_is_trained(toy, tmp_path):
    small: dict[str, Any] = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 2}
    summary = run(TrainConfig(architecture=CONFIG, **small), tmp_path / "run")
    assert (summary.tokens_checked > 0, summary.tokens_different) == (True, 0)
    assert models.load_config(tmp_path / "run" / "final").model_type == "toy"


@pytest.mark.parametrize("change", [{"model_type": "gpt9"}, {"model_type": None}])
def test_an_unknown_model_is_refused_by_name(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    for call in (models.load_config, models.load_model):
        with pytest.raises(ValueError, match=rf"model_type is {change['model_type']!r}; models .* loaded: qwen3"):
            call(tmp_path)
    assert registry.known() == models.known()
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        models.load_model(tmp_path / "nowhere")
