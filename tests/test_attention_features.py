"""Windows, soft-capping, sinks and the gradient through lse: the contract of plain attention holds with each."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from own_attention import cu, own_order, packed, run, with_steps
from sweeps import sweep
from test_attention_paged import ints, last_rows, paged

from bi_ops import attention
from bi_ops.attention import launch, ops, reference
from bi_ops.attention.config import BackwardConfigs, KernelConfig, SinkConfig
from bi_ops.attention.params import AttentionParams
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.verify import gradient_errors, rerun_variant
from bi_ops.verify.properties import bits_equal

LENGTHS = [5, 0, 70, 1, 130] if runtime.INTERPRET else [5, 0, 70, 1, 130, 257, 1024, 2049]
STRANGERS = ([3, 64], [150]) if runtime.INTERPRET else ([3, 64, 777], [150, 4096])
HEAD_DIM = 24 if runtime.INTERPRET else 128
HEAD_DIMS = (80, 96, 112) if runtime.INTERPRET else (64, 80, 96, 112, 128, 256)
RERUNS = 2 if runtime.INTERPRET else 100
HQ, HKV = 4, 2

#: Arguments of flash_attention; sinks stands for whether there are any. Windows are smaller than a tile, and larger.
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window_size": (20, 0)},
    "wide window": {"window_size": (100, -1)},
    "window on both sides": {"window_size": (7, 30), "causal": False},
    "window on the right": {"window_size": (-1, 9), "causal": False},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "everything": {"window_size": (33, 0), "softcap": 3.0, "sinks": True},
}
#: Head sizes and sizes of the blocks of a paged cache, each once, and how features go together in it.
PAGES = (
    [(80, 16), (96, 256)] if runtime.INTERPRET else [(64, 64), (80, 16), (96, 256), (112, 32), (128, 128), (256, 16)]
)
COMBINATIONS: dict[str, dict[str, Any]] = {
    "window and softcap": {"window_size": (33, 0), "softcap": 3.0},
    "window and sinks": {"window_size": (33, 0), "sinks": True},
    "softcap and sinks": {"softcap": 3.0, "sinks": True},
    "everything": FEATURES["everything"],
}
NAMES = ("out", "lse", "dq", "dk", "dv")
features = pytest.mark.parametrize("feature", FEATURES)
#: One that is not causal, and the one that holds the others.
few_features = sweep("feature", FEATURES, ("window on both sides", "everything"))


#: The own kernels, where vLLM is installed too.
flash_attention = functools.partial(attention.flash_attention, backend="triton")
paged_attention = functools.partial(attention.paged_attention, backend="triton")


def tensors(n_q, n_k, head_dim, dtype, device, hq=HQ, hkv=HKV) -> dict[str, torch.Tensor]:
    """q, k, v; scores are large enough for a softcap of 3 to bite."""
    shapes = {"q": (n_q, hq, head_dim), "k": (n_k, hkv, head_dim), "v": (n_k, hkv, head_dim)}
    return {name: (1.5 * torch.randn(*s, device=device)).to(dtype) for name, s in shapes.items()}


def sinks_of(device, hq=HQ) -> torch.Tensor:
    return torch.linspace(-1, 3, hq, device=device)


def params_of(window_size=(-1, -1), softcap=0.0, causal=True, sinks=None, head_dim=HEAD_DIM) -> AttentionParams:
    """What `launch` takes, of the arguments of flash_attention."""
    return AttentionParams(causal, head_dim**-0.5, *window_size, softcap)


def arguments(feature, device) -> dict:
    """The arguments of flash_attention, sinks a tensor."""
    given = (FEATURES | COMBINATIONS)[feature]
    return given | {"sinks": sinks_of(device)} if "sinks" in given else given


# --------------------------------------------------------------------------------------------------------------
# accuracy


def check_gradients(lens_q, lens_k, head_dim, dtype, device, heads=(HQ, HKV), **options):
    """Errors of out, lse and every gradient, the sinks' among them. An lse of +inf is left out."""
    cu_q, cu_k = cu(lens_q, device), cu(lens_k, device)
    inputs = tensors(sum(lens_q), sum(lens_k), head_dim, dtype, device, *heads)
    if "sinks" in options:
        inputs["sinks"] = sinks_of(device, heads[0])
    others = {name: value for name, value in options.items() if name != "sinks"} | {"return_lse": True}

    def ours(q, k, v, sinks=None):
        out, lse = flash_attention(q, k, v, cu_q, cu_seqlens_k=cu_k, sinks=sinks, **others)
        return out, lse.masked_fill(lse.isinf(), 0)

    def plain(q, k, v, sinks=None):
        out, lse = reference.flash_attention(q, k, v, cu_q, cu_k, sinks=sinks, **others)
        return out, lse.masked_fill(lse.isinf(), 0)

    errors = gradient_errors(ours, plain, inputs)
    assert all(e.ok for e in errors), errors


