"""The gradient of a tied table: of its own sum only the rows that a step touched, added to the head's sum."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_step_graphs import Direct, coarse, differing, gradients, step_of, through  # noqa: F401  (a fixture)
from tiny import tiny_model
from torch import nn

import bi_ops
from bi_ops.core import runtime
from bi_ops.embedding import ops
from bi_ops.embedding.config import TileConfig
from bi_ops.embedding.shards import accumulate_rows
from bi_ops.embedding.tied import add_touched_rows
from bi_ops.matmul import TOKEN_STEP, accumulate_weight_grad
from bi_ops.models.graphs import StepGraphs
from bi_ops.nn import MainGrad
from bi_ops.nn.main_grad import main_grad_memory
from bi_ops.verify.properties import bits_equal

V, D = (40, 24) if runtime.INTERPRET else (3000, 256)
PADDING = 3
#: Ids repeat within micro-batches and between them; most of the rows of the table belong to none.
IDS = [[5, 1, 5, V - 1] * 4, [PADDING, 5, 7, 7] * 4, [0, 0, 9, 1] * 4]
INSIDE = [0, 1, 5, 7, 9, V - 1]


class Tied(nn.Module):
    """An embedding and a head; first: which of the two stands first. more: another table of the same weight."""

    def __init__(self, device: torch.device, first: str = "embed", more: bool = False, tied: bool = True) -> None:
        super().__init__()
        made = {
            "embed": bi_ops.nn.Embedding(V, D, padding_idx=PADDING, device=device),
            "head": bi_ops.nn.Linear(D, V, bias=False, device=device),
        }
        for name in (first, *(made.keys() - {first})):
            self.add_module(name, made[name])
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(1)))
        if tied:
            self.head.weight = self.embed.weight
        if more:
            self.other = bi_ops.nn.Embedding(V, D, device=device)
            self.other.weight = self.embed.weight

    embed: Any
    head: Any

    def forward(self, ids: torch.Tensor, to_head: bool = True) -> torch.Tensor:
        x = self.embed(ids, torch.bfloat16)
        if hasattr(self, "other"):
            x = x + self.other(ids.flip(0), torch.bfloat16)
        x = torch.sin(3 * x)
        return self.head(x) if to_head else x


def starts(steps: Any) -> list[tuple[int, Any]]:
    """(where in the batch it begins, ids) of each micro-batch."""
    return list(zip(itertools.accumulate(map(len, steps), initial=0), steps, strict=False))


def backward(model: Tied, ids: Any, start: int, **options: Any) -> None:
    """A token's gradient depends on where in the whole batch it stands."""
    y = model(torch.tensor(ids, device=model.embed.weight.device), **options)
    token = torch.arange(start, start + len(ids), device=y.device)[:, None]
    y.backward(torch.cos(7.0 * token + torch.arange(y.shape[1], device=y.device)).to(y.dtype))


def gradient(model: Tied, steps: Any = IDS, memory: Any = None, *, dense: bool = False, **options: Any) -> torch.Tensor:
    """Of the table, summed over micro-batches `steps`; dense: whole matrices are filled with zeros and added."""
    bi_ops.nn.allocate_main_grads(model, memory, tensors=dense)
    for start, ids in starts(steps):
        backward(model, ids, start, **options)
    bi_ops.nn.collect_main_grads(model)
    grad, model.embed.weight.grad = model.embed.weight.grad, None
    assert grad is not None
    return grad


def joined(steps):
    return [list(itertools.chain(*steps))]


@pytest.mark.parametrize("first", ["embed", "head"])
def test_a_tied_table_has_the_bits_of_dense_sums_however_the_batch_is_cut(first, device):
    model = Tied(device, first)
    dense = gradient(model, dense=True)
    assert dense.isfinite().all()
    for steps in (IDS, joined(IDS), [IDS[0], *joined(IDS[1:])]):
        assert bits_equal(gradient(model, steps), dense)
        assert bits_equal(gradient(model, steps, dense=True), dense)
    assert not bits_equal(gradient(model, IDS[::-1]), dense)  # negative control: the order of the sums shows


def test_rows_that_no_token_has_are_neither_filled_nor_read(device):
    model = Tied(device)
    wanted, memory = gradient(model), main_grad_memory(model)
    rows, touched = memory[model.embed]
    assert touched is not None
    rows.fill_(float("nan"))
    touched.fill_(True)  # whatever a step left there
    assert bits_equal(gradient(model, memory=memory), wanted)
    assert touched[:-1].nonzero().view(-1).tolist() == INSIDE
    assert rows.isnan().all(1).logical_not().nonzero().view(-1).tolist() == INSIDE


