"""Of an embedding's gradient the rows that tokens reach are exchanged, and a tied head's first; the bits are those of
whole tables, and of one process."""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
from stack_fakes import StackModel
from sweeps import sweep
from test_fsdp import gradients_of, weights_of
from test_parallel import equal
from test_parallel_overlap import events, note_backwards  # noqa: F401 (a fixture)
from tiny import tiny_model

from bi_ops import nn, optim, parallel
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.packing import PADDING, pack
from bi_ops.nn.main_grad import main_grad_memory
from bi_ops.parallel.fsdp import FullySharded
from bi_ops.parallel.overlap import SideStream
from bi_ops.parallel.tables import table_of

#: Prompts of each atom's micro-batches: two, one, none, and one whose ids others have too.
ATOMS: list[list[list[list[int]]]] = [[[[5, 6, 7], [8] * 17], [[9, 5]]], [[[1000, 7]]], [], [[[5, 5, 600]]]]
COMPLETION = [3, 1099]
IDS = sorted({PADDING, *COMPLETION, *(i for atom in ATOMS for batch in atom for prompt in batch for i in prompt)})


def made(is_tied: bool) -> Any:
    return tiny_model(num_hidden_layers=1, vocab_size=1100, tie_word_embeddings=is_tied)


def batches_of(atoms: range, rank: int, idle: bool) -> list[tuple[list[list[int]], float]]:
    """A rank's micro-batches of its one of these atoms; `idle`: behind some that add zeros, as many as others have."""
    mine = [(prompts, 1.0) for prompts in ATOMS[atoms[rank]]]
    most = max(1, *(len(ATOMS[i]) for i in atoms)) if idle else 0
    return [([[5]], 0.0)] * (most - len(mine)) + mine


def updates(layout: parallel.Whole | FullySharded, ids: list[list[int] | None]) -> list[torch.Tensor]:
    """Gradients of an update for each of `ids`, with their norms; then the weights."""
    model, here = cast(Any, layout.model), layout.ranks
    optimizer = optim.AdamW(list(layout.parameters.values()), lr=0.1)
    found: list[torch.Tensor] = []
    for known in ids:
        layout.begin_step(None if known is None else torch.tensor(known))
        for step in range(layout.steps):
            atoms = range(step * here.size, (step + 1) * here.size)
            batches = batches_of(atoms, here.rank, isinstance(layout, FullySharded))
            layout.begin_atom()
            for n, (prompts, scale) in enumerate(batches, 1):
                layout.before_backward(last=n == len(batches))
                batch = pack(prompts, [COMPLETION] * len(prompts), model.device, TOKEN_STEP)
                scores = model.token_logprobs(batch)
                (scores * (scale * torch.cos(batch.targets.float()))).sum().backward()
            layout.end_atom()
        norm = layout.finish()
        found += [norm, *gradients_of(layout)]
        optimizer.step(grad_scale=optim.clip_scale(norm, 1.0))
    return found + weights_of(layout)


def of(is_tied: bool, atoms: int, keeps_memory: bool = False, here: parallel.Ranks = parallel.ALONE) -> parallel.Whole:
    model = made(is_tied)
    again = functools.partial(nn.allocate_main_grads, model, main_grad_memory(model)) if keeps_memory else None
    return parallel.Whole(model, parallel.order(atoms), here, again, keeps_memory)


#: Known ids, then unknown ones: a step does not remember the last one's.
STEPS: list[list[int] | None] = [IDS, None]
CASES = [(is_tied, atoms, keeps) for is_tied in (True, False) for atoms, keeps in ((4, False), (4, True), (2, False))]


def on_a_rank() -> dict[Any, list[torch.Tensor]]:
    here = parallel.Ranks.of()
    found: dict[Any, list[torch.Tensor]] = {case: updates(of(*case, here), STEPS) for case in CASES}
    for is_tied in (True, False):  # controls: a token that was not said
        found["missing", is_tied] = updates(of(is_tied, 2, False, here), [[i for i in IDS if i != 7]])
    return found


def shards_on_a_rank() -> dict[Any, list[torch.Tensor]]:
    warnings.filterwarnings("error", "FSDP2-wrapped module .* returned a view")  # torch's, since 2.13
    here = parallel.Ranks.of()
    found: dict[Any, list[torch.Tensor]] = {}
    for is_tied in (True, False):
        for reshards in (True, False):
            layout = FullySharded(made(is_tied), parallel.order(4), here, reshard_after_forward=reshards)
            with mock.patch.object(layout.early.row_sums, "add", wraps=layout.early.row_sums.add) as added:
                found[is_tied, reshards] = updates(layout, STEPS)
            assert added.call_count == 4 // here.size  # in the step whose ids are known
        layout = FullySharded(made(is_tied), parallel.order(4), here)
        found["missing", is_tied] = updates(layout, [[i for i in IDS if i != 7]])
    return found


