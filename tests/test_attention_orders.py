"""Attention's orders as values: what decides them, that kernels take them as they are given, and who computes which."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from own_attention import cu, own_order, packed, run

from bi_ops import attention
from bi_ops.attention import config, launch
from bi_ops.attention.backends import AttentionBackend
from bi_ops.attention.config import (
    BackwardConfig,
    DecodeConfig,
    DkvConfig,
    DqConfig,
    ForwardConfig,
    KernelConfig,
    check_order,
)
from bi_ops.attention.order import (
    FEATURES,
    AttentionOrder,
    FlashAttention3,
    KeySteps,
    OnePass,
    Problem,
    RowSums,
    TwoPass,
    order,
)
from bi_ops.attention.params import AttentionParams
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.core.orders import OrderRecord
from bi_ops.verify.properties import bits_equal

BF16, FP32 = torch.bfloat16, torch.float32
#: A Hopper with a Triton that its Gluon kernels were not built with.
NEWER_TRITON = replace(arches.PORTABLE, name="sm_90", reason="another Triton")

flash_attention = attention.flash_attention


def qkv(n, head_dim=16, dtype=BF16, device=None, hq=4, hkv=2):
    return [torch.randn(n, h, head_dim, device=device).to(dtype) for h in (hq, hkv, hkv)]


# --------------------------------------------------------------------------------------------------------------
# orders


@pytest.mark.parametrize(
    ("head_dim", "dtype", "forward", "backward"),
    [
        (64, BF16, KeySteps(64), OnePass(64, 128)),
        (80, BF16, KeySteps(128), TwoPass(64, 64)),
        (128, torch.float16, KeySteps(128), OnePass(64, 128)),
        (256, BF16, KeySteps(64), TwoPass(64, 32)),
        (128, FP32, KeySteps(32), TwoPass(32, 32)),
        (256, FP32, KeySteps(16), TwoPass(16, 16)),
    ],
)
def test_the_orders_of_hopper(head_dim, dtype, forward, backward):
    """As bits.json has their fingerprints: another number is another result."""
    assert order(Problem(head_dim, dtype), arches.SM_90) == AttentionOrder(forward, backward, RowSums(32, 4), 16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_or_two_is_the_architectures_and_the_features(head_dim):
    def backward(arch, features=()):
        return type(order(Problem(head_dim, BF16, features), arch).backward)

    assert backward(arches.SM_90) is backward(arches.SM_90, ("sinks",)) is OnePass
    for features in (("window_size",), ("softcap",), FEATURES):
        assert backward(arches.SM_90, features) is TwoPass
    for arch in (arches.PORTABLE, arches.INTERPRETER, NEWER_TRITON):
        assert backward(arch) is TwoPass


def test_another_triton_has_the_forward_of_this_one_and_the_triton_kernels():
    """Not the backward: so its orders differ, which a record of them says."""
    problem = Problem(128, BF16)
    here, there = order(problem, arches.SM_90), order(problem, NEWER_TRITON)
    assert here.forward == there.forward
    records = [OrderRecord.of("sm_90", {"attention": o}) for o in (here, there)]
    [difference] = records[0].differences(records[1])
    assert "OnePass" in difference
    assert "TwoPass" in difference
    q, k, _ = qkv(300, 128)
    given = (packed([300]), AttentionParams(True, 0.1), None, here.forward)
    assert isinstance(launch.forward_config(q, k, *given, arches.SM_90), ForwardConfig)
    assert isinstance(launch.forward_config(q, k, *given, NEWER_TRITON), KernelConfig)
    for arch, kinds in ((arches.SM_90, (DqConfig, DkvConfig)), (NEWER_TRITON, (KernelConfig, KernelConfig))):
        wide, two = qkv(300, 256), order(Problem(256, BF16), arch).backward
        given = (*wide[:2], packed([300]), AttentionParams(True, 0.1), two, arch)
        assert (type(launch.dq_config(*given)), type(launch.dkv_config(*given))) == kinds


def test_an_order_is_a_value():
    a, b = (order(Problem(128, BF16), arch) for arch in (arches.SM_90, arches.PORTABLE))
    assert {a, b, order(Problem(128, BF16, (), True), arches.SM_90)} == {a, b}  # paged or not
    assert repr(a.forward) == "KeySteps(block_n=128, thread_sums='sequential')"
    assert a.as_dict()["backward"] == {"kind": "OnePass", "block_m": 64, "block_n": 128}
    assert OrderRecord.from_dict(OrderRecord.of("sm_90", {"attention": a}).as_dict()).orders["attention"] == a.as_dict()


def test_an_order_takes_no_length():
    assert set(inspect.signature(order).parameters) == {"problem", "arch"}
    assert Problem._fields == ("head_dim", "dtype", "features", "paged")


def test_order_of_is_what_runs_here(device):
    q, _, _ = qkv(3, 24)
    assert attention.order_of(24, BF16, backend="triton") == own_order(q.to(device), AttentionParams(True, 1.0))
    features = attention.order_of(24, BF16, ("sinks", "softcap"), "triton", device)
    assert features == attention.order_of(24, BF16, ("softcap", "sinks"), "triton")
    with pytest.raises(
        ValueError, match=r"no features \['alibi'\]; features are window_size, softcap, sinks, attn_mask"
    ):
        attention.order_of(24, BF16, ("alibi",))
    with pytest.raises(ValueError, match="no backend 'tritn'; backends are triton, vllm"):
        attention.order_of(24, BF16, backend="tritn")


# --------------------------------------------------------------------------------------------------------------
# kernels take the order that they are given


#: Where each part of an order must show. A GPU adds the products of a dot one after another, so there steps of the
#: gradients' sums may give the same bits.
interpreted = pytest.mark.skipif(not runtime.INTERPRET, reason="steps of a plain sum show in the interpreter alone")
PARTS = [
    ({"forward": KeySteps(16)}, {"out", "dq", "dsinks"}, set()),
    pytest.param({"backward": TwoPass(16, 64)}, {"dq"}, {"out", "lse", "dk", "dv", "dsinks"}, marks=interpreted),
    pytest.param({"backward": TwoPass(64, 16)}, {"dk", "dv"}, {"out", "lse", "dq", "dsinks"}, marks=interpreted),
    ({"sinks_chunk": 4}, {"dsinks"}, {"out", "lse", "dq", "dk", "dv"}),
]


@pytest.mark.parametrize(("change", "other", "same"), PARTS)
def test_every_part_of_an_order_reaches_its_kernel(change, other, same, device):
    torch.manual_seed(1)
    q, k, v = qkv(200, 24, FP32, device)
    g, sinks = torch.randn_like(q), torch.linspace(-1, 3, 4, device=device)
    given = (q, k, v, g, packed([200], device=device), AttentionParams(True, 0.3))
    usual = replace(own_order(q, given[-1], sinks), forward=KeySteps(64), backward=TwoPass(64, 64))
    runs = [run(*given, sinks=sinks, order=o) for o in (usual, replace(usual, **change))]
    found = {n for n, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), *runs, strict=True) if bits_equal(a, b)}
    assert found >= same
    assert not found & other


GLUON = [
    (ForwardConfig(2, 2, 2), KeySteps(64), KeySteps(32)),
    (DecodeConfig(4), KeySteps(128), KeySteps(256)),
    (DqConfig(), TwoPass(64, 32), TwoPass(32, 32)),
    (DkvConfig(), TwoPass(64, 32), TwoPass(64, 24)),
    (BackwardConfig(4, 2**25), OnePass(64, 128), OnePass(128, 128)),
]


@pytest.mark.parametrize(("gluon", "good", "bad"), GLUON, ids=lambda x: type(x).__name__)
def test_a_gluon_kernel_is_not_launched_in_an_order_that_it_does_not_compute(gluon, good, bad):
    check_order(gluon, good)
    for other in (bad, FlashAttention3()):
        with pytest.raises(ValueError, match=rf"{type(gluon).__name__} does not compute {type(other).__name__}"):
            check_order(gluon, other)


def test_the_check_comes_before_the_launch(device):
    """Without a GPU as well: nothing was compiled."""
    q, k, v = qkv(200, 256, device=device)
    params, seqlens, arch = AttentionParams(True, 0.1), packed([200], device=device), arches.SM_90
    stats = torch.empty(2, 200, 2, device=device)
    for config_, steps in ((DqConfig(), TwoPass(32, 32)), (DkvConfig(), TwoPass(64, 24))):
        outs = (torch.empty_like(q),) if isinstance(config_, DqConfig) else (torch.empty_like(k), torch.empty_like(v))
        start = launch.launch_dq if isinstance(config_, DqConfig) else launch.launch_dkv
        with pytest.raises(ValueError, match="does not compute TwoPass"):
            start(q, q, k, v, stats, stats, *outs, seqlens, params, steps, arch, config_)
    with pytest.raises(ValueError, match="does not compute KeySteps"):
        launch.forward(q, k, v, seqlens, params, None, KeySteps(32), arch, ForwardConfig(2, 2, 1))
    saved = (q, q, k, v, q, stats, None)
    with pytest.raises(ValueError, match="does not compute OnePass"):
        launch.launch_one_pass(*saved, seqlens, params, OnePass(64, 64), BackwardConfig(4, 1))


def test_the_gluon_kernels_compute_the_steps_that_they_say():
    from bi_ops.attention.hopper import backward, dkv, dq
    from bi_ops.attention.hopper.common import ROWS

    assert DqConfig.computes(TwoPass(dq.BLOCK_N.value, 32))
    assert DkvConfig.computes(TwoPass(64, dkv.BLOCK_R.value))
    assert BackwardConfig.computes(OnePass(64, backward.WARP_GROUPS.value * ROWS.value))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_no_config_shapes_a_row_sum(head_dim):
    """fp32 has one tile, whatever the lengths; in 16 bits a warp of the forward has rows of its own."""
    arch = arches.SM_90
    sizes = [(rows, pairs) for rows in (1, 16, 17, 64, 65, 4096) for pairs in (1, 8, 1000)]
    wide, narrow = (order(Problem(head_dim, dtype), replace(arch, one_pass_backward=False)) for dtype in (FP32, BF16))
    assert len({config.forward(*s, head_dim, FP32, wide.forward, arch) for s in sizes}) == 1
    assert len({config.dq(*s, head_dim, FP32, wide.backward, arch) for s in sizes}) == 1
    assert len({config.dkv(*s, head_dim, FP32, wide.backward, arch) for s in sizes}) == 1
    for c in (config.forward(*s, head_dim, BF16, narrow.forward, arch) for s in sizes):
        assert c.num_warps <= c.block // 16


# --------------------------------------------------------------------------------------------------------------
# backends


TOY_STEP = 16  # no tile of an order of fp32, on a GPU or without one


class Negated(AttentionBackend):
    """A toy: -attention, through the own kernels."""

    name = "toy"
    note = "attention with its sign turned"
    automatic = False

    def supports(self, problem, arch):
        return Support(problem.head_dim == 16, f"head_dim {problem.head_dim}: a toy has 16. Use backend 'triton'")

    def order(self, problem, arch):
        return replace(super().order(problem, arch), forward=KeySteps(TOY_STEP))

    def forward(self, q, *rest):
        out, lse = super().forward(q, *rest)
        return -out, lse

    def backward(self, g, q, k, v, out, *rest):
        return super().backward(-g, q, k, v, -out, *rest)


@pytest.fixture
def toy():
    yield attention.backends.register(Negated())
    attention.backends.unregister("toy")


def test_a_backend_is_added_by_one_registration(toy, device):
    starts, leaves = cu([70, 30], device), [t.requires_grad_() for t in qkv(100, 16, FP32, device)]
    g = torch.randn_like(leaves[0])

    def results(fn, backend):
        out, lse = fn(*leaves, starts, max_seqlen=70, return_lse=True, backend=backend)
        return (out, lse, *torch.autograd.grad((out, lse), leaves, (g, torch.ones_like(lse))))

    ours, theirs = results(flash_attention, "triton"), results(flash_attention, "toy")
    torch.testing.assert_close(theirs[0], -ours[0])
    torch.testing.assert_close(theirs[1], ours[1])
    assert not bits_equal(theirs[0], -ours[0])  # its own order
    torch.testing.assert_close(theirs[4], -ours[4])
    assert not torch.allclose(theirs[2], ours[2])
    row = next(row for row in attention.backends.table() if row["name"] == "toy")
    assert (row["ok"], row["automatic"], row["note"]) == (True, False, "attention with its sign turned")
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    assert all(bits_equal(a, b) for a, b in zip(theirs, results(compiled, "toy"), strict=True))
    layer = attention_layer("toy")
    assert bits_equal(layer(*leaves, starts, 70), flash_attention(*leaves, starts, max_seqlen=70, backend="toy"))


def attention_layer(backend):
    from bi_ops import nn

    return nn.Attention(4, 16, num_kv_heads=2, backend=backend)


def test_a_compiled_call_follows_its_arguments(toy, device):
    """The name is a constant of a graph, and another head size or backend another graph."""
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for head_dim, backend in ((16, "toy"), (24, "triton"), (16, "triton"), (40, None)):
        tensors = (*qkv(9, head_dim, FP32, device), cu([4, 5], device))
        args = {"max_seqlen": 5, "backend": backend}
        assert bits_equal(compiled(*tensors, **args), flash_attention(*tensors, **args)), (head_dim, backend)


def test_a_backend_that_cannot_serve_says_why(toy, device):
    with pytest.raises(RuntimeError, match=r"^attention: backend 'toy' cannot serve head_dim 24: a toy has 16\."):
        flash_attention(*qkv(6, 24, FP32, device), cu([6], device), backend="toy")
    with pytest.raises(ValueError, match=r"no backend 'magma'; backends are triton, vllm, .*toy"):
        flash_attention(*qkv(6, 16, FP32, device), cu([6], device), backend="magma")


def test_a_backend_of_another_order_is_refused_where_an_order_is_asked_for(toy, device):
    here, problem = arches.of(device), Problem(16, FP32)
    asked = order(problem, here)
    select = attention.backends.select
    assert select(problem, here, order=asked).name == "triton"
    assert select(problem, here, "toy", toy.order(problem, here)).name == "toy"
    with pytest.raises(RuntimeError, match=r"backend 'toy' computes another order: .*block_n=16.* asked for .*"):
        select(problem, here, "toy", asked)
    with pytest.raises(RuntimeError, match=r"no backend can serve .*triton computes another order"):
        select(problem, here, order=replace(asked, forward=KeySteps(8)))


VLLM_REFUSES = [
    (Problem(96, BF16), r"head_dim 96: FlashAttention 3 is known to .* head_dim 128 and 256 only"),
    (Problem(128, BF16, ("softcap",)), "softcap: it serves plain attention only"),
    (Problem(128, BF16, FEATURES), "window_size and softcap and sinks and attn_mask: it serves plain"),
    (Problem(128, FP32), r"torch\.float32: it serves bf16 and fp16 only"),
]


@pytest.mark.parametrize(("problem", "why"), VLLM_REFUSES)
def test_vllm_refuses_by_name_what_it_does_not_serve(problem, why):
    found = attention.backends.get("vllm").supports(problem, arches.SM_90)
    assert not found
    with pytest.raises(AssertionError, match=rf"{why}.*\. Use backend 'triton'"):
        raise AssertionError(found.reason)
    assert attention.backends.get("triton").supports(problem, arches.SM_90)


def test_vllm_computes_plain_attention_on_hopper_alone():
    """And with its forward the own backward: other orders than the own ones."""
    vllm, problem = attention.backends.get("vllm"), Problem(128, BF16)
    assert vllm.supports(problem, arches.SM_90)
    assert vllm.order(problem, arches.SM_90) == replace(order(problem, arches.SM_90), forward=FlashAttention3())
    for arch in (arches.PORTABLE, NEWER_TRITON):
        assert not (found := vllm.supports(problem, arch))
        assert found.reason.startswith(arch.name)


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU may have it")
def test_vllm_without_a_gpu_says_so(device):
    with pytest.raises(RuntimeError, match="backend 'vllm' cannot run here: no GPU"):
        flash_attention(*qkv(6, 128, BF16, device), cu([6], device), backend="vllm")
    assert attention.backends.select(Problem(128, BF16), arches.of(device)).name == "triton"
