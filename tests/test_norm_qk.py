"""Norm and rotation of queries and keys in one pass: the bits of rms_norm, then apply_rope."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg"
from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from sweeps import sweep
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bi_ops.core import runtime
from bi_ops.norm import qk_norm_rope, qk_ops, reference, rms_norm
from bi_ops.norm.config import RowConfig, token_config
from bi_ops.rope import apply_rope, cos_sin_cache
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

T, HQ, HK, D = (300, 2, 1, 32) if runtime.INTERPRET else (8192, 16, 8, 128)
RERUNS = 2 if runtime.INTERPRET else 100
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"
P = 512

HEADS: tuple[tuple[int, int, int], ...] = (
    ((2, 1, 16), (3, 2, 48)) if runtime.INTERPRET else ((2, 1, 16), (3, 2, 48), (14, 2, 64), (4, 4, 80), (16, 8, 128))
)
HEADS += ((1, 1, 256),)


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


def composed(qkv, q_weight, k_weight, positions, cos_sin, num_heads, eps=1e-6, q_main_grad=None, k_main_grad=None):
    """What the operator stands for, from the operators that it stands for."""
    heads = qkv.unflatten(1, (-1, q_weight.shape[0]))
    n_keys = (heads.shape[1] - num_heads) // 2
    q, k, v = heads.split([num_heads, n_keys, n_keys], 1)
    q = apply_rope(rms_norm(q, q_weight, eps, q_main_grad), positions, cos_sin)
    k = apply_rope(rms_norm(k, k_weight, eps, k_main_grad), positions, cos_sin)
    return q, k, v


def inputs(t, hq, hk, d, device, dtype=torch.bfloat16, weight_dtype=torch.float32):
    """(qkv, q_weight, k_weight, positions, cos_sin, num_heads) and the gradients of q, k and v."""
    given = (
        randn(t, (hq + 2 * hk) * d, dtype=dtype, device=device).requires_grad_(),
        randn(d, dtype=weight_dtype, device=device).requires_grad_(),
        randn(d, dtype=weight_dtype, device=device).requires_grad_(),
        torch.randint(0, P, (t,), device=device),
        cos_sin_cache(d, P, 1e6, dtype, device),
        hq,
    )
    return given, [randn(t, h, d, dtype=dtype, device=device) for h in (hq, hk, hk)]


def with_gradients(op, given, g):
    """q, k, v, the gradients of qkv and of both weights."""
    out = op(*given)
    return *(t.detach() for t in out), *torch.autograd.grad(out, given[:3], g)


def all_equal(some, others):
    return all(bits_equal(*pair) for pair in zip(some, others, strict=True))


@pytest.mark.parametrize("t", [1, 37] if runtime.INTERPRET else [1, 2, 15, 16, 17, 127, 129, 1000, 8192])
@sweep(
    ("heads", "dtype"),
    itertools.product(HEADS, [torch.bfloat16, torch.float32]),
    [*((heads, torch.bfloat16) for heads in HEADS), (HEADS[0], torch.float32)],
)
def test_the_bits_are_those_of_the_norm_and_then_the_rotation(t, heads, dtype, device):
    given, g = inputs(t, *heads, device, dtype)
    assert all_equal(with_gradients(qk_norm_rope, given, g), with_gradients(composed, given, g))


def test_zeros_have_the_same_sign(device):
    """At position 0 the sine is 0, so every product with it is one zero or the other."""
    given, g = inputs(64, 2, 1, 32, device)
    zeros = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device)
    qkv, *g = (zeros[torch.randint(4, t.shape, device=device)].to(t.dtype) for t in (given[0], *g))
    given = (qkv.requires_grad_(), *given[1:3], given[3] % 2, *given[4:])
    assert all_equal(with_gradients(qk_norm_rope, given, g), with_gradients(composed, given, g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [None, torch.float32])
def test_weights_of_16_bits_positions_of_32_and_either_cache(dtype, cache_dtype, device):
    given, g = inputs(20, 2, 1, 32, device, dtype, weight_dtype=dtype)
    given = *given[:3], given[3].int(), cos_sin_cache(32, P, 1e6, cache_dtype or dtype, device), given[5]
    found = with_gradients(qk_norm_rope, given, g)
    assert all_equal(found, with_gradients(composed, given, g))
    assert found[4].dtype == dtype


def test_strided_projections_and_gradients(device):
    """Rows that lie in wider ones, and a gradient expanded from one row, have the bits of contiguous copies."""
    given, g = inputs(9, 2, 1, 32, device)
    wide = torch.cat((given[0].detach(), given[0].detach()), 1)
    expected = with_gradients(qk_norm_rope, given, [g[0], g[1], g[2][:1].expand(9, -1, -1).contiguous()])
    for start in (0, 3):  # aligned, and not
        qkv = torch.nn.functional.pad(wide, (start, 0))[:, start:][:, : given[0].shape[1]].requires_grad_()
        strided = [torch.cat((t, t), 2)[..., :32] for t in g[:2]] + [g[2][:1].expand(9, -1, -1)]
        assert all_equal(with_gradients(qk_norm_rope, (qkv, *given[1:]), strided), expected), start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_match_fp64(dtype, device):
    (qkv, q_weight, k_weight, positions, cos_sin, hq), _ = inputs(33, 2, 1, 32, device, dtype)
    errors = gradient_errors(
        lambda qkv, q_weight, k_weight: qk_norm_rope(qkv, q_weight, k_weight, positions, cos_sin, hq),
        lambda qkv, q_weight, k_weight: reference.qk_norm_rope(qkv, q_weight, k_weight, positions, cos_sin, hq),
        {"qkv": qkv.detach(), "q_weight": q_weight.detach().to(dtype), "k_weight": k_weight.detach().to(dtype)},
    )
    assert all(e.ok for e in errors), errors


def test_sums_go_on_in_buffers(device):
    """Cut at a multiple of TOKEN_STEP tokens, a batch ends in the bits of one pass; a frozen weight's buffer stays."""
    given, g = inputs(64, 2, 1, 32, device)
    expected = with_gradients(qk_norm_rope, given, g)[3:]
    buffers = [torch.zeros(32, device=device) for _ in range(2)]
    parts = []
    for part in (slice(0, 16), slice(16, 64)):
        qkv = given[0].detach()[part].requires_grad_()
        out = qk_norm_rope(qkv, *given[1:3], given[3][part], *given[4:], 1e-6, *buffers)
        parts += torch.autograd.grad(out, qkv, [t[part] for t in g])
    assert all_equal((torch.cat(parts), *buffers), expected)

    before = [b.clone() for b in buffers]
    qkv = given[0].detach().requires_grad_()
    out = qk_norm_rope(qkv, given[1].detach(), *given[2:], 1e-6, *buffers)
    torch.autograd.backward(out, g)
    assert bits_equal(qkv.grad, expected[0])
    assert bits_equal(buffers[0], before[0])
    assert not bits_equal(buffers[1], before[1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_weight_needs_no_buffer(frozen, device):
    """A model gives buffers only to what it learns."""
    given, g = inputs(20, 2, 1, 32, device)
    expected = with_gradients(qk_norm_rope, given, g)[3:]
    weights = [w.detach().requires_grad_(i != frozen) for i, w in enumerate(given[1:3])]
    buffers = [torch.zeros(32, device=device) if w.requires_grad else None for w in weights]

    def call(qkv):
        return qk_norm_rope(qkv, *weights, *given[3:], 1e-6, *buffers)

    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    for f in (call, compiled, lambda qkv: checkpoint(call, qkv, use_reentrant=False)):
        buffers[1 - frozen].zero_()
        (dqkv,) = torch.autograd.grad(f(given[0]), given[0], g)
        assert all_equal((dqkv, buffers[1 - frozen]), (expected[0], expected[2 - frozen]))


def rows_of(given, g):
    """The operator and its gradient as a function of rows: tokens."""

    def run(qkv, positions, *grads):
        qkv = qkv.clone().requires_grad_()
        out = qk_norm_rope(qkv, *given[1:3], positions, *given[4:])
        return *(t.detach() for t in out), torch.autograd.grad(out, qkv, grads)[0]

    return run, (given[0].detach(), given[3], *g)


def test_tokens_do_not_depend_on_the_batch(device):
    run, rows = rows_of(*inputs(T, HQ, HK, D, device))
    counts = ((1, 17, 257),) if runtime.INTERPRET else ()
    assert row_variant(run, rows, *counts) == []
    assert order_variant(run, rows, trials=1) == []


def test_a_norm_over_the_whole_projection_is_caught(device):
    """Negative control: one scale for the batch."""
    run, rows = rows_of(*inputs(64, 2, 1, 32, device))

    def scaled(qkv, *rest):
        return run((qkv.float() / qkv.float().pow(2).mean().sqrt()).bfloat16(), *rest)

    assert row_variant(scaled, rows, (1, 16, 64)) == [1, 16]


def test_the_config_changes_no_bit(device):
    given, g = inputs(100, 3, 1, 48, device)
    expected = with_gradients(qk_norm_rope, given, g)
    tensors = [t.detach() for t in given[:5]]
    for rows, tiles in ((32, 1), (64, 1), (32, 2), (32, 8)):  # of 64 columns: 16 bytes of a row in a thread
        config = RowConfig(rows, 1, tiles)
        *out, rstd = qk_ops.launch_forward(*tensors, given[5], 1e-6, config)
        dwq, dwk = (torch.empty_like(w) for w in tensors[1:3])
        configs = config, token_config(20, 48)
        dqkv = qk_ops.launch_backward(dwq, dwk, False, *g, *tensors, rstd, given[5], configs)
        assert all_equal((*out, dqkv, dwq, dwk), expected), config


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_segments_of_heads_are_summed_apart_wherever_they_are(ranks, device):
    """A rank with some of the heads, the same sums: one process has all of them, or ranks have some each."""
    op: Any = qk_norm_rope
    segments, hq, hk, d, t = 4, 8, 4, 32, 40
    given, (gq, gk, gv) = inputs(t, hq, hk, d, device)
    whole = [torch.zeros(segments, d, device=device) for _ in range(2)]
    out = op(*given, 1e-6, *whole, segments=segments)
    (dqkv,) = torch.autograd.grad(out, given[0], (gq, gk, gv))
    plain = with_gradients(qk_norm_rope, given, (gq, gk, gv))
    assert all_equal((*out, dqkv), plain[:4])  # a weight's gradient alone depends on the segments
    *_, dwq, dwk = with_gradients(functools.partial(op, segments=segments), given, (gq, gk, gv))
    for buffer, dw, unsegmented in zip(whole, (dwq, dwk), plain[4:], strict=True):
        assert bits_equal(dw, (buffer[0] + buffer[1]) + (buffer[2] + buffer[3]))
        assert not bits_equal(dw, unsegmented)  # the control: another order

    def part(x, rank):  # of [T, heads, D]
        return x.tensor_split(ranks, dim=1)[rank]

    q, k, v = given[0].detach().unflatten(1, (-1, d)).split([hq, hk, hk], 1)
    dq, dk, dv = dqkv.unflatten(1, (-1, d)).split([hq, hk, hk], 1)
    for rank in range(ranks):
        own = torch.cat([part(x, rank) for x in (q, k, v)], 1).flatten(1).requires_grad_()
        buffers = [torch.zeros(segments // ranks, d, device=device) for _ in range(2)]
        if ranks == segments:
            buffers = [b[0] for b in buffers]
        some = (own, *given[1:5], hq // ranks)
        found = op(*some, q_main_grad=buffers[0], k_main_grad=buffers[1], segments=segments // ranks)
        assert all_equal(found, [part(x, rank) for x in out])
        (grad,) = torch.autograd.grad(found, own, [part(g, rank) for g in (gq, gk, gv)])
        assert bits_equal(grad, torch.cat([part(x, rank) for x in (dq, dk, dv)], 1).flatten(1))
        for buffer, all_of_it in zip(buffers, whole, strict=True):
            assert bits_equal(buffer.view(-1, d), all_of_it.view(ranks, -1, d)[rank])


def test_segments_go_on_from_one_micro_batch_to_the_next(device):
    given, g = inputs(48, 4, 2, 32, device)
    op: Any = qk_norm_rope
    sums = []
    for cuts in ((0, 48), (0, 16, 48)):
        buffers = [torch.zeros(2, 32, device=device) for _ in range(2)]
        for a, b in itertools.pairwise(cuts):
            rows = given[0].detach()[a:b].requires_grad_()
            out = op(rows, *given[1:3], given[3][a:b], *given[4:], 1e-6, *buffers, segments=2)
            torch.autograd.grad(out, rows, [x[a:b] for x in g])
        sums.append(buffers)
    assert all_equal(*sums)


def test_gradients_are_the_same_on_every_run(device):
    given, g = inputs(T, HQ, HK, D, device)
    assert rerun_variant(lambda: with_gradients(qk_norm_rope, given, g), RERUNS) == []


def test_no_token_and_no_gradient(device):
    given, g = inputs(0, 2, 1, 32, device)
    *out, dqkv, dwq, dwk = with_gradients(qk_norm_rope, given, g)
    assert [list(t.shape) for t in out] == [[0, 2, 32], [0, 1, 32], [0, 1, 32]]
    assert dqkv.shape == (0, 128)
    assert not dwq.any()
    assert not dwk.any()
    assert not qk_norm_rope(given[0].detach(), *(w.detach() for w in given[1:3]), *given[3:])[0].requires_grad


def test_the_operator_is_registered_and_compiles(device):
    given, g = inputs(5, 2, 1, 32, device)
    torch.library.opcheck(torch.ops.bi_ops.qk_norm_rope, (*given, 1e-6))
    buffers = [torch.zeros(32, device=device) for _ in range(2)]

    def call(qkv):
        return qk_norm_rope(qkv, *given[1:], 1e-6, *buffers)

    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    results = []
    for f in (call, compiled):
        [b.zero_() for b in buffers]
        out = f(given[0])
        results.append((*out, *torch.autograd.grad(out, given[0], g), *(b.clone() for b in buffers)))
    assert all_equal(*results)


def test_one_graph_serves_every_number_of_tokens(device):
    given, _ = inputs(40, 2, 1, 32, device)
    counter = CompileCounterWithBackend(BACKEND)

    def call(qkv, positions):
        q, k, v = qk_norm_rope(qkv, *given[1:3], positions, *given[4:])
        return rms_norm(q), k, v

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (5, 9, 40):
        some = given[0].detach()[:n].clone().requires_grad_(), given[3][:n].clone()
        assert all_equal(compiled(*some), call(*some)), n
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": lambda t: t.long()}, TypeError, "int64"),
        ({"qkv": lambda t: t[0]}, ValueError, "2 dimensions"),
        ({"qkv": lambda t: t[:, :-16]}, ValueError, "does not hold 2 query heads of 16"),
        ({"q_weight": lambda t: t.half()}, TypeError, "q_weight"),
        ({"k_weight": lambda t: t[:8]}, ValueError, "head_dim differs"),
        ({"positions": lambda t: t[:1]}, ValueError, "1 positions for 3 tokens"),
        ({"positions": lambda t: t.float()}, TypeError, "positions"),
        ({"cos_sin": lambda t: t.half()}, TypeError, "cos_sin"),
        ({"num_heads": lambda _: 4}, ValueError, "does not hold 4 query heads"),
        ({"eps": lambda _: -1.0}, ValueError, "eps"),
        ({"segments": lambda _: 2}, ValueError, "segments is 2; .* divides the 2 query heads and the 1 key heads"),
        ({"segments": lambda _: 2.0}, TypeError, "segments"),
        ({"q_main_grad": lambda _: torch.zeros(16)}, TypeError, "k_main_grad must be a tensor"),
        ({"q_main_grad": lambda _: torch.zeros(16).half()}, TypeError, "q_main_grad"),
        ({"q_main_grad": lambda _: torch.zeros(8)}, ValueError, "q_main_grad must be contiguous"),
    ],
)
def test_bad_input_is_named(change, error, message, device):
    given = {
        "qkv": torch.ones(3, 64, device=device),
        "q_weight": torch.ones(16, device=device),
        "k_weight": torch.ones(16, device=device, requires_grad=True),
        "positions": torch.arange(3, device=device),
        "cos_sin": cos_sin_cache(16, 4, device=device),
        "num_heads": 2,
        "eps": 1e-6,
        "segments": 1,
        "q_main_grad": None,
    }
    ((name, f),) = change.items()
    changed = f(given[name])
    given[name] = changed.to(device) if isinstance(changed, torch.Tensor) else changed
    with pytest.raises(error, match=f"^qk_norm_rope: .*{message}"):
        qk_norm_rope(**given)


def test_a_head_of_another_size_names_the_way_out(device):
    w = torch.ones(24, device=device)
    with pytest.raises(ValueError, match=r"multiple of 16 up to 1024, got 24; use rms_norm and rope.apply_rope"):
        qk_norm_rope(
            torch.ones(3, 96, device=device),
            w,
            w,
            torch.arange(3, device=device),
            cos_sin_cache(24, 4, device=device),
            2,
        )


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_cache_is_an_error_or_nan(position, device):
    qkv, w = torch.ones(2, 64, device=device), torch.ones(16, device=device)
    positions, cos_sin = torch.tensor([0, position], device=device), cos_sin_cache(16, 4, device=device)
    if runtime.INTERPRET:
        with pytest.raises(IndexError, match=r"cache holds 0\.\.3"):
            qk_norm_rope(qkv, w, w, positions, cos_sin, 2)
    else:
        q, k, v = qk_norm_rope(qkv, w, w, positions, cos_sin, 2)
        assert q[1].isnan().all()
        assert k[1].isnan().all()
        assert not q[0].isnan().any()
        assert bits_equal(v, torch.ones_like(v))