@pytest.mark.parametrize(
    "forgets", ["a row of the last micro-batch", "all rows before the last", "what was not written"]
)
def test_a_wrong_record_of_the_rows_is_seen(forgets, device):
    """Negative controls."""
    model = Tied(device)
    wanted, memory = gradient(model), main_grad_memory(model)
    rows, touched = memory[model.embed]
    assert touched is not None
    rows.fill_(float("nan"))
    bi_ops.nn.allocate_main_grads(model, memory)
    for start, ids in starts(IDS):
        if forgets == "all rows before the last" and ids is IDS[-1]:
            touched.zero_()
        backward(model, ids, start)
    if forgets == "a row of the last micro-batch":
        touched[9] = False
    if forgets == "what was not written":
        touched[2] = True
    bi_ops.nn.collect_main_grads(model)
    assert not bits_equal(model.embed.weight.grad, wanted)


def test_steps_in_the_same_memory_do_not_see_each_other(device):
    model = Tied(device)
    memory = main_grad_memory(model)
    for steps in (IDS[:1], IDS[1:], IDS[:1], IDS):
        assert bits_equal(gradient(model, steps, memory), gradient(model, steps, dense=True))


def test_a_replay_goes_on_from_what_it_finds_in_memory(device):
    """A graph knows the addresses alone: which rows hold a sum is read from the device."""
    model, g = Tied(device), torch.randn(16, D, device=device)
    memory = main_grad_memory(model)[model.embed]
    found = {}
    for replayed in (False, True):
        main_grad = MainGrad(model.embed.weight.shape, device, *memory)
        for ids in IDS:
            if replayed and main_grad.holds_sum:
                main_grad = MainGrad(model.embed.weight.shape, device, *memory)
                main_grad.written()
            accumulate_rows(main_grad, g, torch.tensor(ids, device=device), 0, PADDING)
        found[replayed] = main_grad.collect()
        assert found[replayed].any(1).nonzero().view(-1).tolist() == INSIDE
        found[replayed] = found[replayed].clone()
    assert bits_equal(found[True], found[False])


class Unseen(Direct):
    """As a replay does it, the step leaves no trace in `model`'s Python objects, but in memory."""

    def __init__(self, model):
        super().__init__()
        self.layers = [m for m in model.modules() if hasattr(m, "main_grad")]

    def __call__(self, step, pool):
        def replay():
            before = [m.main_grad for m in self.layers]
            for m in self.layers:
                m.main_grad = copy.copy(m.main_grad)
            found = step()
            for m, main_grad in zip(self.layers, before, strict=True):
                m.main_grad = main_grad
            return found

        return super().__call__(replay, pool)


@pytest.mark.usefixtures("coarse")
def test_the_sums_of_a_model_go_on_behind_a_replay():
    """Of the table memory alone says what rows it has."""
    model = tiny_model(num_hidden_layers=1)
    expected = gradients(model, [1, 1], begin=lambda: model.allocate_main_grads(tensors=True))
    run = StepGraphs(model, step_of(model), capture=Unseen(model))

    def begin():
        run.begin()
        table, _ = run._memory[model.model.embed_tokens]
        table.fill_(float("nan"))

    for _ in range(2):
        assert differing(gradients(model, [1, 1], through(run), begin), expected) == []
    assert run.captured == 2


def test_micro_batches_that_reach_one_of_the_two(device):
    model = Tied(device)
    for dense in (False, True):  # the table alone; a head that nothing reached adds zeros
        grad = gradient(model, dense=dense, to_head=False)
        assert grad.any(1).nonzero().view(-1).tolist() == INSIDE
        assert bits_equal(grad, gradient(model, to_head=False))
    x = torch.randn(TOKEN_STEP, D, device=device)
    found = []
    for dense in (False, True):  # the head alone
        bi_ops.nn.allocate_main_grads(model, tensors=dense)
        model.head(x).sum().backward()
        bi_ops.nn.collect_main_grads(model)
        found.append(model.embed.weight.grad)
    assert bits_equal(*found)
    assert found[0].any(1).all()
    bi_ops.nn.allocate_main_grads(model)
    bi_ops.nn.collect_main_grads(model)  # neither
    assert bits_equal(model.embed.weight.grad, torch.zeros_like(found[0]))


def test_only_a_table_that_one_head_shares_is_summed_by_rows(device):
    def by_rows(model):
        bi_ops.nn.allocate_main_grads(model)
        return [name for name, m in model.named_children() if m.main_grad and m.main_grad.touched is not None]

    assert by_rows(Tied(device)) == ["embed"]
    assert by_rows(Tied(device, tied=False)) == []  # `.grad` is the table's own sum, whole
    assert by_rows(Tied(device, more=True)) == []  # of three sums the order of the additions counts
    assert by_rows(Tied(device).requires_grad_(False)) == []
    for model in (Tied(device, tied=False), Tied(device, more=True)):
        assert bits_equal(gradient(model), gradient(model, dense=True))


