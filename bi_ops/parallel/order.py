"""What fixes the bits of a sum over the tokens of a batch that several ranks may share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bi_ops.core.orders import Order


@dataclass(frozen=True)
class AtomTree(Order):
    """How weight gradients are added over a batch of sequences, in fp32.

    The batch is cut into `atoms`, by the lengths of its sequences alone (`cut`). In an atom a sum over tokens is
    carried from one sequence to the next, whatever the micro-batches. Atoms are added pairwise, neighbours first: 2**k
    of them that start at a multiple of 2**k are a subtree, wherever they are computed. An atom without sequences is
    +0.0.

    One atom is one sum, carried from the first token to the last.
    """

    atoms: int = 1


def order(atoms: int = 1) -> AtomTree:
    """The order of so many atoms, the most ranks that may share a batch.

    Raises:
        ValueError: not a power of two.
    """
    if atoms < 1 or atoms & (atoms - 1):
        raise ValueError(f"parallel: atoms is {atoms}; it must be a power of two, for they are added pairwise")
    return AtomTree(atoms)


def cut(lengths: Sequence[int], atoms: int) -> list[slice]:
    """Consecutive sequences of `lengths` tokens in `atoms` parts, some perhaps empty.

    A sequence belongs to the part in which its middle lies, where all tokens together are cut into equal parts. In
    whole numbers, so that every rank cuts alike.
    """
    total, ends = sum(lengths), [0] * atoms
    for i, end in enumerate(itertools.accumulate(lengths)):
        ends[min((2 * end - lengths[i]) * atoms // (2 * total), atoms - 1)] = i + 1
    ends = list(itertools.accumulate(ends, max))
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
