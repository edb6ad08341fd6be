"""A converted model is complete, or the call lists what is not: by class and path, with a way out that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bi_ops
from bi_ops.nn import convert

nn = torch.nn


class Scale(nn.Module):
    """A norm as transformers writes them: no layer of torch's, a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = Scale(), nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(self.norm(x))


def test_a_foreign_module_with_parameters_is_listed_by_class_and_path():
    model = nn.Sequential(*(Layer() for _ in range(12)), Scale())
    with pytest.raises(ValueError, match="nothing was") as error:
        convert(model)
    lines = str(error.value).splitlines()
    assert (
        "  *.norm (12 of them): Scale: computes with parameters of its own (weight), in no layer that is known" in lines
    )
    assert lines[2].startswith("  12: Scale: computes")
    assert len(lines) == 4
    assert not any(isinstance(m, bi_ops.nn.Linear) for m in model.modules())


@pytest.mark.parametrize("allow", [["Scale"], [Scale], ["0.norm", "1.norm"]], ids=str)
def test_the_way_out_leaves_them_to_the_mode(allow, device):
    model: Any = nn.Sequential(Layer(), Layer()).to(device)
    assert convert(model, allow=allow) is model
    assert [type(m) for m in (model[0].norm, model[0].proj, model[1].proj)] == [Scale, *[bi_ops.nn.Linear] * 2]
    x = torch.randn(9, 8, device=device)
    with bi_ops.batch_invariant_backward_mode():
        out = model(x)
        assert torch.equal(model(x[:2]), out[:2])
        out.sum().backward()
    assert model[0].norm.weight.grad is not None


def test_what_is_inside_an_allowed_module_is_still_judged():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.zeros(2))
            self.inner, self.proj = Scale(), nn.Linear(8, 8)

    with pytest.raises(ValueError, match="inner: Scale") as error:
        convert(Outer(), allow=["Outer"])
    assert "(the module itself)" not in str(error.value)
    assert "allow=['Outer', 'Scale']" in str(error.value)
    model = convert(Outer(), allow=["Outer", "Scale"])
    assert type(model.proj) is bi_ops.nn.Linear


def test_an_allowed_layer_stays_torchs():
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), allow=["1"])
    assert [type(m) for m in model] == [bi_ops.nn.Linear, nn.Linear]


def test_an_entry_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="allow names Skale, but no module is called so"):
        convert(nn.Sequential(Scale()), allow=["Skale"])


def replaced_forward():
    """As accelerate's hooks do: a class change would go unnoticed."""
    layer = nn.Linear(4, 4)
    setattr(layer, "forward", layer.forward)  # noqa: B010 (mypy takes it for a method)
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "computed from weight_g, weight_v"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "a subclass of torch.nn.Linear"),
        (replaced_forward, "forward was replaced on the instance"),
        (lambda: nn.ParameterList([torch.ones(2, 2)]), "parameters of its own"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "no batch-invariant layer"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_whose_forward_or_weight_is_not_the_classs_are_listed(make, why):
    with pytest.raises(ValueError, match=why):
        convert(nn.ModuleList([make()]))


def test_own_layers_and_containers_pass(device):
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.SiLU(), nn.Identity()),
            "b": bi_ops.nn.Attention(2, 16, sinks=True),
            "c": nn.ModuleList(),
        }
    )
    assert convert(convert(model)) is model


def test_a_mixture_of_experts_of_transformers_is_not_called_converted():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    model = transformers.Qwen3MoeForCausalLM(config)
    with pytest.raises(ValueError, match="nothing was") as error:
        convert(model)
    text = str(error.value)
    owners = {type(m).__name__ for m in model.modules() if m._parameters and type(m) not in (nn.Linear, nn.Embedding)}
    assert owners
    for name in owners:
        assert f": {name}: computes with parameters of its own" in text, name
    convert(model, allow=owners)
    assert type(model.lm_head) is bi_ops.nn.Linear
