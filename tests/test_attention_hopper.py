"""The warp-specialised kernels of Hopper: the forward has the Triton kernel's bits, the backward keeps the contract."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from own_attention import own_order, run

from bi_ops import attention
from bi_ops.attention import config, launch, reference
from bi_ops.attention.config import BackwardConfig, BackwardConfigs, DkvConfig, DqConfig, ForwardConfig
from bi_ops.attention.order import KeySteps, OnePass, TwoPass
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.gluon import tma

LENGTHS = [0, 1, 17, 127, 129, 128, 300, 0, 65, 1000]
D = 128

#: The own kernels, where vLLM is installed too.
flash_attention = functools.partial(attention.flash_attention, backend="triton")

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not arches.current().gluon, reason="needs a Hopper GPU and its Triton"),
]


def gpu(test):
    for mark in on_hopper:
        test = mark(test)
    return test


def inputs(lengths, hq=8, hkv=2, dtype=torch.bfloat16, head_dim=D):
    """q, k, v, g and cu_seqlens."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    tensors = [
        torch.randn((sum(lengths), h, head_dim), generator=generator, device="cuda").to(dtype)
        for h in (hq, hkv, hkv, hq)
    ]
    return *tensors, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def gradients(q, k, v, g, cu, causal=True):
    """out, dq, dk, dv."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = flash_attention(q, k, v, cu, max_seqlen=int(cu.diff().max()), causal=causal)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), g)


def seqlens_of(cu_q, cu_k=None):
    cu_k = cu_q if cu_k is None else cu_k
    return Seqlens(cu_q, cu_k, *(int(cu.diff().max()) for cu in (cu_q, cu_k)))


def triton_forward(q, k, v, seqlens, params, order=None, **changes):
    """(out, lse) of the Triton kernel, in the order of `flash_attention` unless told, with the config it chooses."""
    arch, order = arches.of(q.device), order or own_order(q, params).forward
    rows, pairs = seqlens.max_q * (q.shape[1] // k.shape[1]), (len(seqlens.cu_q) - 1) * k.shape[1]
    chosen = dataclasses.replace(config.forward(rows, pairs, q.shape[2], q.dtype, order, arch), **changes)
    return launch.forward(q, k, v, seqlens, params, None, order, arch, chosen)


def two_pass_order(q, params):
    """The order of an architecture that has no backward in one pass."""
    return dataclasses.replace(own_order(q, params), backward=TwoPass(64, 32 if q.shape[2] > 128 else 64))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def used_config(head_dim) -> ForwardConfig:
    order = attention.order_of(head_dim, torch.bfloat16, backend="triton").forward
    found = config.gluon_forward(4096, head_dim, torch.bfloat16, order, arches.current())
    assert found is not None
    return found


@pytest.mark.parametrize("other", [{"overlap": True}, {"warp_groups": 3}])
def test_two_warp_groups_in_ping_pong_clear(other):
    two = ForwardConfig(2, 2, 2, consumers_clear=True)
    with pytest.raises(ValueError, match="consumers_clear takes two warp groups in ping-pong"):
        dataclasses.replace(two, **other)


def other_configs(used: ForwardConfig) -> list[ForwardConfig]:
    """Who clears the last V, and when a tile is taken."""
    ahead = (True, False) if used.q_stages > 1 else (False,)
    clear = (True, False) if used.consumers_may_clear else (False,)
    ways = itertools.product(clear, ahead)
    return [dataclasses.replace(used, consumers_clear=c, ahead=a) for c, a in ways]


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("head_dim", "block_n"), [(64, 64), (64, 128), (128, 128), (128, 64), (256, 64)])
def test_forward_equals_triton_bit_for_bit(head_dim, block_n, causal):
    used = used_config(head_dim)
    used = dataclasses.replace(used, overlap=False, stages=min(used.stages, 4))
    any_groups = (2, 3) if head_dim == block_n == 64 else (2,)  # the others' registers do not hold a third
    any_config = [c for groups in any_groups for c in other_configs(dataclasses.replace(used, warp_groups=groups))]
    order = KeySteps(block_n)
    for dtype, hq, hkv, configs in (
        (torch.bfloat16, 8, 2, any_config if causal else [used]),
        (torch.float16, 3, 3, [dataclasses.replace(used, warp_groups=any_groups[-1])]),
    ):
        q, k, v, _, cu = inputs(LENGTHS, hq, hkv, dtype, head_dim)
        given = (q, k, v, seqlens_of(cu), AttentionParams(causal, head_dim**-0.5))
        want = triton_forward(*given, order, num_stages=2)
        for c in configs:
            assert equal(launch.forward(*given, None, order, arches.of(q.device), c), want), c


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_with_overlap_equals_triton_bit_for_bit(dtype, causal):
    """Steps on both sides of a warp group's edge, groups without rows or keys, more or fewer keys than queries."""
    used = used_config(64)
    assert used.overlap
    lengths = [0, 1, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 1000]
    others = [5, 0, 64, 1, 65, 200, 127, 500, 128, 1000, 3, 193, 191, 64]
    q, _, _, _, cu_q = inputs(lengths, 8, 2, dtype, 64)
    for keys in (lengths, others):
        _, k, v, _, cu_k = inputs(keys, 8, 2, dtype, 64)
        given = (q, k, v, seqlens_of(cu_q, cu_k), AttentionParams(causal, 0.125))
        order = own_order(q, given[-1]).forward
        want = triton_forward(*given)
        some = itertools.product((2, 3), (3, 8)) if dtype == torch.bfloat16 else []
        any_config = [dataclasses.replace(used, warp_groups=g, stages=s) for g, s in some]
        any_config += other_configs(used)
        for c in (*any_config, used):
            for _ in range(100 if c == used else 10):
                assert equal(launch.forward(*given, None, order, arches.of(q.device), c), want), c


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("head_dim", "hq", "hkv"), [(128, 8, 2), (64, 8, 2), (128, 6, 6), (256, 8, 2)])
def test_sequences_are_the_same_alone_packed_and_anywhere(head_dim, hq, hkv, causal):
    q, k, v, g, cu = inputs(LENGTHS, hq, hkv, head_dim=head_dim)
    packed = gradients(q, k, v, g, cu, causal)
    starts = cu.tolist()
    for i, n in enumerate(LENGTHS):
        rows = slice(starts[i], starts[i + 1])
        if n:
            one = torch.tensor([0, n], dtype=torch.int32, device="cuda")
            assert equal(gradients(*(t[rows] for t in (q, k, v, g)), one, causal), [t[rows] for t in packed])
    back = list(range(len(LENGTHS)))[::-1]
    there = torch.cat([torch.arange(starts[i], starts[i + 1], device="cuda") for i in back])
    turned = torch.tensor([0, *itertools.accumulate(LENGTHS[i] for i in back)], dtype=torch.int32, device="cuda")
    assert equal(gradients(*(t[there] for t in (q, k, v, g)), turned, causal), [t[there] for t in packed])


@gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_neighbours_full_of_nan_do_not_leak(head_dim):
    q, k, v, g, cu = inputs(LENGTHS, head_dim=head_dim)
    want = gradients(q, k, v, g, cu)
    start, end = cu[4].item(), cu[5].item()
    for t in (q, k, v, g):
        t[start:end] = torch.nan
    got = gradients(q, k, v, g, cu)
    assert equal([t[:start] for t in got], [t[:start] for t in want])
    assert equal([t[end:] for t in got], [t[end:] for t in want])
    assert all(t[start:end].isnan().any() for t in got)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [LENGTHS, [4096], [512] * 9, [300, 40, 2048]])
def test_backward_reruns_and_configs_give_one_result(lengths, head_dim):
    q, k, v, g, cu = inputs(lengths, head_dim=head_dim)
    want = gradients(q, k, v, g, cu)
    for _ in range(100):
        assert equal(gradients(q, k, v, g, cu), want)
    used = config.one_pass(8, head_dim, 132)
    for other in (
        dataclasses.replace(used, swizzle=1),
        dataclasses.replace(used, swizzle=7),
        BackwardConfig(2, 64),
    ):
        params = AttentionParams(True, head_dim**-0.5)
        out, _, *grads = run(q, k, v, g, seqlens_of(cu), params, backward=BackwardConfigs(one_pass=other))
        assert equal((out, *grads), want), other


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_another_order_is_noticed(head_dim):
    q, k, v, g, cu = inputs([1000], head_dim=head_dim)
    want = gradients(q, k, v, g, cu)
    params = AttentionParams(True, head_dim**-0.5)
    assert own_order(q, params).backward == OnePass(64, 128)
    out, _, *grads = run(q, k, v, g, seqlens_of(cu), params, order=two_pass_order(q, params))
    assert torch.equal(out, want[0])
    assert not equal(grads, want[1:])


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("hq", "hkv"), [(8, 2), (6, 6), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_backward_is_as_accurate_as_two_passes(hq, hkv, causal, head_dim):
    """Against fp64, at most 1.1 of the error of the two passes, which are held to torch's."""
    lengths = [300, 1, 65, 129]
    q, k, v, g, cu = inputs(lengths, hq, hkv, head_dim=head_dim)
    exact = [t.double().detach().requires_grad_() for t in (q, k, v)]
    out = reference.flash_attention(*exact, cu, causal=causal)
    want = torch.autograd.grad(out if isinstance(out, torch.Tensor) else out[0], exact, g.double())
    ours = gradients(q, k, v, g, cu, causal)[1:]
    params = AttentionParams(causal, head_dim**-0.5)
    _, _, *theirs = run(q, k, v, g, seqlens_of(cu), params, order=two_pass_order(q, params))
    for a, b, w in zip(ours, theirs, want, strict=True):
        assert (a - w).norm() <= 1.1 * (b - w).norm()


@pytest.mark.gpu
@pytest.mark.skipif(runtime.INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_as_accurate_as_those_of_flash_attention_2(head_dim, causal):
    """Against fp64, at most twice the error of the FlashAttention 2 inside torch, in bf16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    n, h = 1111, 4
    q, k, v, g, cu = inputs([n], h, h, torch.bfloat16, head_dim)
    exact = [t.double().detach().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(reference.flash_attention(*exact, cu, causal=causal), exact, g.double())
    ours = gradients(q, k, v, g, cu, causal)[1:]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t[None].transpose(1, 2) for t in leaves), is_causal=causal
        )
    theirs = torch.autograd.grad(out, leaves, g[None].transpose(1, 2))
    for a, b, w in zip(ours, theirs, want, strict=True):
        assert (a - w).norm() <= 2 * (b - w).norm()
        assert (a - w).abs().max() <= 2 * (b - w).abs().max()


def passes(q, k, v, g, cu_q, cu_k, causal):
    """(dq, dk, dv) of the Gluon kernels in two passes, and of the Triton kernels."""
    params, seqlens, arch = AttentionParams(causal, q.shape[2] ** -0.5), seqlens_of(cu_q, cu_k), arches.of(q.device)
    order, heads = own_order(q, params), q.shape[1] // k.shape[1]
    out, lse = triton_forward(q, k, v, seqlens, params)
    pairs = (len(cu_q) - 1) * k.shape[1]
    shape = (pairs, q.shape[2], q.dtype, order.backward, arch)
    triton = BackwardConfigs(
        dq=config.dq(seqlens.max_q * heads, *shape),
        dkv=config.dkv(seqlens.max_k, *shape),
    )
    given = (g, q, k, v, out, lse, None, seqlens, params, None, True, True, order, arch)
    gluon = BackwardConfigs(dq=DqConfig(), dkv=DkvConfig())
    return tuple(launch.backward(*given, c)[:3] for c in (gluon, triton))


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("hq", "hkv", "dtype"), [(8, 2, torch.bfloat16), (8, 1, torch.bfloat16), (3, 3, torch.float16)]
)
def test_passes_equal_triton_bit_for_bit(hq, hkv, dtype, causal):
    order, arch = attention.order_of(256, dtype, backend="triton").backward, arches.current()
    assert config.gluon_dkv(hq // hkv, 256, dtype, order, arch) == DkvConfig()
    assert config.gluon_dq(max(LENGTHS), 256, dtype, order, arch) == DqConfig()
    for lengths_q, lengths_k in (
        (LENGTHS, [5, 1, 64, 300, 63, 0, 1000, 40, 65, 700]),
        ([512] * 3, [512] * 3),
        ([1], [1]),
        ([2000] * 5, [2000] * 5),
        (LENGTHS, LENGTHS),
    ):
        q, _, _, g, cu_q = inputs(lengths_q, hq, hkv, dtype, 256)
        _, k, v, _, cu_k = inputs(lengths_k, hq, hkv, dtype, 256)
        assert equal(*passes(q, k, v, g, cu_q, cu_k, causal))
    fused = torch.cat((q, k, v), 1)
    assert equal(*passes(fused[:, :hq], fused[:, hq : hq + hkv], fused[:, hq + hkv :], g, cu_q, cu_k, causal))


@gpu
def test_passes_rerun_give_one_result_and_neighbours_full_of_nan_do_not_leak():
    q, k, v, g, cu = inputs(LENGTHS, head_dim=256)
    want, _ = passes(q, k, v, g, cu, cu, True)
    for _ in range(50):
        assert equal(passes(q, k, v, g, cu, cu, True)[0], want)
    for i in (4, 9):
        start, end = cu[i].item(), cu[i + 1].item()
        tensors = [t.clone() for t in (q, k, v, g)]
        for t in tensors:
            t[start:end] = torch.nan
        got, _ = passes(*tensors, cu, cu, True)
        assert equal([t[:start] for t in got], [t[:start] for t in want])
        assert equal([t[end:] for t in got], [t[end:] for t in want])
        assert all(t[start:end].isnan().any() for t in got)


@gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_queries_that_see_no_key_have_no_gradient(head_dim):
    q, _, _, g, cu = inputs([100, 70], head_dim=head_dim)
    k, v = (torch.randn(40, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cu_k = torch.tensor([0, 10, 40], dtype=torch.int32, device="cuda")
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = flash_attention(q, k, v, cu, cu_seqlens_k=cu_k, max_seqlen=100, max_seqlen_k=30)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), g)
    assert torch.count_nonzero(dq[:90]) == 0
    assert torch.count_nonzero(dq[100:140]) == 0
    assert all(t.isfinite().all() and t.abs().max() > 0 for t in (dq, dk, dv))


@gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_maximum_that_is_larger_than_needed_changes_no_bit(head_dim):
    """It makes a list of tiles of what was a grid of equal sequences. Nor does it which gradients are asked for."""
    for lengths in ([512] * 3, [300], [1, 1], [100, 300]):
        q, k, v, g, cu = inputs(lengths, head_dim=head_dim)
        want = gradients(q, k, v, g, cu)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        for longest in (max(lengths) + 1, 3 * max(lengths)):
            out = flash_attention(*leaves, cu, max_seqlen=longest)
            grads = torch.autograd.grad(out, leaves, g, retain_graph=True)
            assert equal((out.detach(), *grads), want)
            assert equal(torch.autograd.grad(out, leaves[2], g, retain_graph=True), want[3:])
            assert equal(torch.autograd.grad(out, leaves[0], g), want[1:2])


@gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_many_sequences_some_empty(head_dim):
    lengths = ([0, 1, 70, 2, 0, 3, 129] * 300)[:-2]
    q, k, v, g, cu = inputs(lengths, head_dim=head_dim)
    out, *grads = gradients(q, k, v, g, cu)
    params = AttentionParams(True, head_dim**-0.5)
    assert torch.equal(out, triton_forward(q, k, v, Seqlens(cu, cu, 129, 129), params)[0])
    cut = cu[1000].item()
    for part, starts in ((slice(0, cut), cu[:1001]), (slice(cut, None), cu[1000:] - cut)):
        assert equal(gradients(*(t[part] for t in (q, k, v, g)), starts)[1:], [t[part] for t in grads])


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_sequences_without_keys_or_without_queries(head_dim, causal):
    """Beside others, and alone: zeros, and an lse of +inf where there are no keys. The forward as the Triton kernel."""
    lens_q, lens_k = [70, 0, 200, 130, 0, 129], [0, 90, 40, 300, 0, 128]
    q, _, _, g, cu_q = inputs(lens_q, head_dim=head_dim)
    _, k, v, _, cu_k = inputs(lens_k, head_dim=head_dim)

    def run(q, k, v, g, cu_q, cu_k):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = flash_attention(
            *leaves, cu_q, cu_seqlens_k=cu_k, max_seqlen=200, max_seqlen_k=300, causal=causal, return_lse=True
        )
        return out.detach(), lse.detach().t(), *torch.autograd.grad(out, leaves, g)

    results = run(q, k, v, g, cu_q, cu_k)
    out, lse, dq, dk, dv = results
    theirs = triton_forward(q, k, v, Seqlens(cu_q, cu_k, 200, 300), AttentionParams(causal, head_dim**-0.5))
    assert equal((out, lse), (theirs[0], theirs[1].t()))
    assert torch.isposinf(lse[:70]).all()
    assert not any(t.any() for t in (out[:70], dq[:70], dk[:90], dv[:90]))
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    for i, (n, m) in enumerate(zip(lens_q, lens_k, strict=True)):
        q_rows, k_rows = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        ends = [torch.tensor([0, length], dtype=torch.int32, device="cuda") for length in (n, m)]
        alone = run(q[q_rows], k[k_rows], v[k_rows], g[q_rows], *ends)
        assert equal(alone, [t[rows] for t, rows in zip(results, (q_rows,) * 3 + (k_rows,) * 2, strict=True)])


@gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_outputs_and_gradients_in_a_graph(head_dim):
    """Lengths and values are read when the graph is replayed, and what counts turns or tiles starts at zero again."""
    q, k, v, g, cu = inputs(LENGTHS, head_dim=head_dim)
    turned = torch.tensor([0, *itertools.accumulate(LENGTHS[::-1])], dtype=torch.int32, device="cuda")
    given = [t.detach().clone() for t in (q, k, v, g, cu)]

    def run():
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        out = flash_attention(*leaves, given[4], max_seqlen=max(LENGTHS))
        return out.detach(), *torch.autograd.grad(out, leaves, given[3])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for starts, flipped in ((cu, False), (turned, True), (turned, True), (cu, False)):
        now = [t.flip(0) if flipped else t for t in (q, k, v, g)]
        for t, x in zip(given, (*now, starts), strict=True):
            t.copy_(x)
        graph.replay()
        assert equal(got, gradients(*now, starts))


@gpu
def test_passes_of_heads_that_fill_a_step():
    """One query a step: all 64 rows are heads that share a key head."""
    q, k, v, g, cu = inputs([1, 0, 130], 64, 1, head_dim=256)
    assert equal(*passes(q, k, v, g, cu, cu, True))


def test_what_tma_can_read():
    t = torch.randn(4, 2, D).bfloat16()
    assert tma.is_compatible(t)
    assert tma.is_compatible(torch.empty((4, 6, D), dtype=torch.bfloat16)[:, 2:4])
    assert not tma.is_compatible(t[:0])
    odd = torch.randn(4 * 2 * D + 1).bfloat16()[1:].view(4, 2, D)
    one = torch.randn(2, D, 1).bfloat16().permute(2, 0, 1)
    assert odd.is_contiguous()
    assert one.is_contiguous()
    for other in (odd, one, t[:, :1].expand(4, 2, D), t.transpose(0, 1)):
        assert not tma.is_compatible(other)
        assert tma.is_compatible(tma.compatible(other))
        assert torch.equal(tma.compatible(other), other)
    assert tma.compatible(t) is t


@gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_dense_inputs_at_odd_addresses_have_the_same_bits(head_dim):
    """And one token with strides of its own: `contiguous` would return both as they are."""
    for lengths in ([300], [1]):
        q, k, v, g, cu = inputs(lengths, head_dim=head_dim)
        want = gradients(q, k, v, g, cu)
        odd = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (q, k, v, g)]
        assert all(t.is_contiguous() and t.data_ptr() % 16 for t in odd)
        assert equal(gradients(*odd, cu), want)
    turned = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (q, k, v, g)]
    assert equal(gradients(*turned, cu), want)


@pytest.mark.parametrize("lengths", [(7,), (0, 300, 5, 0, 300, 129, 128), (1,) * 200, tuple(range(150))])
def test_ctas_take_the_longest_sequence_first(lengths):
    from bi_ops.gluon.tile_scheduler import lpt_order

    device, block = runtime.default_device(), 128
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable, as the kernel is
    tiles = [-(-lengths[i] // block) for i in longest_first]
    order, counter = lpt_order(cu, block)
    first, sequence = order.tolist()
    assert counter.tolist() == [0]
    assert sequence == longest_first
    assert first == [0, *itertools.accumulate(tiles)][:-1]


@pytest.mark.parametrize("block", [32, 48, 128])
@pytest.mark.parametrize(("causal", "paged"), [(True, False), (True, True), (False, False)])
def test_tiles_with_most_keys_come_first(block, causal, paged):
    """Each once; among those with as many blocks of keys the sequence that comes first."""
    from bi_ops.gluon.tile_scheduler import tile_list

    device, before = runtime.default_device(), 5
    lens_q = [0, 300, 5, 0, 300, 129, 128, *range(70)]
    lens_k = [n + block * (i % 3) for i, n in enumerate(lens_q)]
    lens_k[1] = 40  # fewer keys than queries
    starts_q, starts_k = ([0, *itertools.accumulate(lens)] for lens in (lens_q, lens_k))
    cu_q = torch.tensor(starts_q, dtype=torch.int32, device=device) + before
    cu_k = torch.tensor(lens_k if paged else starts_k, dtype=torch.int32, device=device)
    n_tiles = (sum(lens_q) + before) // block + len(lens_q)
    found, counter = tile_list(cu_q, cu_k, n_tiles, block, causal, paged)
    tiles = [
        (-(int((m - n) / block) + i) if causal else -m, b, -i, [b, i * block, starts_q[b] + before, n, k, m])
        for b, (n, m, k) in enumerate(zip(lens_q, lens_k, lens_k if paged else starts_k[:-1], strict=True))
        for i in range(-(-n // block))
    ]
    assert counter.tolist() == [0]
    assert found[-1] == len(tiles)
    assert found[:-1].view(n_tiles, 8)[: len(tiles), :6].tolist() == [record for *_, record in sorted(tiles)]


@pytest.mark.parametrize("arch", [arches.PORTABLE, arches.INTERPRETER, arches.SM_90], ids=lambda a: a.name)
def test_what_the_gluon_kernels_serve(arch):
    """Nothing without an architecture that has them, and there what they are written for."""
    half, steps, two = torch.bfloat16, KeySteps(64), TwoPass(64, 32)
    served = [
        config.gluon_forward(4096, D, half, steps, arch),
        config.gluon_decode(4, 8, D, half, steps, arch, 132),
        config.gluon_dq(4096, 256, half, two, arch),
        config.gluon_dkv(4, 256, half, two, arch),
    ]
    assert [c is not None for c in served] == [arch.gluon] * 4
    never = [
        config.gluon_forward(4096, D, torch.float32, steps, arch),
        config.gluon_forward(4096, 80, half, steps, arch),
        config.gluon_forward(64, D, half, steps, arch),
        config.gluon_forward(4096, D, half, KeySteps(32), arch),
        config.gluon_decode(4096, 8, 256, half, steps, arch, 132),
        config.gluon_decode(4, 8, D, half, KeySteps(16), arch, 132),
        config.gluon_dkv(5, 256, half, two, arch),
        config.gluon_dkv(4, 256, torch.float32, two, arch),
        config.gluon_dkv(4, 256, half, TwoPass(64, 24), arch),
        config.gluon_dq(64, 256, half, two, arch),
        config.gluon_dq(4096, 128, half, two, arch),
        config.gluon_dq(4096, 256, torch.float32, two, arch),
        config.gluon_dq(4096, 256, half, TwoPass(32, 32), arch),
    ]
    assert never == [None] * len(never)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_short_sequences_take_little_memory(head_dim):
    """Beside its gradients the backward keeps fp32 dQ of long sequences, and two numbers a row of whole tiles."""
    lengths = [200] * 100 + [5] * 30_000 + [30, 5]
    q, k, v, g, cu = inputs(lengths, 4, 4, head_dim=head_dim)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = flash_attention(q, k, v, cu, max_seqlen=200)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, (q, k, v), g)
    peak, kept = torch.cuda.max_memory_allocated() - before, sum(t.numel() * t.element_size() for t in grads)
    assert peak < 3 * kept, peak / kept
    rows = slice(*cu[-3:-1].tolist())  # the last but one, of 30 tokens
    one = torch.tensor([0, 30], dtype=torch.int32, device="cuda")
    alone = gradients(*(t.detach()[rows] for t in (q, k, v, g)), one)
    assert equal(alone, [t[rows] for t in (out.detach(), *grads)])
