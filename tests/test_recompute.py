"""What a decoder layer recomputes in the backward decides its memory and no bit."""

from __future__ import annotations

import gc
from typing import Any, get_args

import pytest
import torch
from tiny import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from bi_ops import matmul, nn, norm
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.packing import pack
from bi_ops.nn.recompute import Recompute, recomputed
from bi_ops.verify.properties import bits_equal

MODES = get_args(Recompute)
PROMPTS, COMPLETIONS = [[5, 6, 7], [8] * 17], [[1, 2, 9, 4], [3, 4, 5]]


def gradients(model, carried=True, times=2):
    """Scores, and every weight's gradient of several backwards."""
    model.zero_grad()
    if carried:
        model.allocate_main_grads()
    batch = pack(PROMPTS, COMPLETIONS, model.device, align=TOKEN_STEP)
    for _ in range(times):
        scores = model.token_logprobs(batch)
        (scores * torch.cos(batch.targets.float())).sum().backward()
    if carried:
        model.collect_main_grads()
    return {"scores": scores.detach()} | {name: p.grad for name, p in model.named_parameters()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not bits_equal(a[name], b[name])]


@pytest.fixture(scope="module")
def kept():
    """With nothing recomputed, accumulated over two backwards."""
    return gradients(tiny_model(recompute="none"))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_no_mode_changes_a_bit(mode, kept):
    assert all(t.any() for t in kept.values())
    assert differing(gradients(tiny_model(recompute=mode)), kept) == []


def test_no_mode_changes_a_bit_of_gradients_that_are_not_carried():
    model = tiny_model(recompute="none", num_hidden_layers=1)
    expected = gradients(model, carried=False, times=1)
    assert all(t.any() for t in expected.values())
    for mode in ("selective", "layer"):
        model.recompute = mode
        assert differing(gradients(model, carried=False, times=1), expected) == [], mode


@pytest.mark.parametrize(("mode", "norms"), [("none", 1), ("selective", 2), ("layer", 2)])
def test_what_runs_again_reaches_the_gradients(mode, norms, monkeypatch):
    """Negative control: norms that have other bits when they run again change gradients, where they do run again."""
    model = tiny_model(recompute=mode, num_hidden_layers=1)
    right, real = gradients(model, times=1), norm.rms_norm

    def wrong(x, weight, eps, *rest):
        return real(x, weight, eps * (1 if torch.is_grad_enabled() else 1e4), *rest)

    monkeypatch.setattr(norm, "rms_norm", wrong)
    got = gradients(model, times=1)
    assert bits_equal(got["scores"], right["scores"])
    assert (differing(got, right) != []) == (norms > 1)


def alive_after_a_forward(mode):
    """Which activations of the first layer are in memory between forward and backward."""
    model = tiny_model(recompute=mode, num_hidden_layers=1)
    seen: dict[str, StorageWeakRef] = {}
    layer: Any = model.model.layers[0]

    def watch(name, module):
        module.register_forward_pre_hook(lambda m, args: seen.update({name: StorageWeakRef(args[0].untyped_storage())}))

    watch("norm", layer.self_attn.qkv_proj)
    watch("attention", layer.self_attn.o_proj)
    watch("gate_up", layer.mlp.act_fn)
    watch("silu", layer.mlp.down_proj)
    batch = pack(PROMPTS, COMPLETIONS, model.device, align=TOKEN_STEP)
    loss = model.token_logprobs(batch).sum()
    gc.collect()
    alive = {name for name, ref in seen.items() if not ref.expired()}
    loss.backward()
    return alive


def test_what_is_recomputed_is_not_in_memory():
    assert alive_after_a_forward("none") == {"norm", "attention", "gate_up", "silu"}
    assert alive_after_a_forward("selective") == {"attention", "gate_up"}
    assert alive_after_a_forward("layer") == set()


def test_a_graph_may_be_walked_twice():
    model = tiny_model()
    batch = pack(PROMPTS, COMPLETIONS, model.device)
    loss = model.token_logprobs(batch).sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert differing({name: p.grad for name, p in model.named_parameters()}, once) == []


def test_a_tensor_that_was_modified_is_named(device):
    """As torch names it where no hook is."""
    x, weight = torch.randn(4, 16, device=device), torch.randn(3, 16, device=device, requires_grad=True)
    y = x.clone()
    with recomputed(True, (), lambda: ()):
        out = matmul.linear(y, weight)
    y.zero_()
    with pytest.raises(RuntimeError, match=r"\[4, 16\].*modified in place"):
        out.sum().backward()


def test_without_gradients_nothing_is_packed(device):
    with torch.no_grad(), recomputed(True, (), lambda: ()), torch.enable_grad():
        weight = torch.randn(3, 16, device=device, requires_grad=True)
        ids = torch.zeros(2, dtype=torch.int64, device=device)
        nn.linear_token_logprobs(torch.randn(2, 16, device=device), weight, ids).sum()


def test_another_mode_is_named():
    with pytest.raises(ValueError, match="recompute is 'all'; it must be one of selective, layer, none"):
        tiny_model(recompute="all")