#: Of a head alone no backward goes through the model.
FROZEN = ["model.embed_tokens", "model.layers", "model"]


def frozen(name: str) -> Any:
    model = made(False)
    model.get_submodule(name).requires_grad_(False)
    return model


def frozen_on_a_rank() -> dict[str, list[torch.Tensor]]:
    here = parallel.Ranks.of()
    return {name: updates(FullySharded(frozen(name), parallel.order(4), here), STEPS) for name in FROZEN}


def test_in_shards_what_is_frozen_is_not_waited_for():
    ranks.need_gpus(2)
    one = {name: updates(parallel.Whole(frozen(name), parallel.order(4)), STEPS) for name in FROZEN}
    for found in ranks.run(2, frozen_on_a_rank):
        for name in FROZEN:
            assert equal(found[name], one[name]), name


@sweep("size", (2, 4), (2,))
def test_rows_in_shards_have_the_bits_of_one_process(size):
    ranks.need_gpus(size)
    one = {is_tied: updates(of(is_tied, 4), STEPS) for is_tied in (True, False)}
    for found in ranks.run(size, shards_on_a_rank):
        for is_tied in (True, False):
            assert equal(found[is_tied, True], one[is_tied])
            assert equal(found[is_tied, False], one[is_tied])
            assert found["missing", is_tied][0].isnan()  # the control


def test_rows_have_the_bits_of_tables_and_of_one_process():
    one = {(is_tied, atoms): updates(of(is_tied, atoms), STEPS) for is_tied, atoms, _ in CASES}
    for found in ranks.run(2, on_a_rank):
        for is_tied, atoms, keeps_memory in CASES:
            assert equal(found[is_tied, atoms, keeps_memory], one[is_tied, atoms]), (is_tied, atoms, keeps_memory)
        assert all(found["missing", is_tied][0].isnan() for is_tied in (True, False))


@pytest.mark.parametrize("keeps_memory", [False, True])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_tied_head_is_exchanged_first_where_ids_are_known(events, monkeypatch, is_known, keeps_memory):  # noqa: F811
    layout = of(True, 2, keeps_memory, parallel.Ranks(0, 2))
    model = cast(Any, layout.model)
    monkeypatch.setattr(SideStream, "mark", lambda self, place: None)
    note_backwards(model.model.layers, events)
    sizes: list[int] = []
    add = parallel.GradientTree.add

    def noted(self: Any, given: Any) -> None:
        sizes.append(max(g.numel() for g in given))
        events.append("added")
        add(self, given)

    with mock.patch.object(parallel.GradientTree, "add", noted):
        updates(layout, [IDS if is_known else None])
    table, layer = model.lm_head.weight.numel(), max(p.numel() for p in model.model.layers[0].parameters())
    assert sizes == ([table, layer, len(IDS) * 32] if is_known else [layer, table])
    early = [e for e in events[: events.index("backward of 0", events.index("backward of 0") + 1)] if e == "added"]
    assert len(early) == (is_known and not keeps_memory)  # a graph's exchanges are launched at the end of an atom


def test_which_table_is_exchanged_by_rows():
    tied, alone = table_of(made(True)), table_of(made(False))
    assert tied is not None
    assert tied.head is not None
    assert alone is not None
    assert alone.head is None
    assert table_of(StackModel()) is None  # its head is an ordinary layer
    frozen = made(False)
    frozen.model.embed_tokens.requires_grad_(False)
    assert table_of(frozen) is None


def test_ids_are_checked_and_many_are_no_rows():
    layout = of(True, 2, here=parallel.Ranks(0, 2))
    for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"parallel: ids are .* give int64 \[n\] on the CPU, each once"):
            layout.begin_step(wrong)
    for wrong in (torch.tensor([-1, 4]), torch.tensor([4, 1100])):
        with pytest.raises(ValueError, match="are no rows of 1100"):
            layout.begin_step(wrong)
    for ids, is_worth in ((torch.arange(275), True), (torch.arange(276), False), (torch.arange(0), False)):
        layout.begin_step(ids)
        assert (layout.early.rows is not None) == is_worth
    of(True, 2).begin_step(torch.tensor([5]))  # one process exchanges nothing
