"""silu-and-mul and the layer behind it as one node: the bits of the two, and the two wherever somebody watches."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from bi_ops import activation, nn
from bi_ops.core.main_grad import MainGrad
from bi_ops.nn import gated
from bi_ops.nn.gated import gated_linear
from bi_ops.nn.parallel_linear import RowParallelLinear
from bi_ops.verify.properties import bits_equal

T, K, N = 48, 32, 64


def run(device, again=True, segments=1):
    """(name of the node, result, gradient of gate and up, weight's gradient)."""
    torch.manual_seed(0)
    layer = RowParallelLinear(K, N, segments, device=device)
    act = nn.SiluAndMul()
    layer.main_grad = MainGrad(layer.weight.shape, layer.weight.device)
    gate_up = torch.randn(T, 2 * K, device=device).bfloat16().requires_grad_()
    g = torch.randn(T, N, device=device).bfloat16()
    for _ in range(2):  # the second sum goes on from the first
        gate_up.grad = None
        out = gated_linear(again, gate_up, act, layer)
        out.backward(g)
    return type(out.grad_fn).__name__, out.detach(), gate_up.grad, layer.main_grad.collect()


@pytest.mark.parametrize("segments", [1, 2])
def test_one_node_has_the_bits_of_two(segments, device):
    name, *found = run(device, segments=segments)
    other, *expected = run(device, again=False, segments=segments)
    assert name == "_GatedBackward" != other
    assert all(t.any() for t in expected)
    assert all(map(bits_equal, found, expected))


@pytest.mark.parametrize(
    "watch",
    [
        lambda act, layer: act.register_forward_hook(lambda *_: None),
        lambda act, layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda act, layer: layer.register_full_backward_hook(lambda *_: None),
        lambda act, layer: setattr(act, "forward", type(act).forward.__get__(act)),
        lambda act, layer: setattr(layer, "main_grad", None),
    ],
)
def test_modules_that_are_watched_are_called(watch, device):
    layer, act = RowParallelLinear(K, N, device=device), nn.SiluAndMul()
    layer.main_grad = torch.zeros(N, K, device=device)
    watch(act, layer)
    gate_up = torch.randn(T, 2 * K, device=device).bfloat16().requires_grad_()
    out = gated_linear(True, gate_up, act, layer)
    assert type(out.grad_fn).__name__ != "_GatedBackward"
    assert bits_equal(out.detach(), layer(act(gate_up)).detach())


def test_what_is_computed_again_reaches_the_weight(device, monkeypatch):
    """Negative control: another activation in the backward changes the weight's gradient alone."""
    _, *right = run(device)
    real = activation.silu_and_mul_backward

    def wrong(g, x):
        dx, y = real(g, x)
        return dx, y + 1

    monkeypatch.setattr(activation, "silu_and_mul_backward", wrong)
    _, *found = run(device)
    assert [bits_equal(a, b) for a, b in zip(found, right, strict=True)] == [True, True, False]


def test_a_model_takes_it(monkeypatch):
    calls, real = [], gated._Gated.apply

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(gated._Gated, "apply", counted)
    model = tiny_model(recompute="selective")
    model.allocate_main_grads()
    ids = torch.arange(16, device=model.device)
    positions = torch.arange(16, device=model.device)
    model(ids, positions, lambda layer, q, k, v: q).float().sum().backward()
    assert len(calls) == model.config.num_hidden_layers
    model.collect_main_grads()
