"""The optimizer step: AdamW's bits, and a gradient norm whose bits depend on shapes alone."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from bi_ops import optim
from bi_ops.core import runtime
from bi_ops.optim import adamw, config, ops, order, reference, tables
from bi_ops.rl import checkpoint

#: A matrix, a norm's weight, rows of several spans, rows that 16 bytes do not divide, three axes, a scalar, nothing.
SHAPES: tuple[tuple[int, ...], ...] = ((300, 256), (128,), (2, 5000), (1, 9002), (33, 3, 4), (), (0, 4), (1001,))
if not runtime.INTERPRET:
    SHAPES += ((4096, 1024), (1024, 12288), (70000, 96))
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
RERUNS = 2 if runtime.INTERPRET else 50


def gradients(device, shapes=SHAPES):
    return [torch.randn(s, device=device) for s in shapes]


def parameters(device, shapes=SHAPES):
    return [torch.nn.Parameter(t) for t in gradients(device, shapes)]


def give_grads(*lists):
    """The same new gradients for the parameters of each list."""
    for same in zip(*lists, strict=True):
        g = torch.randn_like(same[0])
        for p in same:
            p.grad = g.clone()


def state_of(optimizer, p):
    return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]


def same_bits(left, right):
    """Equal bits, also of zeros of either sign."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(left, right, strict=True))


# --------------------------------------------------------------------------------------------------------------
# the norm


def test_the_norm_is_right(device):
    grads = gradients(device)
    exact = reference.global_norm([g.double() for g in grads])
    norm = optim.global_norm(grads)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert abs(norm.double() / exact - 1) < 2**-22


def test_the_norm_keeps_the_order_that_is_spelled_out(device):
    how = order.order_of()
    for grads in (gradients(device), *([g] for g in gradients(device))):
        assert same_bits([optim.global_norm(grads)], [reference.ordered_norm(grads, how.lanes, how.span)])