@features
def test_gradients_match_fp64(feature, device):
    check_gradients(LENGTHS, LENGTHS, HEAD_DIM, torch.bfloat16, device, **FEATURES[feature])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_match_fp64_in_other_dtypes(dtype, device):
    for feature in ("everything",) if runtime.INTERPRET else ("softcap", "everything"):
        check_gradients(LENGTHS, LENGTHS, HEAD_DIM, dtype, device, **FEATURES[feature])


@sweep("head_dim", HEAD_DIMS, (80,))
def test_gradients_match_fp64_at_every_head_size(head_dim, device):
    check_gradients([70, 1, 0, 90], [70, 1, 0, 90], head_dim, torch.bfloat16, device, **FEATURES["everything"])


@sweep(
    ("causal", "window_size"),
    itertools.product([True, False], [(3, 0), (0, 0), (-1, 5), (6, 70), (70, -1)]),
    [(True, (0, 0)), (True, (6, 70)), (False, (3, 0)), (False, (70, -1))],
)
def test_windows_of_unequal_lengths_are_aligned_to_the_last_query_and_key(window_size, causal, device):
    lens_q, lens_k = [5, 0, 70, 3, 4, 66], [9, 2, 70, 1, 0, 140]
    options = {"window_size": window_size, "causal": causal}
    check_gradients(lens_q, lens_k, 40, torch.bfloat16, device, heads=(3, 1), **options)


def test_every_key_that_a_window_shows_is_seen_and_no_other(device):
    """Values are one-hot: an output names the keys it saw."""
    n_q, n_k = 5, 8
    q, k = (torch.zeros(n, 1, 16, device=device) for n in (n_q, n_k))
    v = torch.eye(n_k, 16, device=device)[:, None]
    for left, right in itertools.product((-1, 0, 2, 50), repeat=2):
        out = flash_attention(
            q, k, v, cu([n_q], device), cu_seqlens_k=cu([n_k], device), causal=False, window_size=(left, right)
        )
        for i, row in enumerate(out[:, 0, :n_k] > 0):
            own = i + n_k - n_q
            first = 0 if left < 0 else max(own - left, 0)
            last = n_k - 1 if right < 0 else min(own + right, n_k - 1)
            assert row.nonzero().flatten().tolist() == list(range(first, last + 1)), (left, right, i)


def test_a_query_that_sees_no_key(device):
    """Its output is zero, its lse +inf, or the sink, which is then all that its gradient reaches."""
    q, k, v = (t.requires_grad_() for t in tensors(4, 2, 16, torch.float32, device).values())
    sinks = sinks_of(device).requires_grad_()
    for given in (None, sinks):
        out, lse = flash_attention(q, k, v, cu([4], device), cu_seqlens_k=cu([2], device), sinks=given, return_lse=True)
        assert not out[:2].any()
        assert lse[:, 2:].isfinite().all()
        wanted = torch.inf if given is None else sinks.detach()[:, None].expand(-1, 2)
        torch.testing.assert_close(lse[:, :2], torch.as_tensor(wanted, device=device).expand(HQ, 2))
        leaves = [t for t in (q, k, v, given) if t is not None]
        grads = torch.autograd.grad((out[:2].sum() + lse[:, :2].sum()), leaves)
        assert not any(g.any() for g in grads[:3])
    torch.testing.assert_close(grads[3], torch.full_like(sinks, 2))


