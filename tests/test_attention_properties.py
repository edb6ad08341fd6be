"""Packed attention: accuracy against fp64, and bits that do not depend on who shares the batch."""

from __future__ import annotations

import functools

import pytest
import torch
from own_attention import cu, own_order, packed, run, with_steps
from sweeps import sweep

from bi_ops import attention
from bi_ops.attention import checks, reference
from bi_ops.attention.config import BackwardConfigs, KernelConfig
from bi_ops.attention.params import AttentionParams
from bi_ops.core import runtime
from bi_ops.verify import gradient_errors, rerun_variant
from bi_ops.verify.properties import bits_equal

# The interpreter pays milliseconds per tile; a GPU takes the sizes that matter.
HEAD_DIMS = (24,) if runtime.INTERPRET else (64, 80, 96, 112, 128, 256)
LENGTHS = [5, 0, 70, 1, 130] if runtime.INTERPRET else [5, 0, 70, 1, 130, 257, 1024, 2049]
STRANGERS = ([3, 64], [150]) if runtime.INTERPRET else ([3, 64, 777], [150, 4096])
#: Full fp32 has no tensor cores and compiles slowly; the order is the same at every head size.
FEW_HEAD_DIMS = (24,) if runtime.INTERPRET else (64, 128)
RERUNS = 2 if runtime.INTERPRET else 100


#: The own kernels, where vLLM is installed too.
flash_attention = functools.partial(attention.flash_attention, backend="triton")


def qkv(n_q, n_k, hq, hkv, head_dim, dtype, device) -> dict[str, torch.Tensor]:
    shapes = {"q": (n_q, hq, head_dim), "k": (n_k, hkv, head_dim), "v": (n_k, hkv, head_dim)}
    return {name: torch.randn(*s, device=device).to(dtype) for name, s in shapes.items()}


def check_gradients(lens_q, lens_k, hq, hkv, head_dim, causal, dtype, device, backend="triton"):
    cu_q, cu_k = cu(lens_q, device), cu(lens_k, device)
    inputs = qkv(sum(lens_q), sum(lens_k), hq, hkv, head_dim, dtype, device)

    def ours(q, k, v):
        return attention.flash_attention(q, k, v, cu_q, cu_seqlens_k=cu_k, causal=causal, backend=backend)

    def plain(q, k, v):
        return reference.flash_attention(q, k, v, cu_q, cu_k, causal)

    errors = gradient_errors(ours, plain, inputs)
    assert all(e.ok for e in errors), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_match_fp64_for_mixed_lengths(dtype, causal, device):
    for head_dim in HEAD_DIMS if dtype == torch.bfloat16 else FEW_HEAD_DIMS:
        check_gradients(LENGTHS, LENGTHS, 4, 2, head_dim, causal, dtype, device)


