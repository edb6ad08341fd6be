"""Mixture of experts: accuracy against fp64, and bits that depend on a token alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch

from bi_ops import matmul, moe
from bi_ops.core import runtime
from bi_ops.moe import launch, reference
from bi_ops.nn import MainGrad
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

TOKENS, HIDDEN, SIZE, EXPERTS, TOP_K = (64, 32, 16, 5, 3) if runtime.INTERPRET else (1500, 2048, 768, 128, 8)
RERUNS = 2 if runtime.INTERPRET else 50
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16 = torch.bfloat16


def randn(*shape, dtype=BF16, device, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def distinct(tokens, device, experts=EXPERTS, top_k=TOP_K):
    """int32 [tokens, top_k], random and distinct in a row."""
    return torch.rand(tokens, experts, device=device).argsort(1)[:, :top_k].int()


def layer(tokens=TOKENS, dtype=BF16, device=None, experts=None, width=HIDDEN, size=SIZE):
    """The inputs of `moe.experts`, by name."""
    weights = torch.rand(tokens, TOP_K, device=device)
    return {
        "hidden": randn(tokens, width, dtype=dtype, device=device),
        "gate_up": randn(EXPERTS, 2 * size, width, dtype=dtype, device=device, scale=width**-0.5),
        "down": randn(EXPERTS, width, size, dtype=dtype, device=device, scale=size**-0.5),
        "weights": weights / weights.sum(1, keepdim=True),
        "experts": distinct(tokens, device) if experts is None else experts,
    }


def gradients(inputs, g, **options):
    """(output, gradients of hidden, gate_up, down and weights)"""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    out = moe.experts(**leaves, **options)
    wanted = [leaves[n] for n in ("hidden", "gate_up", "down", "weights")]
    return (out.detach(), *torch.autograd.grad(out, wanted, g))


# --------------------------------------------------------------------------------------------------------------
# router


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 128, 192, 60])
def test_the_router_is_a_softmax_and_its_largest(experts, dtype, normalize, device):
    x = {"logits": randn(40, experts, dtype=dtype, device=device, scale=2.0)}
    assert torch.equal(moe.router(x["logits"], 4)[1], reference.router(x["logits"].float(), 4)[1])
    errors = gradient_errors(
        lambda logits: moe.router(logits, 4, normalize=normalize)[0],
        lambda logits: reference.router(logits, 4, normalize)[0],
        x,
    )
    # Plain torch leaves the weights in the dtype of the logits; here they are fp32.
    assert all(e.ours <= max(2 * e.plain, 1e-6) for e in errors), errors


def test_ties_go_to_the_lower_expert(device):
    logits = torch.zeros(3, 128, dtype=BF16, device=device)
    logits[1, 40:44], logits[2, 127] = 1.0, 1.0
    weights, experts = moe.router(logits, 4)
    assert experts.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43], [127, 0, 1, 2]]
    assert torch.equal(weights[:2], torch.full((2, 4), 0.25, device=device))


@pytest.mark.filterwarnings("ignore")  # numpy's, in the interpreter
def test_a_token_that_is_not_finite_keeps_distinct_experts_and_harms_no_other(device):
    logits = randn(5, 16, device=device)
    before = moe.router(logits, 3)
    logits[2, 5] = float("nan")
    logits[3, 1] = float("inf")
    weights, experts = moe.router(logits, 3)
    assert experts[2:4].tolist() == [[0, 1, 2]] * 2
    assert weights[2:4].eq(0).all()
    others = [0, 1, 4]
    assert bits_equal(weights[others], before[0][others])
    assert bits_equal(experts[others], before[1][others])


def router_with_gradient(logits, g):
    logits = logits.clone().requires_grad_()
    weights, experts = moe.router(logits, TOP_K, normalize=False)
    return weights.detach(), experts, torch.autograd.grad(weights, logits, g)[0]


def test_a_tokens_route_does_not_depend_on_the_batch(device):
    rows = (randn(300, 128, device=device), torch.randn(300, TOP_K, device=device))
    counts = ((1, 17, 257),) if runtime.INTERPRET else ()
    assert row_variant(router_with_gradient, rows, *counts) == []
    assert order_variant(router_with_gradient, rows, trials=1) == []


@pytest.mark.skipif(not runtime.INTERPRET, reason="exp of numpy; a GPU's: test_moe_vllm.py")
@pytest.mark.parametrize(("dtype", "experts"), [(BF16, 128), (torch.float32, 128), (BF16, 512), (BF16, 192)])
def test_the_denominator_is_added_as_vllms_kernel_adds_it(dtype, experts, device):
    """A thread adds 16 bytes of experts (4 of 192), then those as many further on; threads are added by halves."""
    logits = randn(9, experts, dtype=dtype, device=device, scale=3.0)
    weights, chosen = moe.router(logits, 8, normalize=False)
    vector = {192: 2}.get(experts, 16 // logits.itemsize)
    threads = min(32, experts // vector)
    x = logits.float()
    e = torch.from_numpy(np.exp((x - x.amax(1, keepdim=True)).numpy()))
    lanes = torch.zeros(9, threads)
    for load in e.view(9, -1, threads, vector).unbind(1):
        for i in range(vector):
            lanes = lanes + load[..., i]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    assert bits_equal(weights, (e * (1 / lanes)).gather(1, chosen.long()))
    front_to_back = functools.reduce(torch.add, e.unbind(1))[:, None]
    assert not bits_equal(weights, (e * (1 / front_to_back)).gather(1, chosen.long()))  # negative control


# --------------------------------------------------------------------------------------------------------------
# dispatch, gather, combine


def check_dispatch(experts, num_experts, units):
    """The stable sort by (expert, unit, pair), every list padded to 16."""
    top_k = experts.shape[1]
    cu = None if len(units) == 2 else torch.tensor(units, dtype=torch.int32, device=experts.device)
    rows, places, offsets = (t.cpu() for t in moe.dispatch(experts, num_experts, cu))
    expected, starts = [], [0]
    flat = experts.flatten().tolist()
    for e in range(num_experts):
        for first, last in itertools.pairwise(units):
            pairs = [p for p in range(first * top_k, last * top_k) if flat[p] == e]
            expected += pairs + [-1] * (-len(pairs) % moe.TOKEN_STEP)
        starts.append(len(expected))
    assert offsets.tolist() == starts
    assert rows[: starts[-1]].tolist() == expected
    assert rows[starts[-1] :].eq(-1).all()
    for p, place in enumerate(places.flatten().tolist()):
        assert place == (expected.index(p) if 0 <= flat[p] < num_experts else -1)


@pytest.mark.parametrize("most", [launch.FEW_PAIRS, 0])  # a program for each expert, or for some pairs
@pytest.mark.parametrize("tokens", [1, 16, 50, 171, 700])
def test_pairs_are_sorted_by_expert_and_padded(tokens, most, device, monkeypatch):
    monkeypatch.setattr(launch, "FEW_PAIRS", most)
    check_dispatch(distinct(tokens, device, 11, 3), 11, (0, tokens))


def test_a_program_reads_more_pairs_than_at_once(device, monkeypatch):
    """10,000 pairs, of which half have an expert at most, and none may be read twice."""
    monkeypatch.setattr(launch, "FEW_PAIRS", 10_000)
    experts = distinct(5000, device, 9, 2)
    experts[:, 1] = torch.where(experts[:, 1] > 2, 9, experts[:, 1])
    check_dispatch(experts, 9, (0, 5000))


@pytest.mark.parametrize("units", [(0, 16, 64, 90), (0, 0, 32, 32, 90), (0, 80, 90)])
def test_a_units_rows_start_at_a_step(units, device):
    check_dispatch(distinct(90, device, 5, 2), 5, units)


def test_a_pair_without_an_expert_has_no_row_and_adds_nothing(device):
    experts = distinct(40, device, 6, 3)
    experts[3, 1], experts[20] = -1, 6
    check_dispatch(experts, 6, (0, 40))
    dispatched = moe.dispatch(experts, 6)
    x = randn(40, HIDDEN, device=device)
    out = moe.combine(moe.gather(x, dispatched), dispatched)
    assert out[20].eq(0).all()
    assert bits_equal(out[3], (x[3].float() + x[3].float()).to(BF16))


@pytest.mark.parametrize("n_rows", [100, 8195])  # copied one by one on a GPU, and two at a time
def test_a_row_is_its_tokens_or_zeros(n_rows, device):
    x, rows = randn(50, 2048, device=device), torch.randint(-1, 100, (n_rows,), device=device, dtype=torch.int32)
    expected = torch.where((rows >= 0)[:, None], x[rows.clamp_min(0).long() // 2], 0)
    assert bits_equal(launch.launch_gather(x, rows, 2), expected)


def test_slots_are_added_in_order_from_zero_and_rounded_once(device):
    experts = distinct(TOKENS, device)
    dispatched = moe.dispatch(experts, EXPERTS)
    for dtype in (torch.float32, BF16):
        y = randn(dispatched.rows.shape[0], HIDDEN, dtype=dtype, device=device)
        slots = y[dispatched.places.long()].float().unbind(1)
        expected = functools.reduce(torch.add, slots, torch.zeros_like(slots[0]))
        assert bits_equal(moe.combine(y, dispatched), expected.to(dtype))
        if dtype == torch.float32:  # negative control
            assert not bits_equal(moe.combine(y, dispatched), functools.reduce(torch.add, slots[::-1]))
    assert moe.combine(-torch.zeros_like(y), dispatched).signbit().sum() == 0


def test_gather_and_combine_are_each_others_gradient(device):
    dispatched = moe.dispatch(distinct(20, device), EXPERTS)
    x = torch.randn(20, 24, device=device, requires_grad=True)
    y = torch.randn(dispatched.rows.shape[0], 24, device=device, requires_grad=True)
    assert bits_equal(torch.autograd.grad(moe.gather(x, dispatched), x, y.detach())[0], moe.combine(y, dispatched))
    assert bits_equal(torch.autograd.grad(moe.combine(y, dispatched), y, x.detach())[0], moe.gather(x, dispatched))


# --------------------------------------------------------------------------------------------------------------
# grouped_linear

COUNTS = [(30, 0, 17, 1, 0), (0, 0, 80, 0, 0), (3, 3, 3, 3, 3), (0,) * 5]


def grouped(counts, dtype, device, extra=6, n=56, k=64):
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    x = randn(sum(counts) + extra, k, dtype=dtype, device=device)
    return x, randn(len(counts), n, k, dtype=dtype, device=device, scale=k**-0.5), offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_a_row_has_the_bits_of_linear_with_its_experts_weight(counts, dtype, device):
    x, weight, offsets = grouped(counts, dtype, device)
    x.requires_grad_(), weight.requires_grad_()
    out = moe.grouped_linear(x, weight, offsets)
    g = randn(*out.shape, dtype=dtype, device=device)
    dx, dw = torch.autograd.grad(out, (x, weight), g)
    ends = offsets.tolist()
    for e, rows in enumerate(slice(a, b) for a, b in itertools.pairwise(ends)):
        part, w = x[rows].detach().requires_grad_(), weight[e].detach().requires_grad_()
        alone = matmul.linear(part, w)
        assert bits_equal(out[rows], alone)
        for ours, theirs in zip((dx[rows], dw[e]), torch.autograd.grad(alone, (part, w), g[rows]), strict=True):
            assert bits_equal(ours, theirs)
    assert out[ends[-1] :].eq(0).all()
    assert dx[ends[-1] :].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_matches_fp64(dtype, device):
    x, weight, offsets = grouped((30, 0, 17, 1, 0), dtype, device)
    errors = gradient_errors(
        lambda x, w: moe.grouped_linear(x, w, offsets),
        lambda x, w: reference.grouped_linear(x, w, offsets),
        {"x": x, "w": weight},
    )
    assert all(e.ok for e in errors), errors


def test_rows_read_as_another_experts_are_caught(device):
    """Negative control of the comparison above: the boundary of two experts off by one row."""
    x, weight, offsets = grouped((16, 16), BF16, device)
    moved = offsets + torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    assert not bits_equal(moe.grouped_linear(x, weight, offsets), moe.grouped_linear(x, weight, moved))


@pytest.mark.parametrize("aligned", [False, True])
def test_main_grad_is_carried_on_and_an_expert_without_rows_keeps_its_sum(aligned, device):
    x, weight, offsets = grouped((32, 0, 16), torch.float32, device)
    weight.requires_grad_()
    buffer = torch.randn(weight.shape, device=device)
    before = buffer.clone()
    buffer[1] = torch.nan  # read by nobody
    out = moe.grouped_linear(x, weight, offsets, buffer, aligned=aligned)
    out.backward(randn(*out.shape, dtype=torch.float32, device=device))
    assert weight.grad is None
    assert buffer[1].isnan().all()
    assert not bits_equal(buffer[0], before[0])
    lazy = MainGrad(weight.shape, weight.device)
    moe.grouped_linear(x, weight, offsets, lazy, aligned=aligned).sum().backward()
    assert lazy.collect()[1].eq(0).all()


# --------------------------------------------------------------------------------------------------------------
# experts


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_match_fp64(dtype, device):
    # In fp32 one sum of thousands is less exact than a library's several; of a hundred it is not.
    most = 128 if dtype == torch.float32 else HIDDEN
    inputs = layer(dtype=dtype, device=device, width=min(HIDDEN, most), size=min(SIZE, most))
    chosen = inputs.pop("experts")
    errors = gradient_errors(
        lambda h, gate_up, down, weights: moe.experts(h, gate_up, down, weights, chosen),
        lambda h, gate_up, down, weights: reference.experts(h, gate_up, down, weights, chosen),
        inputs,
    )
    assert [e for e in errors if not e.ok] == []


def test_every_rounding_step_is_vllms(device):
    """Spelled out for one token after another; the routing weight multiplies the accumulator before it is rounded."""
    inputs = layer(12, dtype=BF16, device=device)
    hidden, gate_up, down, weights, chosen = inputs.values()
    outs, late = [], []
    for t in range(12):
        total, total_late = torch.zeros(2, HIDDEN, device=device).unbind()
        for slot, e in enumerate(chosen[t].tolist()):
            gate, up = matmul.linear(hidden[t : t + 1], gate_up[e]).float().chunk(2, -1)
            h = (torch.nn.functional.silu(gate).to(BF16).float() * up).to(BF16)
            accumulator = matmul.linear(h.float(), down[e].float())[0]
            total = total + (accumulator * weights[t, slot]).to(BF16).float()
            total_late = total_late + (accumulator.to(BF16).float() * weights[t, slot]).to(BF16).float()
        outs.append(total.to(BF16))
        late.append(total_late.to(BF16))
    out = moe.experts(**inputs)
    torch.testing.assert_close(out, torch.stack(outs), rtol=1e-2, atol=1e-2)
    if runtime.INTERPRET:  # a GPU multiplies fp32 in another order than bf16
        assert bits_equal(out, torch.stack(outs))
        assert not bits_equal(out, torch.stack(late))  # negative control


def test_a_token_does_not_depend_on_the_batch(device):
    inputs = layer(device=device)
    shared = {n: inputs.pop(n) for n in ("gate_up", "down")}
    g = randn(TOKENS, HIDDEN, device=device)

    def run(hidden, weights, chosen, g):
        found = gradients({"hidden": hidden, **shared, "weights": weights, "experts": chosen}, g)
        return found[0], found[1], found[4]

    rows = (*inputs.values(), g)
    counts = ((1, 17, TOKENS),) if runtime.INTERPRET else ()
    assert row_variant(run, rows, *counts) == []
    assert order_variant(run, rows, trials=1) == []


def test_a_layer_that_drops_tokens_is_caught(device):
    """Negative control: an expert that takes 16 tokens and no more."""
    inputs = layer(device=device)

    def limited(hidden, weights, chosen):
        chosen = chosen.clone()
        for e in range(EXPERTS):
            taken = (chosen == e).nonzero()[16:]
            chosen[taken[:, 0], taken[:, 1]] = -1
        return moe.experts(hidden, inputs["gate_up"], inputs["down"], weights, chosen)

    assert row_variant(limited, (inputs["hidden"], inputs["weights"], inputs["experts"]), (1, TOKENS)) == [1]


@pytest.mark.parametrize("kind", ["one expert has all rows", "no tokens", "one token"])
def test_skewed_and_empty_batches(kind, device):
    tokens = {"no tokens": 0, "one token": 1}.get(kind, 40)
    chosen = distinct(tokens, device)
    if kind.startswith("one expert"):
        chosen[:, 0], chosen[:, 1:] = 2, -1
    inputs = layer(tokens, torch.float32, device, chosen)
    found = gradients(inputs, torch.ones(tokens, HIDDEN, device=device))
    double = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    leaves = {n: t.requires_grad_() for n, t in double.items() if t.is_floating_point()}
    out = reference.experts(**double)
    expected = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    for ours, theirs in zip(found, (out, *expected), strict=True):
        theirs = torch.zeros_like(ours).double() if theirs is None else theirs
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_results_are_the_same_on_every_run(device):
    inputs, g = layer(device=device), randn(TOKENS, HIDDEN, device=device)
    assert rerun_variant(lambda: gradients(inputs, g), RERUNS) == []


UNITS = (0, 16, 48, TOKENS)


def carried(inputs, g, cuts, units=UNITS):
    """The sums for gate_up and down over micro-batches that are cut at these tokens."""
    buffers = [torch.zeros(inputs[n].shape, device=g.device) for n in ("gate_up", "down")]
    for first, last in zip((0, *cuts), (*cuts, TOKENS), strict=True):
        own = [min(max(u, first), last) - first for u in units]
        own = sorted(set(own)) if last > first else own
        part = {n: inputs[n][first:last] if n in ("hidden", "weights", "experts") else inputs[n] for n in inputs}
        part = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in part.items()}
        cu = torch.tensor(own, dtype=torch.int32, device=g.device)
        options = {"gate_up_main_grad": buffers[0], "down_main_grad": buffers[1]}
        moe.experts(**part, cu_units=cu, **options).backward(g[first:last])
        assert part["gate_up"].grad is None
    return buffers


def test_weight_gradients_do_not_depend_on_cuts_between_units(device):
    inputs, g = layer(device=device), randn(TOKENS, HIDDEN, device=device)
    whole = carried(inputs, g, ())
    for cuts in ((16,), (16, 48)):
        for ours, theirs in zip(carried(inputs, g, cuts), whole, strict=True):
            assert bits_equal(ours, theirs), cuts
    # Negative control: cut inside a unit, where an expert's rows do not end at a step.
    assert not all(bits_equal(a, b) for a, b in zip(carried(inputs, g, (32,), (0, TOKENS)), whole, strict=True))


def test_one_pass_has_the_bits_of_the_ordinary_gradient(device):
    inputs, g = layer(device=device), randn(TOKENS, HIDDEN, device=device)
    cu = torch.tensor(UNITS, dtype=torch.int32, device=device)
    found = gradients(inputs, g, cu_units=cu)
    for ours, sums in zip(found[2:4], carried(inputs, g, ()), strict=True):
        assert bits_equal(ours, sums.to(BF16))


def test_master_weights_are_rounded_and_their_gradients_are_fp32(device):
    inputs, g = layer(device=device), randn(TOKENS, HIDDEN, device=device)
    masters = inputs | {n: inputs[n].float() for n in ("gate_up", "down")}
    ours, theirs = gradients(masters, g), gradients(inputs, g)
    assert [t.dtype for t in ours[2:4]] == [torch.float32] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert bits_equal(a.to(b.dtype), b)


def test_a_layer_compiles(device):
    inputs, g = layer(device=device), randn(TOKENS, HIDDEN, device=device)

    def run(hidden, logits, gate_up, down):
        weights, chosen = moe.router(logits, TOP_K)
        return moe.experts(hidden, gate_up, down, weights, chosen)

    def with_gradients(fn):
        given = (inputs["hidden"], randn(TOKENS, EXPERTS, device=device), inputs["gate_up"], inputs["down"])
        leaves = [t.clone().requires_grad_() for t in given]
        out = fn(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, g)]

    torch.manual_seed(1)
    expected = with_gradients(run)
    torch.manual_seed(1)
    found = with_gradients(torch.compile(run, fullgraph=True, backend=BACKEND))
    for a, b in zip(found, expected, strict=True):
        assert bits_equal(a, b)


def test_operators_are_registered(device):
    inputs = layer(20, torch.float32, device)
    logits = torch.randn(20, EXPERTS, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.bi_ops.moe_router, (logits, TOP_K, True))
    rows, places, offsets = moe.dispatch(inputs["experts"], EXPERTS)
    torch.library.opcheck(torch.ops.bi_ops.moe_dispatch, (inputs["experts"], EXPERTS, None))
    x = inputs["hidden"].clone().requires_grad_()
    torch.library.opcheck(torch.ops.bi_ops.moe_gather, (x, rows, places))
    y = torch.randn(rows.shape[0], HIDDEN, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.bi_ops.moe_combine, (y, rows, places))
    torch.library.opcheck(torch.ops.bi_ops.grouped_matmul, (y.detach(), inputs["gate_up"], offsets))
    operands = [inputs[name] for name in ("hidden", "gate_up", "down", "weights", "experts")]
    torch.library.opcheck(torch.ops.bi_ops.moe_experts, (*operands, None))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(4)}, ValueError, "hidden must have 2 dimensions"),
    ({"gate_up": torch.zeros(EXPERTS, 2 * SIZE + 1, HIDDEN)}, ValueError, "must be even"),
    ({"gate_up": torch.zeros(EXPERTS, 2 * SIZE, HIDDEN + 1)}, ValueError, "gate_up must be"),
    ({"down": torch.zeros(EXPERTS + 1, HIDDEN, SIZE)}, ValueError, "down"),
    ({"down": torch.zeros(EXPERTS, HIDDEN, SIZE, dtype=torch.float16)}, TypeError, "dtypes differ"),
    ({"weights": torch.zeros(4, TOP_K, dtype=BF16)}, TypeError, "weights"),
    ({"weights": torch.zeros(5, TOP_K)}, ValueError, "weights"),
    ({"experts": torch.zeros(4, TOP_K, dtype=torch.int64)}, TypeError, "experts"),
    ({"cu_units": torch.zeros(1, dtype=torch.int32)}, ValueError, "cu_units"),
    ({"down_main_grad": torch.zeros(2, 2)}, ValueError, "down_main_grad"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_named(changes, error, message, device):
    inputs: dict[str, Any] = layer(4, torch.float32, device)
    with pytest.raises(error, match=f"^experts: .*{message}"):
        moe.experts(**(inputs | {n: t.to(device) for n, t in changes.items()}))


def test_bad_calls_of_the_parts_are_named(device):
    logits = torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="router: top_k is 9"):
        moe.router(logits, 9)
    with pytest.raises(TypeError, match="gather: dispatched"):
        moe.gather(logits, cast(Any, None))
    with pytest.raises(ValueError, match="grouped_linear: offsets"):
        moe.grouped_linear(logits, logits[None], torch.zeros(3, dtype=torch.int32, device=device))
    offsets = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(NotImplementedError, match="grouped_linear"):
        torch.func.vmap(lambda x: moe.grouped_linear(x, logits[None], offsets))(logits[None])
