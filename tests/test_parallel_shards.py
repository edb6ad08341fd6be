"""Rows of sums over atoms: the bits of whole sums, on any number of ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import ranks
import torch
from sweeps import sweep

from bi_ops import parallel
from bi_ops.core import runtime
from bi_ops.core.pairwise import pairwise
from bi_ops.parallel import shards
from bi_ops.parallel.shards import ShardTree, rows_of

ATOMS = 8
#: Rows that ranks share evenly and not, fewer rows than ranks, of one axis, of three, and large ones.
SHAPES = [(8, 6), (7, 3), (3,), (16,), (5, 2, 2), (64, 16), (66, 16)]


def gradients(atom: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(atom)
    return [torch.randn(shape, generator=generator).to(runtime.default_device()) for shape in SHAPES]


def sums() -> list[torch.Tensor]:
    return [pairwise(torch.stack(each)) for each in zip(*(gradients(atom) for atom in range(ATOMS)), strict=True)]


def rows_on_a_rank() -> list[list[torch.Tensor]]:
    here = parallel.Ranks.of()
    with mock.patch.object(shards, "ALONE_ELEMENTS", 512 // here.size):
        tree = ShardTree(parallel.order(ATOMS), here)
        found = []
        for _ in range(2):  # it can be used again
            for atom in range(here.rank, ATOMS, here.size):
                with pytest.raises(ValueError, match=f"of rank {here.rank}'s {ATOMS // here.size} atoms are added"):
                    tree.total()
                tree.add(gradients(atom))
            found.append(tree.total())
    return found


@sweep("size", (2, 4, 8), (2,))
def test_rows_have_the_bits_of_whole_sums(size):
    ranks.need_gpus(size)
    want = sums()
    for rank, found in enumerate(ranks.run(size, rows_on_a_rank)):
        here = parallel.Ranks(rank, size)
        for each in found:
            for shape, total, rows in zip(SHAPES, want, each, strict=True):
                assert torch.equal(rows, total[rows_of(shape[0], here)]), (rank, shape)
    in_turn = [torch.stack(each).cumsum(0)[-1] for each in zip(*map(gradients, range(ATOMS)), strict=True)]
    assert not all(map(torch.equal, in_turn, want))  # the control: one after the other


def test_all_rows_are_some_ranks():
    for n in (0, 1, 3, 7, 8, 9):
        for size in (1, 2, 4, 8):
            parts = [rows_of(n, parallel.Ranks(rank, size)) for rank in range(size)]
            assert [row for part in parts for row in range(n)[part]] == list(range(n))
            assert len({part.stop - part.start for part in parts if part.stop < n}) <= 1


def test_one_rank_and_ranks_that_do_not_divide_the_atoms_are_refused():
    for here, message in ((parallel.ALONE, "one rank has nothing to share"), (parallel.Ranks(0, 4), "atoms=2 evenly")):
        with pytest.raises(ValueError, match=message):
            ShardTree(parallel.order(2), here)