@sweep(("hq", "hkv"), [(2, 2), (3, 1), (6, 2)], [(3, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_match_fp64_for_unequal_lengths_and_grouped_heads(hq, hkv, causal, device):
    lens_q, lens_k = [5, 0, 70, 3, 4, 66], [9, 2, 70, 1, 0, 140]
    check_gradients(lens_q, lens_k, hq, hkv, 40, causal, torch.bfloat16, device)


def test_a_query_that_sees_no_key_gives_zeros_and_passes_no_gradient(device):
    inputs = qkv(4, 2, 2, 1, 16, torch.float32, device)
    q, k, v = (t.requires_grad_() for t in inputs.values())
    out = flash_attention(q, k, v, cu([4], device), cu_seqlens_k=cu([2], device))
    assert not out[:2].any()
    assert torch.equal(out[2], v[0].expand(2, -1))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not dq[:2].any()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def run_sequences(sequences, causal=True):
    """Pack sequences of (q, k, v, cotangent); per sequence (out, dq, dk, dv)."""
    lengths = [len(s[0]) for s in sequences]
    q, k, v, g = (torch.cat(ts) for ts in zip(*sequences, strict=True))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = flash_attention(q, k, v, cu(lengths, q.device), causal=causal)
    results = (out.detach(), *torch.autograd.grad(out, (q, k, v), g))
    return list(zip(*(r.split(lengths) for r in results), strict=True))


def batch_variant(run, head_dim, dtype, device) -> list[tuple[int, str]]:
    """(length, tensor) of the sequences whose bits change when strangers share the batch."""

    def sequence(n):
        tensors = qkv(n, n, 4, 2, head_dim, dtype, device)
        return *tensors.values(), torch.randn_like(tensors["q"])

    known = [sequence(n) for n in LENGTHS]
    alone = [run([s])[0] for s in known]
    broken = []
    for before, after in (([], []), (STRANGERS[0], []), (STRANGERS[1], STRANGERS[0])):
        batch = [*map(sequence, before), *known, *map(sequence, after)]
        packed = run(batch)[len(before) : len(before) + len(known)]
        for n, a, p in zip(LENGTHS, alone, packed, strict=True):
            named = zip(("out", "dq", "dk", "dv"), a, p, strict=True)
            broken += [(n, name) for name, x, y in named if not bits_equal(x, y)]
    return broken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_has_the_same_bits_alone_and_among_strangers(dtype, causal, device):
    for head_dim in HEAD_DIMS if dtype == torch.bfloat16 else FEW_HEAD_DIMS:
        assert batch_variant(lambda s: run_sequences(s, causal), head_dim, dtype, device) == []


def test_an_order_that_depends_on_the_batch_is_caught(device):
    """Negative control: other key steps for a sequence alone change bits of every tensor, and the check sees it."""

    def by_batch(sequences):
        lengths = [len(s[0]) for s in sequences]
        q, k, v, g = (torch.cat(ts) for ts in zip(*sequences, strict=True))
        params = AttentionParams(True, q.shape[2] ** -0.5)
        order = own_order(q, params)
        order = with_steps(order, 16) if len(sequences) == 1 else order
        out, _, *grads = run(q, k, v, g, packed(lengths, device=device), params, order=order)
        return list(zip(*(r.split(lengths) for r in (out, *grads)), strict=True))

    broken = batch_variant(by_batch, HEAD_DIMS[0], torch.float32, device)
    assert {name for _, name in broken} == {"out", "dq", "dk", "dv"}


def test_the_config_changes_no_bit(device):
    for head_dim in HEAD_DIMS:
        q, k, v = qkv(sum(LENGTHS), sum(LENGTHS), 4, 2, head_dim, torch.bfloat16, device).values()
        g, params = torch.randn(q.shape, device=device).to(q.dtype), AttentionParams(True, head_dim**-0.5)
        given = (q, k, v, g, packed(LENGTHS, device=device), params)
        usual = run(*given)
        others = [KernelConfig(32, 2, 1, 1), KernelConfig(64, 1, 1, 1)]  # some pairs a program, and a list of tiles
        for other in others if runtime.INTERPRET else [KernelConfig(64, 1, 4, 1)]:
            dkv = other if runtime.INTERPRET or head_dim <= 128 else None
            changed = run(*given, forward=other, backward=BackwardConfigs(dq=other, dkv=dkv))
            for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), usual, changed, strict=True):
                assert bits_equal(a, b), (head_dim, other, name)


def test_gradients_are_the_same_on_every_run(device):
    for head_dim in HEAD_DIMS:
        inputs = qkv(sum(LENGTHS), sum(LENGTHS), 4, 2, head_dim, torch.bfloat16, device)
        q, k, v = (t.requires_grad_() for t in inputs.values())
        g = torch.randn(q.shape, device=device).to(q.dtype)

        def run(q=q, k=k, v=v, g=g):
            out = flash_attention(q, k, v, cu(LENGTHS, device))
            return (out.detach(), *torch.autograd.grad(out, (q, k, v), g))

        assert rerun_variant(run, RERUNS) == []


def test_views_into_a_fused_projection_have_the_bits_of_copies(device):
    n, hq, hkv, head_dim = 70, 4, 2, 16
    fused = torch.randn(n, (hq + 2 * hkv) * head_dim, device=device).bfloat16()
    views = fused.view(n, -1, head_dim).split([hq, hkv, hkv], dim=1)
    g = torch.randn(n, hq, head_dim, device=device).bfloat16()

    def run(tensors):
        q, k, v = (t.detach().requires_grad_() for t in tensors)
        out = flash_attention(q, k, v, cu([30, 40], device), max_seqlen=40)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), g))

    copies = run([t.contiguous() for t in views])
    backwards = [t.flip(-1).transpose(0, 2).contiguous().transpose(0, 2).flip(-1) for t in views]
    for strided in (run(views), run(backwards)):
        assert all(bits_equal(a, b) for a, b in zip(strided, copies, strict=True))


