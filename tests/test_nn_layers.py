"""Layers: torch's constructors and state_dict, bi_ops' bits, and models converted in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import bi_ops.nn
from bi_ops import activation, embedding, matmul, norm
from bi_ops.verify import row_variant
from bi_ops.verify.properties import bits_equal

nn = torch.nn


class Block(nn.Module):
    """A small model of plain torch layers with a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.norm = nn.RMSNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Dropout(0.0), nn.Linear(32, 24, bias=False))
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.mlp(self.norm(x)))


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Linear", (24, 40), {}),
        ("Linear", (24, 40), {"bias": False, "dtype": torch.bfloat16}),
        ("RMSNorm", (24,), {}),
        ("RMSNorm", ((2, 12), 1e-5), {"elementwise_affine": False}),
        ("Embedding", (10, 24), {"padding_idx": -1}),
        ("Embedding", (10, 24, 3), {}),
    ],
)
def test_layers_construct_load_and_compute_as_torchs(name, args, kwargs, device):
    kwargs = kwargs | {"device": device}
    ours, theirs = getattr(bi_ops.nn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    if name == "Embedding":
        x = torch.randint(0, 10, (3, 5), device=device)
    else:
        x = torch.randn(3, 2, 12, device=device, dtype=kwargs.get("dtype", torch.float32))
        x = x if args[0] == (2, 12) else x.reshape(3, 24)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    for layer, result in ((ours, out), (theirs, expected)):
        if list(layer.parameters()):
            result.backward(g)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layers_have_the_bits_of_their_operators(device):
    x = torch.randn(5, 24, device=device).bfloat16()
    linear = bi_ops.nn.Linear(24, 16, device=device)
    assert bits_equal(linear(x), matmul.linear(x, linear.weight, linear.bias))
    rms = bi_ops.nn.RMSNorm(24, eps=1e-6, device=device)
    assert bits_equal(rms(x), norm.rms_norm(x, rms.weight, 1e-6))
    assert bits_equal(bi_ops.nn.SiluAndMul()(x), activation.silu_and_mul(x))
    table, ids = bi_ops.nn.Embedding(9, 8, padding_idx=2, device=device), torch.tensor([2, 8], device=device)
    assert bits_equal(table(ids), embedding.embedding(ids, table.weight, padding_idx=2))


@pytest.mark.parametrize("shape", [(24,), (2, 12)])
def test_a_norm_after_a_residual_add_has_the_bits_of_the_fused_operator(shape, device):
    x, residual = (torch.randn(5, *shape, device=device).bfloat16() for _ in range(2))
    rms = bi_ops.nn.RMSNorm(shape, eps=1e-6, device=device)
    out, total = rms(x, residual)
    expected = norm.add_rms_norm(x.reshape(5, 24), residual.reshape(5, 24), rms.weight.reshape(-1), 1e-6)
    assert out.shape == total.shape == x.shape
    assert bits_equal(out.reshape(5, 24), expected[0])
    assert bits_equal(total, x + residual)
    with pytest.raises(ValueError, match="does not end in normalized_shape"):
        rms(x[..., :-1])


def test_an_embedding_gives_the_dtype_that_is_asked_for(device):
    table, ids = bi_ops.nn.Embedding(9, 8, device=device), torch.tensor([2, 8], device=device)
    assert bits_equal(table(ids, torch.bfloat16), table.weight.detach().bfloat16()[ids])


def learned(model, batches, carried):
    """Every weight's gradient after a backward for each of `batches`."""
    model.zero_grad()
    if carried:
        bi_ops.nn.allocate_main_grads(model)
    for ids, target in batches:
        (model(ids) * target).sum().backward()
    if carried:
        bi_ops.nn.collect_main_grads(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_any_converted_model_carries_its_weight_gradients_over_micro_batches(device):
    """Its tied head too; the bias keeps autograd's gradient."""
    model = bi_ops.nn.convert(Block().to(device))
    names = set(model.state_dict())
    ids, target = torch.randint(0, 20, (48,), device=device), torch.randn(48, 20, device=device)
    whole = learned(model, [(ids, target)], True)
    parts = [(ids[part], target[part]) for part in (slice(0, 16), slice(16, 48))]
    cut, summed = learned(model, parts, True), learned(model, parts, False)
    weights = {name for name in whole if name.endswith("weight")}
    assert weights == {"embed.weight", "norm.weight", "mlp.0.weight", "mlp.3.weight"}
    assert all(bits_equal(cut[name], whole[name]) for name in weights)
    assert not all(bits_equal(summed[name], whole[name]) for name in weights)  # negative control
    torch.testing.assert_close(summed, whole)
    assert set(model.state_dict()) == names
    assert all(m.main_grad is None for m in model.modules() if hasattr(m, "main_grad"))


def test_frozen_weights_get_no_buffer(device):
    model = bi_ops.nn.convert(Block().to(device))
    model.mlp.requires_grad_(False)
    bi_ops.nn.allocate_main_grads(model)
    assert model.mlp[0].main_grad is None
    assert model.head.main_grad is not None
    assert model.head.main_grad is not model.embed.main_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_eps_is_torchs(dtype, device):
    x = torch.full((1, 16), 3e-4, device=device, dtype=dtype)  # small enough for eps to show
    ours, theirs = (m(16, device=device, dtype=dtype)(x) for m in (bi_ops.nn.RMSNorm, nn.RMSNorm))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_without_an_operator_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        bi_ops.nn.Embedding(4, 2, **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        bi_ops.nn.convert(nn.Embedding(4, 2, **option))


def test_a_norm_over_another_shape_is_refused(device):
    with pytest.raises(ValueError, match="normalized_shape"):
        bi_ops.nn.RMSNorm((2, 12), device=device)(torch.ones(3, 24, device=device))


def test_convert_keeps_parameters_and_results(device):
    theirs = Block().to(device)
    ours = copy.deepcopy(theirs)
    parameters = dict(ours.named_parameters())
    assert bi_ops.nn.convert(ours) is ours
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert ours.head.weight is ours.embed.weight
    assert [type(m) for m in (ours.embed, ours.norm, ours.mlp[0], ours.mlp[1], ours.head)] == [
        *(bi_ops.nn.Embedding, bi_ops.nn.RMSNorm, bi_ops.nn.Linear, nn.SiLU, bi_ops.nn.Linear)
    ]
    ids = torch.randint(0, 20, (7,), device=device)
    torch.testing.assert_close(ours(ids), theirs(ids))
    for model in (ours, theirs):
        model(ids).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    bi_ops.nn.convert(ours)  # again: nothing left to do


def test_a_converted_model_does_not_depend_on_the_batch(device):
    model = bi_ops.nn.convert(Block().to(device))
    ids = torch.randint(0, 20, (40,), device=device)
    assert row_variant(lambda i: model(i).detach(), (ids,), (1, 16, 17, 33)) == []


def test_convert_takes_a_single_layer(device):
    layer = nn.Linear(4, 4, device=device)
    assert isinstance(bi_ops.nn.convert(layer), bi_ops.nn.Linear)


def test_convert_lists_everything_it_cannot_serve_and_changes_nothing():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "ok": nn.Linear(4, 4),
            "ln": nn.LayerNorm(4),
            "conv": nn.Conv1d(4, 4, 1),
            "bn": nn.BatchNorm1d(4),
            "mha": nn.MultiheadAttention(4, 1),
            "softmax": nn.Softmax(-1),
            "mine": Mine(4, 4),
        }
    )
    with pytest.raises(ValueError, match="cannot be converted") as error:
        bi_ops.nn.convert(model)
    for name in (
        "ln: LayerNorm",
        "conv: Conv1d",
        "bn: BatchNorm1d",
        "mha: Multihead",
        "softmax: Softmax",
        "mine: Mine",
    ):
        assert name in str(error.value)
    assert "ok:" not in str(error.value)
    assert type(model["ok"]) is nn.Linear


def test_attention_passes_its_options_on(device, monkeypatch):
    calls = []

    def attend(*args, **options):
        calls.append((args, options))
        return args[0]

    monkeypatch.setattr(bi_ops.attention, "flash_attention", attend, raising=False)
    q, kv = torch.ones(5, 4, 16, device=device), torch.ones(5, 2, 16, device=device)
    cu_seqlens = torch.tensor([0, 5], device=device, dtype=torch.int32)
    options: dict[str, Any] = {
        "causal": False,
        "softmax_scale": 0.5,
        "window_size": (3, 1),
        "softcap": 20.0,
        "backend": "triton",
    }
    layer = bi_ops.nn.Attention(4, 16, num_kv_heads=2, **options)
    assert layer(q, kv, kv, cu_seqlens, max_seqlen=5) is q
    assert calls[0][1] == {"max_seqlen": 5, "sinks": None, **options}
    with pytest.raises(ValueError, match=r"k must be \[T, 2, 16\]"):
        layer(q, q, kv, cu_seqlens)
    assert not layer.state_dict()


def test_attention_has_the_bits_of_its_operator(device):
    q, k, v = (torch.randn(9, heads, 16, device=device).bfloat16() for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 4, 9], device=device, dtype=torch.int32)
    ours = bi_ops.nn.Attention(4, 16, num_kv_heads=2)(q, k, v, cu_seqlens)
    assert bits_equal(ours, bi_ops.attention.flash_attention(q, k, v, cu_seqlens))


def test_attention_learns_its_sinks(device):
    layer = bi_ops.nn.Attention(4, 16, num_kv_heads=2, sinks=True, device=device)
    assert list(layer.state_dict()) == ["sinks"]
    q, kv = torch.ones(5, 4, 16, device=device), torch.ones(5, 2, 16, device=device)
    cu_seqlens = torch.tensor([0, 5], device=device, dtype=torch.int32)
    out = layer(q, kv, kv, cu_seqlens)
    assert (out < 1).all()  # the sink takes its share
    out.sum().backward()
    assert layer.sinks is not None
    assert layer.sinks.grad is not None
    assert layer.sinks.grad.lt(0).all()


@pytest.mark.parametrize("args", [(4, 16, 3), (0, 16), (4, 0), (4, 16, 0)])
def test_attention_heads_must_divide(args):
    with pytest.raises(ValueError, match="must divide"):
        bi_ops.nn.Attention(*args)