def test_another_order_has_other_bits(device):
    """Negative control: lanes and span are the order. Seen in the rows, of which few sums make a norm round alike."""
    (g,) = gradients(device, ((40, 5000),))
    one = order.order_of()

    def sums(how):
        rows = tables.Rows(g.numel(), 5000)
        spans, _ = ops.launch_square_sums(g, [g], (rows,), True, how, config.norm(1))
        return [reference._pairwise(spans[: rows.spans(how)].view(40, -1))]

    assert same_bits(sums(one), optim.row_sums([g]))
    assert not same_bits(sums(order.NormOrder(lanes=one.lanes // 4)), sums(one))
    assert not same_bits(sums(order.NormOrder(span=one.span // 4)), sums(one))


def test_no_config_changes_a_bit_of_the_norm(device):
    """Nor of each parameter's sum, where the square root hides nothing."""
    grads = gradients(device)
    how = order.order_of()
    rows = tuple(tables.rows_of(g.shape, how) for g in grads)

    def sums(choice):
        tiles, counts = ops.launch_square_sums(grads[0], grads, rows, False, how, choice)
        return [reference._pairwise(t) for t in tiles.split(counts) if t.numel()]

    expected, norm = sums(config.norm(1)), optim.global_norm(grads)
    for rows_, width, warps in ((2, 256, 4), (8, 4, 8), (32, 64, 8)):
        choice = config.NormConfig(rows=rows_, num_warps=warps, width=width, tree_warps=1)
        assert same_bits(sums(choice), expected), choice
        assert same_bits([ops.launch_norm(grads, config=choice)], [norm]), choice


def test_reruns_and_addresses_change_no_bit_of_the_norm(device):
    """A view at an odd address is read 4 bytes at once."""
    grads = gradients(device)
    expected = optim.global_norm(grads)
    for i in range(RERUNS):
        flat = [torch.empty(g.numel() + 8, device=device)[i % 5 :][: g.numel()].view(g.shape).copy_(g) for g in grads]
        assert same_bits([optim.global_norm(flat)], [expected])
        assert same_bits(
            [optim.global_norm([g for pair in zip(flat, grads, strict=True) for g in pair][::2])], [expected]
        )


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_rows_spread_over_ranks_give_the_bits_of_whole_gradients(ranks, device):
    grads = [g for g in gradients(device) if g.ndim]
    shards = [[g.chunk(ranks)[r] for g in grads if r < len(g.chunk(ranks))] for r in range(ranks)]
    assert sum(g.numel() for shard in shards for g in shard) == sum(g.numel() for g in grads)
    by_parameter = [[optim.row_sums([part])[0] for part in g.chunk(ranks)] for g in grads]
    whole = [torch.cat(parts) for parts in by_parameter]
    assert same_bits(whole, optim.row_sums(grads))
    assert same_bits([optim.norm_of_row_sums(whole)], [optim.global_norm(grads)])


def test_norms_of_shards_do_not_give_the_bits_of_whole_gradients(device):
    """Negative control: torch's norm, and ours, of each rank's shards, and then of these norms."""
    differs = {"torch": False, "ours": False}
    for _ in range(8):
        grads = gradients(device, ((30, 256), (27, 100)))
        shards = [[g.chunk(3)[rank] for g in grads] for rank in range(3)]
        for name, norm in (("torch", torch.nn.utils.get_total_norm), ("ours", optim.global_norm)):
            of_shards = torch.stack([norm(shard) for shard in shards]).square().sum().sqrt()
            differs[name] |= not same_bits([of_shards], [norm(grads)])
    assert differs == {"torch": True, "ours": True}


def test_the_order_of_the_list_counts_and_empty_gradients_do_not(device):
    grads = gradients(device, ((40, 40), (40, 41), (3,)))
    assert same_bits([optim.global_norm([*grads, grads[0][:0]])], [optim.global_norm(grads)])
    assert optim.global_norm([]).item() == 0.0
    assert optim.global_norm([grads[0][:0]]).item() == 0.0
    assert optim.row_sums([grads[0][:0], grads[0].new_zeros(3, 0)])[1].tolist() == [0.0, 0.0, 0.0]
    assert optim.norm_of_row_sums([]).item() == 0.0


def test_many_parameters_and_many_rows_take_more_launches_and_the_same_tree(device):
    grads = gradients(device, [(3,)] * 40 + [(70, 130)])
    how = order.order_of()
    launches = tables.tree((1,) * 40 + (9,), 4, torch.device("cpu"))
    assert [len(t) for t in launches] == [43, 41, 11, 3, 1]
    found = ops.launch_norm(grads, config=config.NormConfig(rows=8, num_warps=4, width=4, tree_warps=1))
    assert same_bits([found], [reference.ordered_norm(grads, how.lanes, how.span)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (1, 127), (3, -1)])
def test_what_is_not_finite_is_seen(bad, where, device):
    grads = gradients(device)
    grads[where[0]].view(-1)[where[1]] = bad
    norm = optim.global_norm(grads).item()
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    again = optim.norm_of_row_sums(optim.row_sums(grads)).item()
    assert math.isnan(again) if math.isnan(bad) else again == math.inf


# --------------------------------------------------------------------------------------------------------------
# clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torch_clipping(max_norm, device):
    ours, theirs = parameters(device), parameters(device)
    give_grads(ours, theirs)
    before = [p.grad.clone() for p in ours]
    ours[1].grad = theirs[1].grad = None
    norm = optim.clip_grad_norm_(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    scale = optim.clip_scale(norm, max_norm)
    for p, q, g in zip(ours, theirs, before, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
            assert same_bits([p.grad], [g * scale])
    assert (scale.item() == 1.0) == (max_norm > 1000)


def test_clipping_bumps_the_version_of_the_gradients(device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    p.grad = torch.ones(4, device=device)
    before = p.grad._version
    assert optim.clip_grad_norm_(p, 1.0).item() == 2.0
    assert p.grad._version == before + 1


def test_a_norm_that_is_not_finite_raises_where_that_is_asked_for(device):
    (p,) = parameters(device, ((4, 4),))
    p.grad = torch.full((4, 4), math.inf, device=device)
    with pytest.raises(FloatingPointError, match=r"clip_grad_norm_: the norm of 1 gradients is inf"):
        optim.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad.isinf().all()
    assert optim.clip_grad_norm_([p], 1.0).item() == math.inf
    assert p.grad.isnan().all()  # inf * 0, as torch's


def test_nothing_to_clip(device):
    assert optim.clip_grad_norm_([], 1.0).item() == 0.0
    assert optim.clip_grad_norm_(parameters(device), 1.0).item() == 0.0


# --------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_has_the_bits_of_torch_on_a_gpu_spelled_out(betas, weight_decay, device):
    hyper = HYPER | {"betas": betas, "weight_decay": weight_decay}
    ours = parameters(device)
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    optimizer = optim.AdamW(ours, **hyper)
    for step in range(1, 5):
        give_grads(ours)
        optimizer.step()
        for i, p in enumerate(ours):
            x, m, v = (t.detach() for t in reference.adamw(expected[i][0], p.grad, *expected[i][1:], step, **hyper))
            expected[i] = x, m, v
            assert same_bits(state_of(optimizer, p), expected[i]), (i, step)


def test_adamw_is_torch_adamw_but_for_the_last_bits(device):
    """torch's CPU kernels take other products first; on a GPU see the test below."""
    ours, theirs = parameters(device), parameters(device)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    mine, other = optim.AdamW(ours, **HYPER), torch.optim.AdamW(theirs, foreach=False, **HYPER)
    for _ in range(5):
        give_grads(ours, theirs)
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        for a, b in zip(state_of(mine, p), state_of(other, q), strict=True):
            torch.testing.assert_close(a, b, rtol=4e-7, atol=2e-7)
    assert same_bits([mine.state[ours[0]]["exp_avg"]], [other.state[theirs[0]]["exp_avg"]])


@pytest.mark.gpu
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
def test_adamw_has_the_bits_of_torch_on_a_gpu(betas, device):
    ours, theirs = parameters(device), parameters(device)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    hyper = HYPER | {"betas": betas}
    mine, other = optim.AdamW(ours, **hyper), torch.optim.AdamW(theirs, foreach=False, fused=False, **hyper)
    for step in range(20):
        give_grads(ours, theirs)
        scale = torch.tensor(0.3, device=device)
        for q in theirs:
            q.grad.mul_(scale)
        mine.step(grad_scale=scale)
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert same_bits(state_of(mine, p), state_of(other, q)), (list(p.shape), step)


def test_adamw_is_as_accurate_as_torch(device):
    """Errors against fp64, after steps on the same gradients."""
    ours, theirs = parameters(device, ((200, 300),)), parameters(device, ((200, 300),))
    theirs[0].data.copy_(ours[0].data)
    x, m, v = ours[0].detach().double(), *(torch.zeros(200, 300, dtype=torch.float64, device=device) for _ in range(2))
    mine, other = optim.AdamW(ours, **HYPER), torch.optim.AdamW(theirs, foreach=False, **HYPER)
    for step in range(1, 6):
        give_grads(ours, theirs)
        mine.step()
        other.step()
        x, m, v = reference.adamw(x, ours[0].grad.double(), m, v, step, **HYPER)
    errors = [(p.detach().double() - x).abs().max().item() for p in (ours[0], theirs[0])]
    assert errors[0] <= max(2 * errors[1], 1e-6)


def test_groups_and_parameters_without_a_gradient(device):
    """Decay and rate are the group's; a parameter that joins later counts its own steps."""
    ours, theirs = parameters(device, ((20, 30), (128,), (40,))), parameters(device, ((20, 30), (128,), (40,)))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)

    def make(cls, ps):
        return cls([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0, "lr": 0.1}], foreach=False, **HYPER)

    mine, other = make(optim.AdamW, ours), make(torch.optim.AdamW, theirs)
    for step in range(4):
        give_grads(ours, theirs)
        if step < 2:
            ours[2].grad = theirs[2].grad = None
        untouched = ours[2].detach().clone()
        mine.step()
        other.step()
        assert (step < 2) == same_bits([ours[2].detach()], [untouched])
    assert [mine.state[p]["step"].item() for p in ours] == [4.0, 4.0, 2.0]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_schedule_is_followed(device):
    ours, theirs = parameters(device, ((20, 30),)), parameters(device, ((20, 30),))
    theirs[0].data.copy_(ours[0].data)
    mine, other = optim.AdamW(ours, **HYPER), torch.optim.AdamW(theirs, foreach=False, **HYPER)
    rates = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (mine, other)]
    for _ in range(3):
        give_grads(ours, theirs)
        for o, rate in zip((mine, other), rates, strict=True):
            o.step()
            rate.step()
    assert mine.param_groups[0]["lr"] == HYPER["lr"] / 8
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_no_config_and_no_split_changes_a_bit_of_adamw(device):
    (p,) = parameters(device, ((64, 128),))
    g, m, v = torch.randn_like(p), torch.randn_like(p), torch.rand_like(p)
    hyper = adamw.Hyper.of(HYPER, 3)

    def run(block, blocks, cut, offset=0):
        """p, m and v after a step, in parts, at an address of `offset` elements."""
        flat = [torch.empty(p.numel() + offset, device=device)[offset:].view(p.shape) for _ in range(4)]
        for t, value in zip(flat, (p.detach(), g, m, v), strict=True):
            t.copy_(value)
        parts = zip(*(t.split(cut) for t in flat), strict=True)
        how = config.ElementwiseConfig(block, blocks, 4)
        columns = adamw.Columns.of(adamw.Tensors(a, b, c, d, None) for a, b, c, d in parts)
        adamw.launch_adamw(flat[0], columns, hyper, None, False, how)
        return flat[0], flat[2], flat[3]

    expected = run(8192, 1, 64)
    for block, blocks, cut, offset in ((1024, 4, 64, 0), (512, 1, 64, 0), (2048, 2, 7, 0), (4096, 1, 64, 1)):
        assert same_bits(run(block, blocks, cut, offset), expected), (block, blocks, cut, offset)


def test_a_scale_in_the_pass_is_a_scale_before_it(device):
    """The gradient stays as it is; clipping costs no pass of its own."""
    ours, theirs = parameters(device), parameters(device)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    give_grads(ours, theirs)
    before = [p.grad.clone() for p in ours]
    mine, other = optim.AdamW(ours, **HYPER), optim.AdamW(theirs, **HYPER)
    mine.step(grad_scale=optim.clip_scale(optim.global_norm([p.grad for p in ours]), 1.0))
    optim.clip_grad_norm_(theirs, 1.0)
    other.step()
    for p, q, g in zip(ours, theirs, before, strict=True):
        assert same_bits(state_of(mine, p), state_of(other, q))
        assert same_bits([p.grad], [g])
    assert not same_bits([ours[0].grad], [theirs[0].grad])


def test_bf16_copies_and_zeroed_gradients_come_with_the_pass(device):
    ours = parameters(device)
    copies = {p: torch.empty(p.shape, dtype=torch.bfloat16, device=device) for p in ours[::2]}
    optimizer = optim.AdamW(ours, bf16_copies=copies, **HYPER)
    give_grads(ours)
    versions = [(p._version, p.grad._version) for p in ours]
    given = [p.grad.clone() for p in ours]
    optimizer.step()
    for p, g, (version, grad_version) in zip(ours, given, versions, strict=True):
        assert p._version > version
        assert p.grad._version == grad_version
        assert torch.equal(p.grad, g)
        if p in copies:
            assert torch.equal(copies[p], p.detach().bfloat16())
    optimizer.step(zero_grad=True)
    for p, (_, grad_version) in zip(ours, versions, strict=True):
        assert p.grad.count_nonzero() == 0
        assert p.grad._version > grad_version
        if p in copies:
            assert torch.equal(copies[p], p.detach().bfloat16())
    assert "bf16_copies" not in optimizer.state_dict()


def test_a_closure_is_called_with_gradients_enabled(device):
    (p,) = parameters(device, ((5,),))
    optimizer = optim.AdamW([p], **HYPER)
    before = p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert not torch.equal(p, before)


# --------------------------------------------------------------------------------------------------------------
# state


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_state_goes_to_torch_and_comes_back(options, device):
    """Two steps here, two there, two here again; as six of torch's."""
    ours, theirs, alone = (parameters(device, ((20, 30), (128,), (9,))) for _ in range(3))
    for p, q, r in zip(ours, theirs, alone, strict=True):
        q.data.copy_(p.data)
        r.data.copy_(p.data)
    mine, other = optim.AdamW(ours, **HYPER), torch.optim.AdamW(theirs, **HYPER, **options)
    only = torch.optim.AdamW(alone, foreach=False, **HYPER)

    def steps(optimizer):
        for _ in range(2):
            give_grads(ours, theirs, alone)
            optimizer.step()
            only.step()

    def hand_over(source, sink, from_, to):
        saved = copy.deepcopy(source.state_dict())
        assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        sink.load_state_dict(saved)
        for p, q in zip(from_, to, strict=True):
            q.data.copy_(p.data)

    assert mine.state_dict()["param_groups"][0].keys() == other.state_dict()["param_groups"][0].keys()
    steps(mine)
    hand_over(mine, other, ours, theirs)
    steps(other)
    hand_over(other, mine, theirs, ours)
    steps(mine)
    for p, r in zip(ours, alone, strict=True):
        assert mine.state[p]["step"].item() == 6.0
        assert mine.state[p]["step"].device.type == "cpu"
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-6)
    assert mine.param_groups[0]["fused"] is False
    assert mine.param_groups[0]["foreach"] is False


def test_a_checkpoint_of_a_run_holds_its_state(device, tmp_path):
    """Two steps after a checkpoint, and two after it was read: the same bits."""

    def make():
        model = torch.nn.Linear(12, 20, device=device)
        return model, optim.AdamW(model.parameters(), **HYPER)

    (model, optimizer), (other, resumed) = make(), make()
    give_grads(list(model.parameters()))
    optimizer.step()
    checkpoint.load(checkpoint.save(tmp_path, 1, model, optimizer, {}), other, resumed)
    for _ in range(2):
        give_grads(list(model.parameters()), list(other.parameters()))
        optimizer.step()
        resumed.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(state_of(optimizer, p), state_of(resumed, q))
        assert resumed.state[q]["step"].item() == 3.0


def test_a_copied_optimizer_goes_on_and_has_no_engine(device):
    ours = parameters(device, ((20, 30),))
    copies = {ours[0]: torch.empty(20, 30, dtype=torch.bfloat16, device=device)}
    optimizer = optim.AdamW(ours, bf16_copies=copies, **HYPER)
    give_grads(ours)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    other = twin.param_groups[0]["params"]
    give_grads(ours, other)
    optimizer.step()
    twin.step()
    assert twin.bf16_copies == {}
    assert same_bits(state_of(optimizer, ours[0]), state_of(twin, other[0]))


# --------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("name", sorted(adamw.REFUSED))
def test_options_of_torch_are_refused_by_name(name, device):
    with pytest.raises(ValueError, match=rf"AdamW: {name}=True is not supported: .*use torch.optim.AdamW"):
        optim.AdamW(parameters(device), **cast(Any, {name: True}))


def test_a_state_of_amsgrad_is_refused(device):
    theirs = torch.optim.AdamW(parameters(device), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        optim.AdamW(parameters(device)).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("hyper", "error"),
    [
        ({"lr": -1.0}, "AdamW: lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "AdamW: betas is"),
        ({"eps": -1e-8}, "AdamW: eps is"),
        ({"weight_decay": -0.1}, "AdamW: weight_decay is"),
    ],
)
def test_numbers_out_of_range_are_refused(hyper, error, device):
    with pytest.raises(ValueError, match=error):
        optim.AdamW(parameters(device), **hyper)


def test_a_tensor_as_learning_rate_is_refused(device):
    with pytest.raises(TypeError, match=r"AdamW: lr must be a number.*float\(...\)"):
        optim.AdamW(parameters(device), lr=cast(Any, torch.tensor(1e-3)))


def test_gradients_that_the_norm_cannot_read_are_refused(device):
    good = torch.randn(4, 6, device=device)
    refused: tuple[tuple[Any, type[Exception], str], ...] = (
        (good.bfloat16(), TypeError, r"gradient 1 is bfloat16\[4, 6\].*must be float32.*\.to\("),
        (good.t(), ValueError, r"gradient 1 \[6, 4\] has strides \[1, 6\].*\.contiguous\(\)"),
        (good.to_sparse(), TypeError, r"gradient 1 .*to_dense"),
        (good.to("meta"), TypeError, r"gradient 1 .*plain memory"),
        (3.0, TypeError, "gradient 1 must be a tensor"),
    )
    for bad, error, words in refused:
        for call in (optim.global_norm, optim.row_sums):
            with pytest.raises(error, match=rf"{call.__name__}: {words}"):
                call([good, bad])
    with pytest.raises(ValueError, match="norm_of_row_sums: the sums of parameter 0 must have 1 dimensions"):
        optim.norm_of_row_sums([good])
    with pytest.raises(ValueError, match="clip_scale: max_norm is -1"):
        optim.clip_scale(torch.tensor(1.0, device=device), -1)


def test_parameters_that_adamw_cannot_update_are_refused_before_anything_is_written(device):
    good, bad = parameters(device, ((4, 6), (4, 6)))
    for data, error, words in (
        (bad.detach().bfloat16(), TypeError, r"parameter 1 of group 0 is bfloat16\[4, 6\].*must be float32"),
        (bad.detach().t(), ValueError, r"parameter 1 of group 0 \[6, 4\] has strides"),
    ):
        wrong = torch.nn.Parameter(data)
        optimizer = optim.AdamW([good, wrong], **HYPER)
        give_grads([good], [good])
        wrong.grad = torch.randn_like(wrong)
        before = good.detach().clone()
        with pytest.raises(error, match=f"AdamW: {words}"):
            optimizer.step()
        assert same_bits([good.detach()], [before])
        assert optimizer.state[good]["step"].item() == 0.0


def test_what_goes_with_a_parameter_must_fit_it(device):
    (p,) = parameters(device, ((4, 6),))
    p.grad = torch.randn_like(p)
    copies = {p: torch.empty(6, 4, dtype=torch.bfloat16, device=device)}
    with pytest.raises(ValueError, match=r"bf16 copy of parameter 0 of group 0 is \[6, 4\].*must be \[4, 6\]"):
        optim.AdamW([p], bf16_copies=copies).step()
    with pytest.raises(TypeError, match=r"bf16 copy of parameter 0 of group 0 is float32\[4, 6\].*must be bfloat16"):
        optim.AdamW([p], bf16_copies={p: torch.empty(4, 6, device=device)}).step()
    with pytest.raises(ValueError, match=r"a copy for a tensor \[4, 6\] that is no parameter"):
        optim.AdamW([p], bf16_copies={torch.empty(4, 6): copies[p]})
    with pytest.raises(ValueError, match=r"grad_scale is \[2\]"):
        optim.AdamW([p]).step(grad_scale=torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"grad_scale is float64"):
        optim.AdamW([p]).step(grad_scale=torch.ones((), dtype=torch.float64, device=device))


def test_numbers_reach_the_kernel_rounded_as_torch_rounds_them():
    hyper = adamw.Hyper.of(HYPER, 7)
    assert hyper.decay == 1 - 1e-2 * 0.1
    assert hyper.rsqrt_bias2 == float(np.float32(1) / np.float32((1 - 0.999**7) ** 0.5))
    assert not hyper.lerp_back
    assert hyper.lerp == float(np.float32(1 - 0.9))
    assert adamw.Hyper.of(HYPER | {"betas": (0.25, 0.9)}, 1).lerp == -0.25
