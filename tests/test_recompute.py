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
from bi_ops.nn.recompute import Recompute, _Recipe, recomputed
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


def kept_bytes(mode, layers, monkeypatch):
    """(bytes that a forward leaves for its backward, each storage once and without parameters; tokens)."""
    model = tiny_model(recompute=mode, num_hidden_layers=layers)
    sizes: dict[int, int] = {}
    packed: list[torch.Tensor] = []  # held, or their addresses would be given out again
    real = _Recipe.pack

    def count(t: torch.Tensor) -> torch.Tensor:
        packed.append(t.detach())
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def pack_again(self, t):
        found = real(self, t)
        if isinstance(found[0], torch.Tensor):
            count(t)
        return found

    monkeypatch.setattr(_Recipe, "pack", pack_again)
    batch = pack(PROMPTS, COMPLETIONS, model.device, align=TOKEN_STEP)
    model.allocate_main_grads()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss = model.token_logprobs(batch).sum()
    monkeypatch.undo()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert loss.requires_grad
    return sum(size for at, size in sizes.items() if at not in own), len(batch.input_ids)


@pytest.mark.parametrize("mode", ["selective", "none"])
def test_a_layer_keeps_as_many_bytes_a_token_as_the_log_says(mode, monkeypatch):
    """bench/LOG.md adds them up: a tensor that is kept twice, or not recomputed, is another number."""
    (few, tokens), (many, _) = (kept_bytes(mode, layers, monkeypatch) for layers in (1, 3))
    c = tiny_model().config
    heads = c.num_attention_heads + c.num_key_value_heads
    qkv, gate_up = c.q_size + 2 * c.kv_size, 2 * c.intermediate_size
    halves = 2 * c.hidden_size + qkv + c.q_size + gate_up  # two sums of the stream, attention's output
    if mode == "none":
        halves += 2 * c.hidden_size + qkv + c.intermediate_size  # norms, rotated heads, silu-and-mul
    floats = 2 + heads + c.num_attention_heads  # 1 / rms, lse
    weights = c.hidden_size * (qkv + c.q_size + gate_up + c.intermediate_size)  # rounded once for both passes
    assert (many - few) / 2 == tokens * (2 * halves + 4 * floats) + 2 * weights


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