def test_a_larger_given_maximum_changes_no_bit(device):
    q, k, v = qkv(20, 20, 2, 1, 16, torch.bfloat16, device).values()
    outs = [flash_attention(q, k, v, cu([7, 13], device), max_seqlen=m) for m in (None, 13, 200)]
    assert bits_equal(outs[0], outs[1])
    assert bits_equal(outs[0], outs[2])


def test_masked_memory_is_never_read(device):
    """NaN in another sequence, or after the end of this one, stays there."""
    q, k, v = qkv(40, 40, 2, 1, 16, torch.float32, device).values()
    clean = flash_attention(q, k, v, cu([20, 20], device))
    k[20:], v[20:] = float("nan"), float("nan")
    dirty = flash_attention(q, k, v, cu([20, 20], device))
    assert bits_equal(clean[:20], dirty[:20])
    assert dirty[20:].isnan().all()


def test_nothing_to_attend(device):
    q, k, v = (t.requires_grad_() for t in qkv(0, 0, 2, 1, 16, torch.bfloat16, device).values())
    for lengths in ([], [0], [0, 0]):
        out = flash_attention(q, k, v, cu(lengths, device))
        assert out.shape == (0, 2, 16)
        assert all(g.shape[0] == 0 for g in torch.autograd.grad(out, (q, k, v), out))


def test_softmax_scale_is_used(device):
    q, k, v = qkv(9, 9, 2, 1, 16, torch.float32, device).values()
    out = flash_attention(q, k, v, cu([9], device), softmax_scale=0.7)
    expected = reference.flash_attention(q.double(), k.double(), v.double(), cu([9], device), softmax_scale=0.7)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_torch_compile_changes_no_bit(device):
    q, k, v = qkv(20, 20, 2, 1, 16, torch.bfloat16, device).values()
    starts = cu([7, 13], device)

    def run(fn):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = fn(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))

    def eager(q, k, v):
        return flash_attention(q, k, v, starts, max_seqlen=13)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager" if runtime.INTERPRET else "inductor")
    assert all(bits_equal(a, b) for a, b in zip(run(eager), run(compiled), strict=True))


def test_the_custom_operators_keep_their_schemas(device):
    q, k, v = qkv(9, 9, 2, 1, 16, torch.bfloat16, device).values()
    starts = cu([4, 5], device)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.bi_ops.flash_attention, (q, k, v, starts, starts, 5, 5, True, 0.25, "triton"), test_utils=utils
    )
    cache, table, lengths = k[:8].view(2, 4, 1, 16), torch.tensor([[0], [1]]).to(starts), starts[1:].clamp(max=4)
    torch.library.opcheck(
        torch.ops.bi_ops.paged_attention,
        (q, cache, cache.clone(), table, starts, lengths, 5, True, 0.25, "triton"),
        test_utils=utils,
    )


def test_check_cu_seqlens_returns_the_longest(device):
    assert attention.check_cu_seqlens(cu([3, 0, 9], device), 12) == 9
    assert attention.check_cu_seqlens(cu([], device), 0) == 0


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 6], "must start at 0"),
        ([0, 4, 3, 6], "never decrease, got 4 then 3"),
        ([0, 5], "ends at 5 but there are 6"),
        ([0, -1, 6], "never decrease"),
    ],
)
def test_bad_cu_seqlens_are_named(starts, message, device):
    q, k, v = qkv(6, 6, 2, 1, 16, torch.float32, device).values()
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, torch.tensor(starts, dtype=torch.int32, device=device))


