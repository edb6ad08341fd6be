"""flash-attn as a provider: its arguments, what is refused before any call; its numbers and bits, installed."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import bi_ops
from bi_ops import attention
from bi_ops.attention import flash_attn, ops, reference
from bi_ops.core import runtime
from bi_ops.verify import gradient_errors, rerun_variant
from bi_ops.verify.properties import bits_equal

OWN_BACKWARD, DETERMINISTIC = flash_attn.NAMES
HQ, HKV, HEAD_DIM = 4, 2, 16 if runtime.INTERPRET else 128
both = pytest.mark.parametrize("provider", flash_attn.NAMES)


def cu(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def qkv(n_q, n_k, device, head_dim=HEAD_DIM, dtype=torch.bfloat16) -> list[torch.Tensor]:
    shapes = (n_q, HQ, head_dim), (n_k, HKV, head_dim), (n_k, HKV, head_dim)
    return [torch.randn(*s, device=device).to(dtype) for s in shapes]


@pytest.fixture
def package(monkeypatch):
    """A flash_attn of release 2.8.3 on a Hopper GPU, as far as its availability can tell."""
    fake, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    fake.__version__, fake.flash_attn_interface = "2.8.3.post1", interface
    fake.flash_attn_varlen_func = interface._flash_attn_varlen_backward = None
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    return fake


@pytest.fixture
def calls(package, device, monkeypatch):
    """What the fake is called with, by pass: plain torch computes the forward; ones, twos and threes come back."""
    seen: dict[str, list[dict]] = {"forward": [], "backward": []}

    def forward(q, k, v, **given):
        seen["forward"].append(given)
        starts, scale = (given["cu_seqlens_q"], given["cu_seqlens_k"]), given["softmax_scale"]
        out, lse = reference.flash_attention(
            *(q.float(), k.float(), v.float(), *starts, given["causal"], scale, given["window_size"], given["softcap"]),
            return_lse=True,
        )
        return out.to(q.dtype), lse, torch.empty(0)

    def backward(g, q, k, v, out, lse, dq, dk, dv, **given):
        seen["backward"].append(given)
        for value, t in enumerate((dq, dk, dv), start=1):
            t.fill_(value)

    package.flash_attn_varlen_func, package.flash_attn_interface._flash_attn_varlen_backward = forward, backward
    return seen


def force(provider, monkeypatch) -> None:
    """As `providers.force`, on a machine that has a GPU for as long as that takes."""
    with monkeypatch.context() as m:
        m.setattr(runtime, "INTERPRET", False)
        attention.providers.check(provider)
    monkeypatch.setattr(attention.providers, "_forced", provider)


# --------------------------------------------------------------------------------------------------------------
# with a fake


@both
@pytest.mark.parametrize(
    ("lengths", "options", "expected"),
    [
        ([3, 7], {}, {"causal": True, "max_seqlen_q": 7, "max_seqlen_k": 7, "window_size": (-1, -1), "softcap": 0.0}),
        ([1, 1], {}, {"max_seqlen_q": 2, "max_seqlen_k": 1}),
        ([3, 7], {"causal": False, "softmax_scale": 0.5}, {"causal": False, "softmax_scale": 0.5}),
        ([3, 7], {"window_size": (2, 0), "softcap": 3.0}, {"window_size": (2, 0), "softcap": 3.0, "max_seqlen_k": 7}),
        ([3, 7], {"window_size": (40, -1)}, {"window_size": (40, -1), "max_seqlen_k": 41}),
        ([3, 7], {"window_size": (-1, 30), "causal": False}, {"window_size": (-1, 30), "max_seqlen_k": 31}),
    ],
)
def test_both_passes_are_called_with_the_same_deterministic_arguments(
    provider, lengths, options, expected, calls, device, monkeypatch
):
    force(provider, monkeypatch)
    q, k, v = (t.requires_grad_() for t in qkv(sum(lengths), sum(lengths), device))
    starts = cu(lengths, device)
    out, lse = attention.flash_attention(q, k, v, starts, return_lse=True, **options)
    plain, plain_lse = reference.flash_attention(
        q.double(), k.double(), v.double(), starts, **{"causal": True} | options, return_lse=True
    )
    torch.testing.assert_close(out.double(), plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), plain_lse, rtol=1e-4, atol=1e-4)
    (given,) = calls["forward"]
    always = {"deterministic": True, "dropout_p": 0.0, "alibi_slopes": None, "return_attn_probs": True}
    assert given.items() >= (expected | always).items()
    assert torch.equal(given["cu_seqlens_q"], starts)
    assert torch.equal(given["cu_seqlens_k"], starts)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    if provider == OWN_BACKWARD:
        assert calls["backward"] == []
        oracle = torch.autograd.grad(plain.sum(), (q, k, v))
        for ours, exact in zip((g.double() for g in grads), (g.double() for g in oracle), strict=True):
            # In norm: an element that cancels is left with bf16's rounding of out and dS. One key alone: dq = dk = 0.
            assert (ours - exact).norm() <= 2e-2 * exact.norm() + 1e-3
        return
    assert [t.unique().tolist() for t in grads] == [[1], [2], [3]]
    (back,) = calls["backward"]
    left, right = given.pop("window_size")
    assert (back.pop("window_size_left"), back.pop("window_size_right")) == (left, right)
    del given["return_attn_probs"]
    tensors = ("cu_seqlens_q", "cu_seqlens_k")
    assert all(torch.equal(given.pop(name), back.pop(name)) for name in tensors)
    assert back == given


@both
def test_unequal_lengths_and_nothing_to_compute(provider, calls, device, monkeypatch):
    force(provider, monkeypatch)
    q, k, v = qkv(5, 9, device)
    attention.flash_attention(q, k, v, cu([2, 3], device), cu_seqlens_k=cu([0, 9], device))
    assert (calls["forward"][0]["max_seqlen_q"], calls["forward"][0]["max_seqlen_k"]) == (3, 9)
    for n_q, n_k in ((0, 9), (5, 0)):  # flash-attn takes no empty batch
        leaves = [t.requires_grad_() for t in qkv(n_q, n_k, device)]
        out = attention.flash_attention(*leaves, cu([n_q], device), cu_seqlens_k=cu([n_k], device))
        assert not out.any()
        assert not any(t.any() for t in torch.autograd.grad(out.float().sum(), leaves))
    assert (len(calls["forward"]), len(calls["backward"])) == (1, 0)


@both
def test_outputs_are_contiguous_whatever_the_strides(provider, calls, device, monkeypatch):
    """flash-attn's output has the order of q's strides, which the backward and callers do not expect."""
    plain = sys.modules["flash_attn"].flash_attn_varlen_func

    def as_q(q, k, v, **given):
        out, *rest = plain(q, k, v, **given)
        return out.transpose(0, 1).contiguous().transpose(0, 1), *rest

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", as_q)
    force(provider, monkeypatch)
    assert attention.flash_attention(*qkv(6, 6, device), cu([6], device)).is_contiguous()


@both
def test_torch_compile_keeps_the_provider(provider, calls, device, monkeypatch):
    force(provider, monkeypatch)
    starts, leaves = cu([3, 4], device), [t.requires_grad_() for t in qkv(7, 7, device)]

    def eager(q, k, v):
        return attention.flash_attention(q, k, v, starts, max_seqlen=4)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out.float().sum(), leaves)) for out in (eager(*leaves), compiled(*leaves))]
    assert all(bits_equal(a, b) for a, b in zip(*results, strict=True))
    assert (len(calls["forward"]), len(calls["backward"])) == (2, 2 if provider == DETERMINISTIC else 0)


def test_the_backward_belongs_to_the_provider_of_the_forward(calls, device, monkeypatch):
    """Not to the one that is forced when autograd gets there."""
    leaves = [t.requires_grad_() for t in qkv(6, 6, device)]
    outs = []
    for provider in (DETERMINISTIC, OWN_BACKWARD):
        force(provider, monkeypatch)
        outs.append(attention.flash_attention(*leaves, cu([6], device)))
    theirs, own = (torch.autograd.grad(out.float().sum(), leaves) for out in outs)
    assert [t.unique().tolist() for t in theirs] == [[1], [2], [3]]
    assert own[0].unique().numel() > 1


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, r"cannot serve torch\.float32\. Use bf16 or fp16, or provider 'triton'"),
        ({"sinks": True}, r"cannot serve sinks: flash-attn has none\. Use provider 'triton'"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_any_call(provider, options, message, calls, device, monkeypatch):
    force(provider, monkeypatch)
    sinks = torch.zeros(HQ, device=device) if options.get("sinks") else None
    q, k, v = qkv(6, 6, device, dtype=options.get("dtype", torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"flash_attention: provider '{provider}' {message}"):
        attention.flash_attention(q, k, v, cu([6], device), sinks=sinks)
    assert calls == {"forward": [], "backward": []}


@both
def test_decoding_is_refused_and_so_no_rollout_is_mixed(provider, calls, device, monkeypatch):
    force(provider, monkeypatch)
    q, k, v = qkv(1, 32, device)
    pages, table = (t.view(2, 16, HKV, HEAD_DIM) for t in (k, v)), torch.arange(2, dtype=torch.int32, device=device)
    lengths = torch.tensor([32], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"decoded rows are not known to have the bits.*provider 'triton' or 'vllm'"):
        attention.paged_attention(q, *pages, table[None], cu([1], device), lengths, max_seqlen_q=1)
    assert calls["forward"] == []


def test_lse_passes_no_gradient_to_flash_attns_backward(calls, device, monkeypatch):
    leaves = [t.requires_grad_() for t in qkv(6, 6, device)]
    force(DETERMINISTIC, monkeypatch)
    _, lse = attention.flash_attention(*leaves, cu([6], device), return_lse=True)
    with pytest.raises(RuntimeError, match=r"no gradient through lse\. Use provider 'flash_attn'"):
        lse.sum().backward()
    assert calls["backward"] == []
    force(OWN_BACKWARD, monkeypatch)
    _, lse = attention.flash_attention(*leaves, cu([6], device), return_lse=True)
    assert torch.autograd.grad(lse.sum(), leaves[0])[0].any()


def test_the_mode_refuses_a_backward_that_depends_on_the_batch(calls, device, monkeypatch):
    q = torch.randn(1, HQ, 6, HEAD_DIM, device=device, dtype=torch.bfloat16)
    force(DETERMINISTIC, monkeypatch)
    with (
        bi_ops.batch_invariant_backward_mode(),
        pytest.raises(RuntimeError, match="'flash_attn_deterministic' is forced, whose gradients depend on the batch"),
    ):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert calls["forward"] == []
    force(OWN_BACKWARD, monkeypatch)
    with bi_ops.batch_invariant_backward_mode():
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert len(calls["forward"]) == 1


def test_it_is_never_chosen(package, monkeypatch):
    """Available, and yet neither the first choice nor what anything falls back to."""
    monkeypatch.setattr(attention.providers, "_forced", None)
    assert attention.providers.choose() not in flash_attn.NAMES
    assert ops._provider("op", torch.bfloat16, 128) not in flash_attn.NAMES
    names = attention.providers.names()
    assert max(names.index(name) for name in ("vllm", "triton")) < min(names.index(name) for name in flash_attn.NAMES)
    table = attention.providers.get
    assert [table(name).same_bits for name in flash_attn.NAMES] == [False, False]
    assert [table(name).batch_invariant for name in flash_attn.NAMES] == [True, False]
    assert all(p.batch_invariant for p in attention.providers.providers if p.name != DETERMINISTIC)


def test_availability_says_why_and_how_to_get_it(package, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    assert flash_attn.availability().ok
    assert "flash-attn 2.8.3.post1" in flash_attn.availability().reason

    def refused(message):
        here = flash_attn.availability()
        assert not here.ok
        assert message in here.reason
        return here.reason

    for version in ("2.6.3", "3.0.0"):
        monkeypatch.setattr(package, "__version__", version)
        refused(f"flash-attn {version} is not supported")
    monkeypatch.setattr(package, "__version__", "2.7.4")
    assert flash_attn.availability().ok
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
        refused("needs sm_80 or newer, this GPU is sm_75")
    with monkeypatch.context() as m:  # flash-attn 4 alone, which has the name
        m.delattr(package, "flash_attn_varlen_func")
        refused("cannot be imported")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "flash_attn", None)
        assert "pip install --no-build-isolation 'bi-ops[flash-attn]'" in refused("cannot be imported")
    monkeypatch.setattr(runtime, "INTERPRET", True)
    assert "bi-ops[flash-attn]" in refused("no GPU")


@both
@pytest.mark.skipif(not runtime.INTERPRET, reason="a machine without a GPU")
def test_forcing_it_where_it_cannot_run_says_why(provider):
    with pytest.raises(RuntimeError, match=f"provider '{provider}' cannot run here: no GPU"):
        attention.providers.force(provider)


# --------------------------------------------------------------------------------------------------------------
# with the package

LENGTHS = [5, 0, 70, 1, 130, 257, 1024, 2049]
FEATURES = (
    {},
    {"causal": False},
    {"window_size": (100, 0)},
    {"window_size": (7, 30), "causal": False},
    {"softcap": 3.0},
)


@pytest.fixture
def installed():
    pytest.importorskip("flash_attn")


@pytest.mark.gpu
@both
@pytest.mark.parametrize("options", FEATURES)
def test_gradients_match_fp64(provider, options, device, installed):
    starts = cu(LENGTHS, device)

    def ours(q, k, v):
        return attention.flash_attention(q, k, v, starts, **options)

    def plain(q, k, v):
        return reference.flash_attention(q, k, v, starts, **options)

    for head_dim, dtype in itertools.product((64, 96, 128, 256), (torch.bfloat16, torch.float16)):
        inputs = dict(zip("qkv", qkv(sum(LENGTHS), sum(LENGTHS), device, head_dim, dtype), strict=True))
        with attention.providers.forced(provider):
            errors = gradient_errors(ours, plain, inputs)
        assert all(e.ok for e in errors), (head_dim, dtype, errors)


def results(tensors, lengths, options, g, device) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv of packed sequences."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = attention.flash_attention(*leaves, cu(lengths, device), return_lse=True, **options)
    return out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, g)


@pytest.mark.gpu
@both
def test_every_run_has_the_same_bits(provider, device, installed):
    tensors, g = (
        qkv(sum(LENGTHS), sum(LENGTHS), device),
        torch.randn(sum(LENGTHS), HQ, HEAD_DIM, device=device).bfloat16(),
    )
    with attention.providers.forced(provider):
        assert rerun_variant(lambda: results(tensors, LENGTHS, {}, g, device), 100) == []


@pytest.mark.gpu
@both
@pytest.mark.parametrize("options", FEATURES)
def test_a_sequence_has_the_same_bits_alone(provider, options, device, installed):
    """The forward's with both providers, the gradients with bi_ops' backward."""
    n, compared = sum(LENGTHS), 5 if provider == OWN_BACKWARD else 2
    for head_dim in (64, 96, 128, 256):
        tensors, g = qkv(n, n, device, head_dim), torch.randn(n, HQ, head_dim, device=device).bfloat16()
        with attention.providers.forced(provider):
            packed = results(tensors, LENGTHS, options, g, device)
            start = 0
            for length in LENGTHS:
                rows = slice(start, start := start + length)
                alone = results([t[rows] for t in tensors], [length], options, g[rows], device)
                pairs = list(zip(alone, packed, strict=True))[:compared]
                assert all(bits_equal(a, b[rows]) for a, b in pairs), (head_dim, length)