def test_sinks_of_minus_infinity_have_the_bits_of_none(device):
    q, k, v = tensors(70, 70, 16, torch.bfloat16, device).values()
    sinks = torch.full((HQ,), float("-inf"), device=device, requires_grad=True)
    out, lse = flash_attention(q, k, v, cu([70], device), sinks=sinks, return_lse=True)
    plain = flash_attention(q, k, v, cu([70], device), return_lse=True)
    assert bits_equal(out, plain[0])
    assert bits_equal(lse, plain[1])
    assert not torch.autograd.grad(out.sum() + lse.sum(), sinks)[0].any()


def test_a_gradient_reaches_lse_alone(device):
    inputs = tensors(70, 70, 16, torch.float32, device)
    q, k, v = (t.requires_grad_() for t in inputs.values())
    _, lse = flash_attention(q, k, v, cu([30, 40], device), return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    doubles = [t.detach().double().requires_grad_() for t in (q, k)]
    _, exact = reference.flash_attention(*doubles, v.double(), cu([30, 40], device), return_lse=True)
    for ours, wanted in zip((dq, dk), torch.autograd.grad(exact.sum(), doubles), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)
    assert not dv.any()


def test_no_tokens(device):
    q, k, v = (t.requires_grad_() for t in tensors(0, 0, 16, torch.bfloat16, device).values())
    sinks = sinks_of(device).requires_grad_()
    for lengths in ([], [0, 0]):
        out, lse = flash_attention(q, k, v, cu(lengths, device), window_size=(3, 0), sinks=sinks, return_lse=True)
        assert lse.shape == (HQ, 0)
        assert not torch.autograd.grad(out.sum() + lse.sum(), sinks)[0].any()


# --------------------------------------------------------------------------------------------------------------
# bits


def run_sequences(sequences, **options):
    """Pack sequences of (q, k, v, g, g_lse); per sequence (out, lse, dq, dk, dv)."""
    lengths = [len(s[0]) for s in sequences]
    q, k, v, g, g_lse = (torch.cat(ts) for ts in zip(*sequences, strict=True))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = flash_attention(q, k, v, cu(lengths, q.device), return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), (q, k, v), (g, g_lse.t()))
    results = (out.detach(), lse.detach().t(), *grads)
    return list(zip(*(r.split(lengths) for r in results), strict=True))


def batch_variant(run, dtype, device) -> list[tuple[int, str]]:
    """(length, tensor) of the sequences whose bits change when strangers share the batch, or stand before them."""

    def sequence(n):
        made = tensors(n, n, HEAD_DIM, dtype, device)
        return *made.values(), torch.randn_like(made["q"]), torch.randn(n, HQ, device=device)

    known = [sequence(n) for n in LENGTHS]
    alone = [run([s])[0] for s in known]
    broken = []
    for before, after in (([], []), (STRANGERS[0], STRANGERS[1]), (STRANGERS[1], [])):
        batch = [*map(sequence, before), *known, *map(sequence, after)]
        packed = run(batch)[len(before) : len(before) + len(known)]
        for n, a, p in zip(LENGTHS, alone, packed, strict=True):
            broken += [(n, name) for name, x, y in zip(NAMES, a, p, strict=True) if not bits_equal(x, y)]
    return broken


@few_features
def test_a_sequence_has_the_same_bits_alone_and_among_strangers(feature, device):
    assert batch_variant(lambda s: run_sequences(s, **arguments(feature, device)), torch.bfloat16, device) == []


