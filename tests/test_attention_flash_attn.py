"""flash-attn as a backend: its arguments, what is refused before any call; its numbers and bits, installed."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bi_ops
from bi_ops import attention
from bi_ops.attention import flash_attn, reference
from bi_ops.attention.order import FlashAttention2, FlashAttention2Backward, Problem
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.verify import gradient_errors, rerun_variant
from bi_ops.verify.properties import bits_equal

BACKENDS = OWN_BACKWARD, DETERMINISTIC = "flash_attn", "flash_attn_deterministic"
HQ, HKV, HEAD_DIM = 4, 2, 16 if runtime.INTERPRET else 128
both = pytest.mark.parametrize("backend", BACKENDS)


def cu(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def qkv(n_q, n_k, device, head_dim=HEAD_DIM, dtype=torch.bfloat16) -> list[torch.Tensor]:
    shapes = (n_q, HQ, head_dim), (n_k, HKV, head_dim), (n_k, HKV, head_dim)
    return [torch.randn(*s, device=device).to(dtype) for s in shapes]


@pytest.fixture
def package(monkeypatch):
    """A flash_attn of release 2.8.3 on a Hopper GPU, as far as its availability can tell."""
    fake: Any = ModuleType("flash_attn")
    interface: Any = ModuleType("flash_attn.flash_attn_interface")
    fake.__version__, fake.flash_attn_interface = "2.8.3.post1", interface
    fake.flash_attn_varlen_func = interface._flash_attn_varlen_backward = None
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    return fake


@pytest.fixture
def calls(package, device, monkeypatch):
    """What the fake is called with, by pass: plain torch computes the forward; ones, twos and threes come back.

    Everything but flash-attn's kernels runs as it does here, so its availability is told instead of asked.
    """
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
    monkeypatch.setattr(flash_attn, "availability", lambda: Support(True, "a fake"))
    select: Any = attention.backends.select
    select.cache_clear()
    yield seen
    select.cache_clear()


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
    backend, lengths, options, expected, calls, device
):
    q, k, v = (t.requires_grad_() for t in qkv(sum(lengths), sum(lengths), device))
    starts = cu(lengths, device)
    out, lse = attention.flash_attention(q, k, v, starts, return_lse=True, backend=backend, **options)
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
    if backend == OWN_BACKWARD:
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
def test_unequal_lengths_and_nothing_to_compute(backend, calls, device):
    q, k, v = qkv(5, 9, device)
    attention.flash_attention(q, k, v, cu([2, 3], device), cu_seqlens_k=cu([0, 9], device), backend=backend)
    assert (calls["forward"][0]["max_seqlen_q"], calls["forward"][0]["max_seqlen_k"]) == (3, 9)
    for n_q, n_k in ((0, 9), (5, 0)):  # flash-attn takes no empty batch
        leaves = [t.requires_grad_() for t in qkv(n_q, n_k, device)]
        out = attention.flash_attention(*(*leaves, cu([n_q], device)), cu_seqlens_k=cu([n_k], device), backend=backend)
        assert not out.any()
        assert not any(t.any() for t in torch.autograd.grad(out.float().sum(), leaves))
    assert (len(calls["forward"]), len(calls["backward"])) == (1, 0)


@both
def test_outputs_are_contiguous_whatever_the_strides(backend, calls, device, monkeypatch):
    """flash-attn's output has the order of q's strides, which the backward and callers do not expect."""
    plain = sys.modules["flash_attn"].flash_attn_varlen_func

    def as_q(q, k, v, **given):
        out, *rest = plain(q, k, v, **given)
        return out.transpose(0, 1).contiguous().transpose(0, 1), *rest

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", as_q)
    assert attention.flash_attention(*qkv(6, 6, device), cu([6], device), backend=backend).is_contiguous()


@both
def test_torch_compile_keeps_the_backend(backend, calls, device):
    starts, leaves = cu([3, 4], device), [t.requires_grad_() for t in qkv(7, 7, device)]

    def eager(q, k, v):
        return attention.flash_attention(q, k, v, starts, max_seqlen=4, backend=backend)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out.float().sum(), leaves)) for out in (eager(*leaves), compiled(*leaves))]
    assert all(bits_equal(a, b) for a, b in zip(*results, strict=True))
    assert (len(calls["forward"]), len(calls["backward"])) == (2, 2 if backend == DETERMINISTIC else 0)


def test_the_backward_belongs_to_the_backend_of_the_forward(calls, device):
    leaves = [t.requires_grad_() for t in qkv(6, 6, device)]
    outs = [attention.flash_attention(*leaves, cu([6], device), backend=b) for b in (DETERMINISTIC, OWN_BACKWARD)]
    theirs, own = (torch.autograd.grad(out.float().sum(), leaves) for out in outs)
    assert [t.unique().tolist() for t in theirs] == [[1], [2], [3]]
    assert own[0].unique().numel() > 1


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, r"cannot serve torch\.float32\. Use bf16 or fp16, or backend 'triton'"),
        ({"sinks": True}, r"cannot serve sinks: flash-attn has none\. Use backend 'triton'"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_any_call(backend, options, message, calls, device):
    sinks = torch.zeros(HQ, device=device) if options.get("sinks") else None
    q, k, v = qkv(6, 6, device, dtype=options.get("dtype", torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"attention: backend '{backend}' {message}"):
        attention.flash_attention(q, k, v, cu([6], device), sinks=sinks, backend=backend)
    assert calls == {"forward": [], "backward": []}


@both
def test_decoding_is_refused_and_so_no_rollout_is_mixed(backend, calls, device):
    q, k, v = qkv(1, 32, device)
    pages, table = (t.view(2, 16, HKV, HEAD_DIM) for t in (k, v)), torch.arange(2, dtype=torch.int32, device=device)
    lengths = torch.tensor([32], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"decoded rows are not known to have the bits.*backend 'triton' or 'vllm'"):
        attention.paged_attention(q, *pages, table[None], cu([1], device), lengths, max_seqlen_q=1, backend=backend)
    assert calls["forward"] == []


def test_lse_passes_no_gradient_to_flash_attns_backward(calls, device):
    leaves = [t.requires_grad_() for t in qkv(6, 6, device)]
    _, lse = attention.flash_attention(*leaves, cu([6], device), return_lse=True, backend=DETERMINISTIC)
    with pytest.raises(RuntimeError, match=r"no gradient through lse\. Use backend 'flash_attn'"):
        lse.sum().backward()
    assert calls["backward"] == []
    _, lse = attention.flash_attention(*leaves, cu([6], device), return_lse=True, backend=OWN_BACKWARD)
    assert torch.autograd.grad(lse.sum(), leaves[0])[0].any()


def test_it_is_never_selected_and_so_never_in_the_mode(calls, device):
    """Available, and yet neither the first choice nor what anything falls back to."""
    here, problem = arches.of(device), Problem(HEAD_DIM, torch.bfloat16)
    assert attention.backends.select(problem, here).name not in BACKENDS
    assert attention.backends.select(problem, here, OWN_BACKWARD).name == OWN_BACKWARD
    q = torch.randn(1, HQ, 6, HEAD_DIM, device=device, dtype=torch.bfloat16)
    with bi_ops.batch_invariant_backward_mode():
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert calls == {"forward": [], "backward": []}


def test_its_orders_say_that_they_are_nobody_elses(calls, device):
    here, problem = arches.of(device), Problem(HEAD_DIM, torch.bfloat16)
    own, mixed, theirs = (attention.backends.get(n).order(problem, here) for n in ("triton", *BACKENDS))
    assert mixed.forward == theirs.forward == FlashAttention2()
    assert mixed.backward == own.backward
    assert theirs.backward == FlashAttention2Backward()
    assert len({own, mixed, theirs}) == 3
    rows = {row["name"]: row for row in attention.backends.table()}
    assert [name for name, row in rows.items() if not row["batch_invariant"]] == [DETERMINISTIC]
    assert [name for name, row in rows.items() if not row["automatic"]] == list(BACKENDS)


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
def test_naming_it_where_it_cannot_run_says_why(backend, device):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here: no GPU"):
        attention.flash_attention(*qkv(6, 6, device), cu([6], device), backend=backend)


# --------------------------------------------------------------------------------------------------------------
# with the package

LENGTHS = [5, 0, 70, 1, 130, 257, 1024, 2049]
FEATURES: tuple[dict[str, Any], ...] = (
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
def test_gradients_match_fp64(backend, options, device, installed):
    starts = cu(LENGTHS, device)

    def ours(q, k, v):
        return attention.flash_attention(q, k, v, starts, backend=backend, **options)

    def plain(q, k, v):
        return reference.flash_attention(q, k, v, starts, **options)

    for head_dim, dtype in itertools.product((64, 96, 128, 256), (torch.bfloat16, torch.float16)):
        inputs = dict(zip("qkv", qkv(sum(LENGTHS), sum(LENGTHS), device, head_dim, dtype), strict=True))
        errors = gradient_errors(ours, plain, inputs)
        assert all(e.ok for e in errors), (head_dim, dtype, errors)


def results(tensors, lengths, options, g, device) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv of packed sequences."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = attention.flash_attention(*leaves, cu(lengths, device), return_lse=True, **options)
    return out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, g)


@pytest.mark.gpu
@both
def test_every_run_has_the_same_bits(backend, device, installed):
    tensors, g = (
        qkv(sum(LENGTHS), sum(LENGTHS), device),
        torch.randn(sum(LENGTHS), HQ, HEAD_DIM, device=device).bfloat16(),
    )
    assert rerun_variant(lambda: results(tensors, LENGTHS, {"backend": backend}, g, device), 100) == []


@pytest.mark.gpu
@both
@pytest.mark.parametrize("options", FEATURES)
def test_a_sequence_has_the_same_bits_alone(backend, options, device, installed):
    """The forward's with both backends, the gradients with bi_ops' backward."""
    n, compared = sum(LENGTHS), 5 if backend == OWN_BACKWARD else 2
    for head_dim in (64, 96, 128, 256):
        tensors, g = qkv(n, n, device, head_dim), torch.randn(n, HQ, head_dim, device=device).bfloat16()
        packed = results(tensors, LENGTHS, options | {"backend": backend}, g, device)
        start = 0
        for length in LENGTHS:
            rows = slice(start, start := start + length)
            alone = results([t[rows] for t in tensors], [length], options | {"backend": backend}, g[rows], device)
            pairs = list(zip(alone, packed, strict=True))[:compared]
            assert all(bits_equal(a, b[rows]) for a, b in pairs), (head_dim, length)
