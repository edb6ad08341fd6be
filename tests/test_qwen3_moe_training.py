"""Qwen3-MoE sampled and trained: the bits of both agree, and no cut of a batch and no memory mode changes one."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from tiny import tiny_moe_model

from bi_ops import cli, matmul, nn, optim
from bi_ops.core import runtime
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.buckets import bucket_of, pad
from bi_ops.models.packing import pack
from bi_ops.rl import PRESETS, TrainConfig, run
from bi_ops.rollout import factory
from bi_ops.rollout.base import SamplingParams
from bi_ops.verify import bisect
from bi_ops.verify.compositions import rescore
from bi_ops.verify.properties import bits_equal

PROMPTS = [[5, 6, 7], [8] * 9, [9, 1]]
COMPLETIONS = [[1, 2, 9, 4], [3, 4, 5], [11, 12, 13, 14]]


def model(**options):
    """One layer; gradients of norms are other tests' and take the interpreter long."""
    made = tiny_moe_model(**options)
    for name, p in made.named_parameters():
        if name.endswith("norm.weight"):
            p.requires_grad_(False)
    return made


def gradients(made, parts):
    """Scores, and every trained weight's gradient, carried over the parts of the batch."""
    made.zero_grad()
    made.allocate_main_grads()
    scores = []
    for part in parts:
        batch = pack(PROMPTS[part], COMPLETIONS[part], made.device, TOKEN_STEP)
        own = made.token_logprobs(batch)
        (own * torch.cos(batch.targets.float())).sum().backward()
        scores.append(own.detach())
    made.collect_main_grads()
    grads = {n: p.grad for n, p in made.named_parameters() if p.requires_grad}
    assert all(t.any() for t in grads.values())
    return {"scores": torch.cat(scores)} | grads


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not bits_equal(a[name], b[name])]


WHOLE = [slice(0, 3)]


@pytest.fixture(scope="module")
def whole():
    return gradients(model(), WHOLE)


def test_a_cut_between_units_changes_no_bit(whole):
    assert differing(gradients(model(), [slice(0, 1), slice(1, 3)]), whole) == []


def carried(cuts, units):
    """Gradients of a layer alone over 64 tokens, in parts that end at `cuts`, of units that end at `units`."""
    torch.manual_seed(0)
    layer = nn.MoE(3, 2, 32, 16).to(runtime.default_device())
    x, g = torch.randn(2, 64, 32, device=layer.gate.weight.device).bfloat16()
    nn.allocate_main_grads(layer)
    for start, end in itertools.pairwise([0, *cuts, 64]):
        ends = torch.tensor([0, *(u - start for u in units if start < u < end), end - start], dtype=torch.int32)
        layer(x[start:end], ends.to(x.device)).backward(g[start:end])
    nn.collect_main_grads(layer)
    grads = {n: p.grad for n, p in layer.named_parameters()}
    assert all(t is not None and t.any() for t in grads.values())
    return grads