def test_an_order_that_depends_on_the_batch_is_caught(device):
    """Negative control, with everything on."""
    options = arguments("everything", device)
    params = params_of(**options)

    def by_batch(sequences):
        lengths = [len(s[0]) for s in sequences]
        q, k, v, g, g_lse = (torch.cat(ts) for ts in zip(*sequences, strict=True))
        order = own_order(q, params, options["sinks"])
        order = with_steps(order, 16) if len(sequences) == 1 else order
        given = (q, k, v, g, packed(lengths, device=device), params)
        out, lse, *grads = run(*given, g_lse=g_lse.t(), sinks=options["sinks"], order=order)
        return list(zip(*(r.split(lengths) for r in (out, lse.t(), *grads[:3])), strict=True))

    assert {name for _, name in batch_variant(by_batch, torch.float32, device)} == set(NAMES)


def outputs_and_gradients(device, dtype=torch.bfloat16, lengths=LENGTHS, seed=0, **options):
    """A function that runs forward and backward on the same inputs: (out, lse, dq, dk, dv, dsinks if any)."""
    torch.manual_seed(seed)
    q, k, v = tensors(sum(lengths), sum(lengths), HEAD_DIM, dtype, device).values()
    leaves = [t.requires_grad_() for t in (q, k, v, options.get("sinks")) if t is not None]
    g, g_lse = torch.randn(q.shape, device=device).to(dtype), torch.randn(HQ, len(q), device=device)

    def run():
        out, lse = flash_attention(q, k, v, cu(lengths, device), return_lse=True, **options)
        return (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (g, g_lse)))

    return run


@few_features
def test_the_config_changes_no_bit(feature, device):
    """Small tiles skip steps outside the window that large ones take for the sake of other rows: same bits."""
    lengths, options = [1, 70] if runtime.INTERPRET else LENGTHS, arguments(feature, device)
    q, k, v = tensors(sum(lengths), sum(lengths), HEAD_DIM, torch.bfloat16, device).values()
    g, g_lse = torch.randn(q.shape, device=device).to(q.dtype), torch.randn(HQ, len(q), device=device)
    given = (q, k, v, g, packed(lengths, device=device), params_of(**options), g_lse, options.get("sinks"))
    usual = run(*given)
    small, listed = KernelConfig(16, 1, 1, 1), KernelConfig(64, 1, 4, 1)
    for other in (small, listed) if runtime.INTERPRET else (listed,):
        changed = run(*given, forward=other, backward=BackwardConfigs(None, other, other, SinkConfig(2, 4, 3, 1)))
        for i, (a, b) in enumerate(zip(usual, changed, strict=True)):
            assert bits_equal(a, b), (other, i)


@sweep("feature", FEATURES, ("everything",))
def test_reruns_have_the_same_bits(feature, device):
    assert rerun_variant(outputs_and_gradients(device, **arguments(feature, device)), RERUNS) == []


def test_a_window_that_hides_nothing_has_the_bits_of_none(device):
    """Where plain gradients are computed in one pass, and those with a window in two, that holds for the outputs."""
    plain = outputs_and_gradients(device)()
    orders = [attention.order_of(HEAD_DIM, torch.bfloat16, some, "triton") for some in ((), ("window_size",))]
    count = len(plain) if orders[0] == orders[1] else 2
    for left in (max(LENGTHS) - 1, 2**40):
        same = outputs_and_gradients(device, window_size=(left, 5))()
        assert all(bits_equal(a, b) for a, b in zip(plain[:count], same[:count], strict=True)), left


def test_steps_are_counted_from_the_start_of_the_sequence_whatever_the_window_hides(device):
    """A window that begins at a whole step has the bits of the keys it shows; one that begins elsewhere has not."""
    n, step = 200, attention.order_of(HEAD_DIM, torch.float32, backend="triton").forward.block_n
    q, k, v = tensors(n, n, HEAD_DIM, torch.float32, device).values()

    def last_row(first):
        whole = flash_attention(q, k, v, cu([n], device), window_size=(n - 1 - first, 0))[-1:]
        shown = (k[first:], v[first:], cu([1], device))
        cut = flash_attention(q[-1:], *shown, cu_seqlens_k=cu([n - first], device))
        torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-5)
        return bits_equal(whole, cut)

    assert last_row(step)
    assert last_row(2 * step)
    assert not all(last_row(first) for first in (step + 5, step + 20, step + 40))