def test_a_table_that_is_collected_without_its_head_is_whole(device):
    model = Tied(device)
    bi_ops.nn.allocate_main_grads(model)
    model(torch.tensor(IDS[0], device=device), to_head=False).sum().backward()
    bi_ops.nn.collect_main_grads(model.embed)
    assert model.embed.weight.grad.isfinite().all()
    assert model.embed.weight.grad.any(1).nonzero().view(-1).tolist() == [1, 5, V - 1]


@pytest.mark.parametrize("which", ["embed", "head", "both"])
def test_buffers_that_are_the_users_tensors(which, device):
    model = Tied(device)
    wanted = gradient(model)
    bi_ops.nn.allocate_main_grads(model)
    for name in ("embed", "head") if which == "both" else (which,):
        model.get_submodule(name).main_grad = torch.zeros(V, D, device=device)
    for start, ids in starts(IDS):
        backward(model, ids, start)
    bi_ops.nn.collect_main_grads(model)
    assert bits_equal(model.embed.weight.grad, wanted)


@pytest.mark.parametrize("rows_first", [True, False])
def test_who_asks_for_all_rows_gets_them(rows_first, device):
    """An operator that knows nothing of rows adds to the sum of a table, or begins it."""
    g, x = torch.randn(TOKEN_STEP, V, device=device), torch.randn(TOKEN_STEP, D, device=device)
    ids = torch.tensor(IDS[0], device=device)
    touched = torch.empty(V + 1, dtype=torch.bool, device=device)
    found = []
    for main_grad in (torch.zeros(V, D, device=device), MainGrad(torch.Size((V, D)), device, touched=touched)):
        for of_rows in (rows_first, not rows_first):
            if of_rows:
                accumulate_rows(main_grad, x, ids, 0)
            else:
                accumulate_weight_grad(main_grad, g, x)
        found.append(main_grad.collect() if isinstance(main_grad, MainGrad) else main_grad)
    assert bits_equal(*found)
    assert touched.all()


def test_ids_without_a_row_touch_none(device):
    """On a GPU ids outside of the table are left out; a rank has some rows of it, and others' ids are outside."""
    g = torch.randn(6, D, device=device)
    ids = torch.tensor([-1, V, 2, PADDING, V + 5, 2], device=device)
    buffer, touched = (
        torch.full((V, D), float("nan"), device=device),
        torch.zeros(V + 1, dtype=torch.bool, device=device),
    )
    ops.launch_gradient(buffer, g, ids, PADDING, True, touched)
    assert touched[:-1].nonzero().view(-1).tolist() == [2]
    assert bits_equal(buffer[2], 0.0 + g[2] + g[5])
    cut, parts = V // 2, []
    for first, n in ((0, cut), (cut, V - cut)):
        own = MainGrad(torch.Size((n, D)), device, touched=torch.empty(n + 1, dtype=torch.bool, device=device))
        for part in IDS:
            accumulate_rows(own, g[0].expand(16, D) * 0.3, torch.tensor(part, device=device), first, PADDING)
        parts.append(own.collect())
    whole = torch.zeros(V, D, device=device)
    for part in IDS:
        accumulate_rows(whole, g[0].expand(16, D) * 0.3, torch.tensor(part, device=device), 0, PADDING)
    assert bits_equal(torch.cat(parts), whole)


def test_signs_of_zeros(device):
    touched = torch.zeros(V + 1, dtype=torch.bool, device=device)
    rows, ids = torch.full((V, D), float("nan"), device=device), torch.tensor([4, 6], device=device)
    ops.launch_gradient(rows, -torch.zeros(2, D, device=device), ids, -1, True, touched)
    assert bits_equal(rows[ids], torch.zeros(2, D, device=device))  # a sum begins at +0.0
    total = -torch.zeros(V, D, device=device)
    add_touched_rows(total, rows, touched)
    assert total.signbit().all()  # rows of padding are touched too, and add nothing
    total = torch.full((V, D), -1.0, device=device)
    rows[ids] = 1.0
    add_touched_rows(total, rows, touched)
    assert total[4:7:2].eq(0).all()
    assert total.eq(-1).sum() == (V - 2) * D


def test_the_config_changes_no_bit_and_rows_are_added(device):
    total, rows = torch.randn(2, 50, 70, device=device)
    touched = torch.arange(51, device=device) % 3 == 0
    wanted = torch.where(touched[:-1, None], total + rows, total)
    rows[~touched[:-1]] = float("nan")
    for config in (None, TileConfig(1, 128), TileConfig(4, 16), TileConfig(64, 32)):
        found = total.clone()
        add_touched_rows(found, rows, touched, config)
        assert bits_equal(found, wanted), config
    add_touched_rows(found[:0], rows[:0], touched[:1])


def test_the_operator_says_what_it_writes(device):
    table, g = torch.zeros(5, 8, device=device), torch.randn(3, 8, device=device)
    ids, touched = torch.tensor([1, 1, 4], device=device), torch.zeros(6, dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.bi_ops.accumulate_embedding_rows, (table, touched, g, ids, -1))