def test_a_layers_gradients_are_cut_at_units_alone():
    one = carried([], [32])
    assert differing(carried([32], [32]), one) == []
    # Negative control: another unit.
    assert differing(carried([], [48]), one) == ["experts.gate_up_proj.weight", "experts.down_proj.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "layer"])
def test_no_memory_mode_changes_a_bit(whole, mode):
    assert differing(gradients(model(recompute=mode), WHOLE), whole) == []


@pytest.mark.slow
def test_padding_to_a_bucket_changes_no_bit(whole):
    """As CUDA graphs of training's steps pad."""
    made = model()
    batch = pack(PROMPTS, COMPLETIONS, made.device, TOKEN_STEP)
    bucket = bucket_of(batch, made.config.max_position_embeddings)
    bucket = bucket._replace(tokens=bucket.tokens + 2 * TOKEN_STEP, sequences=16)
    wide, [mask] = pad(batch, bucket, [torch.ones(len(batch.targets), device=made.device)])
    made.allocate_main_grads()
    (made.token_logprobs(wide) * torch.cos(wide.targets.float()) * mask).sum().backward()
    made.collect_main_grads()
    assert [n for n, p in made.named_parameters() if p.requires_grad and not bits_equal(p.grad, whole[n])] == []


def test_what_the_embedded_engine_samples_is_scored_with_the_same_bits():
    """Prefill and decode, in a batch and among other sequences."""
    made = tiny_moe_model()
    engine = factory.make_engine("embedded", "", made)
    assert engine.orders is not None
    assert "moe" in engine.orders.orders
    made.adopt(engine.orders)
    requests = [[1, 2, 3], [4] * 9], [SamplingParams(2, seed=i) for i in range(2)]
    completions = engine.generate(*requests)
    reports = rescore(made, completions, ("together", "distractors"), orders=engine.orders)
    assert all(r.identical and r.tokens_checked == 4 for r in reports.values()), reports
    with torch.no_grad():  # negative control: other routes
        dict(made.named_parameters())["model.layers.0.mlp.gate.weight"].mul_(-1)
    assert not rescore(made, completions, ("together",))["together"].identical
    engine.update_weights(made)
    assert rescore(made, engine.generate(*requests), ("together",))["together"].identical


def config(steps, **changes: Any) -> TrainConfig:
    small = {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 2, "save_every": 1}
    return dataclasses.replace(PRESETS["demo-moe"], steps=steps, **(small | changes))


def test_a_step_of_grpo_has_no_difference(tmp_path):
    summary = run(config(1), tmp_path / "run")
    assert (summary.tokens_checked > 0, summary.tokens_different) == (True, 0)


@pytest.mark.slow
def test_two_runs_and_a_resumed_one_agree_bit_for_bit(tmp_path):
    one = run(config(3), tmp_path / "one")
    two = run(config(2), tmp_path / "two")
    assert two.weights_sha256 != one.weights_sha256
    two = run(config(3), tmp_path / "two", resume=True)
    assert two.weights_sha256 == one.weights_sha256
    assert one.tokens_different == two.tokens_different == 0


def test_experts_without_tokens_keep_their_weights():
    """No gradient, so AdamW's update is zero."""
    made = model()
    made.allocate_main_grads()
    made.collect_main_grads()
    experts = dict(made.named_parameters())["model.layers.0.mlp.experts.down_proj.weight"]
    assert experts.grad is not None
    assert experts.grad.shape == experts.shape
    assert not experts.grad.any()
    before = experts.detach().clone()
    scale = optim.clip_scale(optim.global_norm([experts.grad]), 1.0)
    optim.AdamW([experts], lr=0.1, weight_decay=0.0).step(grad_scale=scale)
    assert torch.equal(before, experts)


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        (nn.GroupedLinear, (0, 4, 3), "GroupedLinear: num_groups must be at least 1, got 0"),
        (nn.Experts, (2, 4, 0), "Experts: intermediate_size must be at least 1"),
        (nn.MoE, (2, 3, 4, 2), "MoE: num_experts_per_tok 3 is more than num_experts 2"),
    ],
)
def test_sizes_that_cannot_be_are_named(layer, sizes, message):
    with pytest.raises(ValueError, match=message):
        layer(*sizes)


def test_a_grouped_linear_layer_is_a_linear_layer_per_group():
    torch.manual_seed(0)
    layer = nn.GroupedLinear(3, 16, 8, device=runtime.default_device())
    x = torch.randn(5, 16, device=layer.weight.device)
    y = layer(x, torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=x.device))
    expected = torch.cat([matmul.linear(x[:2], layer.weight[0]), matmul.linear(x[2:], layer.weight[2])])
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("weight", "site"), [("gate", "mlp.gate"), ("experts.down_proj", "mlp.experts")])
def test_the_first_operator_that_differs_may_be_a_router_or_experts(weight, site):
    one, other = tiny_moe_model(), tiny_moe_model()
    with torch.no_grad():
        dict(other.named_parameters())[f"model.layers.0.mlp.{weight}.weight"].mul_(1.5)
    found = bisect.bisect(factory.make_engine("embedded", "", one), other, [1, 2, 3], SamplingParams(1, seed=0))
    assert found is not None
    assert (found.site, found.kind) == (f"model.layers.0.{site}", "weights")
    assert found.order[0] == found.order[1] != ""


def test_commands_know_it(tmp_path, capsys):
    """Orders with those of experts, and parity of the checkpoint."""
    tiny_moe_model().save_pretrained(tmp_path / "model")
    assert cli.main(["orders", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["orders"]["moe"]["kind"] == "MoeOrder"
    assert cli.main(["parity", str(tmp_path / "model"), "--prompts", "1", "--new-tokens", "2"]) == 0
    assert "bitwise identical" in capsys.readouterr().out