def test_the_sinks_gradient_adds_chunks_of_tokens_front_to_back(device):
    """Tokens that add nothing change no bit of the sum, however many programs share it; another order does."""
    rows = torch.randn(2, HKV, 53, HQ // HKV, device=device)
    delta, shift = rows[0].contiguous(), rows[1].contiguous()
    order, arch = attention.order_of(HEAD_DIM, torch.bfloat16, ("sinks",), "triton"), arches.of(device)

    def dsinks(delta, shift, order=order):
        return launch.launch_dsinks(torch.zeros(HQ, device=device), delta, shift, order, arch)

    whole = dsinks(delta, shift)
    padded = torch.zeros(HKV, 64, HQ // HKV, device=device)
    padded[:, :53] = delta
    shift64 = torch.zeros_like(padded)
    shift64[:, :53] = shift
    assert bits_equal(whole, dsinks(padded, shift64))
    exact = -(shift.double().exp2() * delta.double()).sum(1).flatten()
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)
    assert not bits_equal(whole, dsinks(delta.flip(1), shift.flip(1)))  # negative control
    assert not bits_equal(whole, dsinks(delta, shift, replace(order, sinks_chunk=4)))


# --------------------------------------------------------------------------------------------------------------
# decoding


def decode(q, k, v, lengths, page, device, **options):
    """The last row of every sequence from a paged cache."""
    caches = paged(k, v, lengths, page)
    ones = cu([1] * len(lengths), device)
    args = (last_rows(q, lengths), *caches, ones, ints(lengths, device))
    return paged_attention(*args, max_seqlen_q=1, **options)


@features
def test_decoded_rows_have_the_bits_of_prefilled_rows(feature, device):
    lengths, options = [n for n in LENGTHS if n > 0], arguments(feature, device)
    for head_dim in (HEAD_DIM,) if runtime.INTERPRET or feature != "everything" else HEAD_DIMS:
        q, k, v = tensors(sum(lengths), sum(lengths), head_dim, torch.bfloat16, device).values()
        prefill = flash_attention(q, k, v, cu(lengths, device), **options)
        rows = last_rows(prefill, lengths)
        for page in (7, 64) if head_dim == HEAD_DIM else (16,):
            # A query that is alone is the last one: what it sees to the right is nothing, in prefill as in decoding.
            assert bits_equal(decode(q, k, v, lengths, page, device, **options), rows), (head_dim, page)
            whole = paged_attention(
                *(q, *paged(k, v, lengths, page), cu(lengths, device), ints(lengths, device)),
                max_seqlen_q=max(lengths),
                **options,
            )
            assert bits_equal(whole, prefill), (head_dim, page)


def paged_rows(q, k, v, lengths, before, page, device, **options):
    """The rows of each sequence from `before` of them on, by one call with a paged cache."""
    new = [n - b for n, b in zip(lengths, before, strict=True)]
    rows = torch.cat([s[b:] for s, b in zip(q.split(lengths), before, strict=True)])
    args = (rows, *paged(k, v, lengths, page), cu(new, device), ints(lengths, device))
    return paged_attention(*args, max_seqlen_q=max(new), **options)


@pytest.mark.parametrize(("head_dim", "page"), PAGES)
@sweep("combination", COMBINATIONS, ("everything",))
def test_paged_rows_have_the_dense_bits_at_every_head_size_and_block_size(combination, head_dim, page, device):
    """Prefill, decoding, and a batch of both and a chunk."""
    lengths, options = [3, 130, 33] if runtime.INTERPRET else LENGTHS[2:], arguments(combination, device)
    q, k, v = tensors(sum(lengths), sum(lengths), head_dim, torch.bfloat16, device).values()
    dense = flash_attention(q, k, v, cu(lengths, device), **options).split(lengths)
    mixed = [(0, n // 2, n - 1)[i % 3] for i, n in enumerate(lengths)]
    for before in ([0] * len(lengths), [n - 1 for n in lengths], mixed):
        rows = paged_rows(q, k, v, lengths, before, page, device, **options)
        assert bits_equal(rows, torch.cat([s[b:] for s, b in zip(dense, before, strict=True)])), before


@few_features
def test_chunked_prefill_has_the_bits_of_prefill(feature, device):
    """For causal attention: a chunk ends at its last query, so to the right nothing is there to see yet."""
    n, options = LENGTHS[-1], arguments(feature, device) | {"causal": True}
    q, k, v = tensors(n, n, HEAD_DIM, torch.bfloat16, device).values()
    prefill = flash_attention(q, k, v, cu([n], device), **options)
    for a, b in itertools.pairwise([0, 7, 64, 65, 128, n]):
        chunk = paged_rows(q[:b], k[:b], v[:b], [b], [a], 16, device, **options)
        assert bits_equal(chunk, prefill[a:b]), (a, b)


@pytest.mark.parametrize("change", [{"window_size": (34, 0)}, {"softcap": 0.0}, {"sinks": None}])
def test_a_paged_cache_that_is_read_with_other_features_is_caught(change, device):
    """Negative control."""
    lengths, options = [100, 130], arguments("everything", device)
    q, k, v = tensors(230, 230, HEAD_DIM, torch.bfloat16, device).values()
    dense = last_rows(flash_attention(q, k, v, cu(lengths, device), **options), lengths)
    assert bits_equal(decode(q, k, v, lengths, 16, device, **options), dense)
    for other, row in zip(decode(q, k, v, lengths, 16, device, **(options | change)), dense, strict=True):
        assert not bits_equal(other, row)


@pytest.mark.parametrize("page", [7, 16, 64])
@pytest.mark.parametrize("new", [1, 40])
def test_blocks_before_a_window_may_hold_anything(page, new, device):
    """A cache frees them, and another sequence's values may follow, finite or not."""
    left, lengths = 20, [41, 70, 130]
    options = {"window_size": (left, 0), "sinks": sinks_of(device)}
    q, k, v = tensors(sum(lengths), sum(lengths), HEAD_DIM, torch.bfloat16, device).values()
    rows = torch.cat([s[-new:] for s in q.split(lengths)])
    starts, totals = cu([new] * len(lengths), device), ints(lengths, device)
    k_cache, v_cache, table = paged(k, v, lengths, page)

    def run():
        return paged_attention(rows, k_cache, v_cache, table, starts, totals, max_seqlen_q=new, **options)

    kept = run()
    dense = flash_attention(q, k, v, cu(lengths, device), **options)
    assert bits_equal(kept, torch.cat([s[-new:] for s in dense.split(lengths)]))
    dead = [table[i, j] for i, n in enumerate(lengths) for j in range((n - new - left) // page)]
    for value in (float("nan"), float("inf"), -1e30):
        for cache in (k_cache, v_cache):
            cache[torch.stack(dead)] = value
        assert bits_equal(run(), kept), value
    for i, n in enumerate(lengths):  # negative control: the first key that the window shows
        at = max(n - new - left, 0)
        v_cache[table[i, at // page], at % page] = float("nan")
    assert all(row.isnan().all() for row in run()[::new])


def test_a_decoded_row_of_everything_does_not_depend_on_the_batch(device):
    lengths, options = [n for n in LENGTHS if n > 0], arguments("everything", device)
    q, k, v = tensors(sum(lengths), sum(lengths), HEAD_DIM, torch.bfloat16, device).values()
    together = decode(q, k, v, lengths, 16, device, **options)
    for i, parts in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)):
        assert bits_equal(decode(*parts, [lengths[i]], 16, device, **options)[0], together[i])


def test_a_sink_that_joins_after_the_walk_is_caught(device):
    """Negative control: the same mathematics with the sink applied to the finished row has other bits."""
    lengths = [100, 130]
    q, k, v = tensors(230, 230, HEAD_DIM, torch.float32, device).values()
    sinks = sinks_of(device)
    prefill = last_rows(flash_attention(q, k, v, cu(lengths, device), sinks=sinks), lengths)
    assert bits_equal(decode(q, k, v, lengths, 16, device, sinks=sinks), prefill)
    out, lse = flash_attention(q, k, v, cu(lengths, device), return_lse=True)
    late = last_rows(out * torch.sigmoid(lse - sinks[:, None]).t()[..., None], lengths)
    torch.testing.assert_close(late, prefill, rtol=1e-4, atol=1e-5)
    assert not bits_equal(late, prefill)


# --------------------------------------------------------------------------------------------------------------
# the custom operators and errors


def test_torch_compile_changes_no_bit(device):
    q, k, v = tensors(20, 20, 16, torch.bfloat16, device).values()
    sinks, starts = sinks_of(device), cu([7, 13], device)

    def eager(q, k, v, sinks):
        options = FEATURES["everything"] | {"sinks": sinks}
        return flash_attention(q, k, v, starts, max_seqlen=13, return_lse=True, **options)

    def run(fn):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
        out, lse = fn(*leaves)
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), leaves)
        return (out.detach(), lse.detach(), *grads)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager" if runtime.INTERPRET else "inductor")
    assert all(bits_equal(a, b) for a, b in zip(run(eager), run(compiled), strict=True))


def test_the_custom_operators_keep_their_schemas(device):
    q, k, v = tensors(9, 9, 16, torch.bfloat16, device).values()
    starts, sinks = cu([4, 5], device), sinks_of(device)
    out, lse = ops._flash(q, k, v, starts, starts, 5, 5, True, 0.25, "triton", 3, 0, 2.0, sinks)
    utils = ("test_schema", "test_faketensor")
    features = (3, 0, 2.0, sinks)
    torch.library.opcheck(
        torch.ops.bi_ops.flash_attention,
        (q, k, v, starts, starts, 5, 5, True, 0.25, "triton", *features),
        test_utils=utils,
    )
    grad = (out, q, k, v, out, lse, starts, starts, 5, 5, True, 0.25, True, True)
    for more in ((), (True, lse, *features), (False, lse, *features)):
        torch.library.opcheck(torch.ops.bi_ops.flash_attention_backward, (*grad, *more), test_utils=utils)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": (-2, 0)}, ValueError, r"window_size must be .* got \(-2, 0\)"),
        ({"window_size": (3,)}, ValueError, "window_size must be"),
        ({"window_size": (1.5, 0)}, ValueError, "window_size must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0, .* got -1.0"),
        ({"softcap": float("nan")}, ValueError, "got nan"),
        ({"softcap": float("inf")}, ValueError, "got inf"),
        ({"sinks": torch.zeros(HKV)}, ValueError, r"sinks must be \[4\], got \[2\]"),
        ({"sinks": torch.zeros(HQ, 1)}, ValueError, "got \\[4, 1\\]"),
        ({"sinks": torch.zeros(HQ, dtype=torch.float64)}, TypeError, "sinks is float64"),
        ({"sinks": [0.0] * HQ}, TypeError, "sinks must be a tensor"),
        ({"sinks": torch.zeros(HQ, device="meta")}, ValueError, "different devices"),
    ],
)
def test_bad_features_are_named(options, error, message, device):
    if isinstance(options.get("sinks"), torch.Tensor) and options["sinks"].device.type != "meta":
        options = {"sinks": options["sinks"].to(device)}
    q, k, v = tensors(6, 6, 16, torch.bfloat16, device).values()
    with pytest.raises(error, match=message):
        flash_attention(q, k, v, cu([6], device), **options)
    with pytest.raises(error, match=message):
        decode(q, k, v, [6], 4, device, **options)


def test_paged_attention_has_no_gradient_for_sinks(device):
    q, k, v = tensors(6, 6, 16, torch.bfloat16, device).values()
    with pytest.raises(RuntimeError, match="has no backward"):
        decode(q, k, v, [6], 4, device, sinks=sinks_of(device).requires_grad_())