def bad(device, shapes=((6, 2, 16), (6, 1, 16), (6, 1, 16)), dtypes=(torch.float32,) * 3, starts=(0, 6), **kwargs):
    tensors = [torch.ones(*s, device=device).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    starts = starts if isinstance(starts, torch.Tensor) else torch.tensor(starts, dtype=torch.int32, device=device)
    return flash_attention(*tensors, starts, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"shapes": ((6, 3, 16), (6, 2, 16), (6, 2, 16))}, ValueError, "3 query heads are not"),
        ({"shapes": ((6, 2, 257), (6, 1, 257), (6, 1, 257))}, ValueError, r"from 1 to 256, got q \[6, 2, 257\]"),
        ({"shapes": ((6, 2, 16), (6, 1, 16), (6, 1, 257))}, ValueError, r"from 1 to 256, .* v \[6, 1, 257\]"),
        ({"shapes": ((6, 2, 0), (6, 1, 0), (6, 1, 8))}, ValueError, "head sizes must be from 1"),
        ({"shapes": ((6, 2, 16), (6, 1, 24), (6, 1, 24))}, ValueError, "head sizes of queries and keys differ"),
        ({"shapes": ((6, 2, 16), (6, 1, 16), (5, 1, 16))}, ValueError, "one shape"),
        ({"shapes": ((6, 2, 16), (5, 1, 16), (5, 1, 16))}, ValueError, "give cu_seqlens_k"),
        ({"shapes": ((6, 16), (6, 1, 16), (6, 1, 16))}, ValueError, "q must have 3 dimensions"),
        ({"dtypes": (torch.bfloat16, torch.bfloat16, torch.float16)}, TypeError, "dtypes differ"),
        ({"dtypes": (torch.float64,) * 3}, TypeError, "float64"),
        ({"starts": torch.tensor([0, 6])}, TypeError, "int64"),
        ({"starts": ()}, ValueError, r"B \+ 1 entries"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be positive"),
    ],
)
def test_bad_input_is_named(kwargs, error, message, device):
    if isinstance(kwargs.get("starts"), torch.Tensor):
        kwargs = kwargs | {"starts": kwargs["starts"].to(device)}
    with pytest.raises(error, match=message):
        bad(device, **kwargs)


def test_more_rows_than_32_bits_count_are_named(device):
    rows = torch.empty(1, 2, 16, device=device).expand(2**30, 2, 16)
    with pytest.raises(ValueError, match=r"1073741824 tokens in 2 sequences, times 2 heads, are 2\*\*31 rows or more"):
        flash_attention(rows, rows, rows, cu([2**30], device))


@pytest.mark.parametrize("maximum", [-1, 5])
def test_a_maximum_without_room_is_named_where_contents_are_not_read(maximum):
    """As on a GPU, where reading cu_seqlens would wait: 2 sequences of at most 5 cannot hold 11 tokens."""
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=f"maximum of {maximum} for 2 sequences of cu_seqlens has no room for 11"):
        checks.longest("flash_attention", "cu_seqlens", starts, 11, maximum)
    assert checks.longest("flash_attention", "cu_seqlens", starts, 11, 6) == 6


@pytest.mark.skipif(not runtime.INTERPRET, reason="on a GPU a given maximum is trusted")
def test_a_maximum_that_is_too_small_is_named(device):
    with pytest.raises(ValueError, match="has 6 tokens, but the given maximum is 5"):
        bad(device, max_seqlen=5)


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_serves_only_head_sizes_it_is_invariant_at(device):
    for head_dim in (64, 96):
        q, k, v = qkv(8, 8, 2, 1, head_dim, torch.bfloat16, device).values()
        with pytest.raises(RuntimeError, match=f"head_dim {head_dim}.*Use backend 'triton'"):
            attention.flash_attention(q, k, v, cu([8], device), backend="vllm")
    for head_dim in (64, 96, 128):  # no backend is asked for: the kernels of bi_ops, whatever is installed
        ours = attention.order_of(head_dim, torch.bfloat16, backend="triton")
        assert attention.order_of(head_dim, torch.bfloat16) == ours
    assert attention.order_of(128, torch.bfloat16, backend="vllm") != ours
    check_gradients(LENGTHS, LENGTHS, 4, 2, 128, True, torch.bfloat16, device, backend="vllm")
