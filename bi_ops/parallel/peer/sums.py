"""The sum of partial outputs over the ranks of a host: the upper levels of a fixed tree, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core.checks import FLOAT_DTYPES
from bi_ops.core.integers import cdiv
from bi_ops.core.triton_helpers import PINNED
from bi_ops.parallel.peer.kernels import ordered_sum_kernel
from bi_ops.parallel.peer.memory import PeerMemory
from bi_ops.parallel.ranks import Ranks

#: Of the kernel, one after the other.
PHASES = ("SEND", "MEET", "ADD", "GATHER")
#: Elements of a tile, and programs at most: all of them must run at once, on every rank.
BLOCK, MAX_PROGRAMS = 2048, 128
#: Of a launch: the kernel counts in 32 bits.
MAX_ELEMENTS = 1 << 30
#: Elements up to which each rank reads the partial outputs of all: it meets the others once instead of twice.
ONE_SHOT = 1 << 18


class PeerAllReduce:
    """As `parallel.tensor.OrderedAllReduce`, with the same bits: one kernel that writes into the other ranks' memory.

    Few elements are sent to every rank, and added by each (one-shot). Of many, each rank adds a share, and sends the
    rounded sums to the others (two-shot). A CUDA graph may capture a call, and be replayed; all ranks make the same
    calls in the same order, on one stream. While a rank waits for the others its programs keep their SMs.

    Args:
        ranks: 2, 4 or 8 of one host. elements: of the largest partial output; larger ones are cut. device: this rank's
            GPU. one_shot: elements up to which each adds all.
        memory: at least `n_bytes` of each rank; None: allocated.

    Raises:
        ValueError: a number of ranks that is no power of two above 1, no elements, or too little memory.
        RuntimeError: as `PeerMemory`.
    """

    def __init__(
        self,
        ranks: Ranks,
        elements: int,
        device: torch.device,
        one_shot: int = ONE_SHOT,
        memory: PeerMemory | None = None,
    ) -> None:
        if ranks.size < 2 or ranks.size & (ranks.size - 1):
            raise ValueError(f"parallel.peer: {ranks.size} ranks; they are added pairwise: take 2, 4 or 8")
        if elements < 1:
            raise ValueError(f"parallel.peer: elements is {elements}; it must be that of the largest partial output")
        self.ranks, self.one_shot = ranks, one_shot
        self.capacity, self._slot = self._sizes(ranks.size, elements, one_shot)
        needed = self.n_bytes(ranks.size, elements, one_shot)
        self.memory = PeerMemory(ranks, needed, device) if memory is None else memory
        if self.memory.n_bytes < needed:
            raise ValueError(f"parallel.peer: {elements} elements need {needed} bytes, not {self.memory.n_bytes}")
        self._state = torch.zeros(2, dtype=torch.int32, device=device)

    @staticmethod
    def _sizes(size: int, elements: int, one_shot: int) -> tuple[int, int]:
        """Elements of the largest launch, and of what a rank sends to another in one."""
        capacity = min(cdiv(elements, BLOCK * size) * BLOCK * size, MAX_ELEMENTS)
        return capacity, max(capacity // size, min(cdiv(one_shot, BLOCK) * BLOCK, capacity))

    @classmethod
    def n_bytes(cls, size: int, elements: int, one_shot: int = ONE_SHOT) -> int:
        """Of each of `size` ranks: signals, twice what each has sent, and twice the sums."""
        capacity, slot = cls._sizes(size, elements, one_shot)
        return 8 * size * MAX_PROGRAMS + 2 * 4 * size * slot + 2 * 4 * capacity

    def __call__(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """partial: fp32, contiguous, of one shape on every rank -> the sum in `dtype`. Every rank calls it.

        Raises:
            TypeError: another dtype. ValueError: not contiguous, or on another device.
        """
        if partial.dtype != torch.float32 or dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"parallel.peer: {list(partial.shape)} is {partial.dtype}, to be rounded to {dtype}; partial outputs "
                f"are fp32, and sums {', '.join(map(str, FLOAT_DTYPES))}"
            )
        if not partial.is_contiguous() or partial.device != self._state.device:
            raise ValueError(
                f"parallel.peer: {list(partial.shape)} on {partial.device} must be contiguous, on {self._state.device}"
            )
        out = torch.empty_like(partial, dtype=dtype)
        n = partial.numel()
        if 0 < n <= self.capacity and n % 4 == 0:  # nearly every call, four in a layer: nothing but the launch
            self.launch(partial, out)
        elif n > 0:
            self._in_parts(partial.detach().view(-1), out.view(-1))
        return out

    def _in_parts(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        """Add [n]: launches of `capacity` elements at most, filled up to a multiple of 4."""
        n, rest = len(partial), -len(partial) % 4
        own, total = (torch.nn.functional.pad(partial, (0, rest)), out.new_empty(n + rest)) if rest else (partial, out)
        for a, b in zip(own.split(self.capacity), total.split(self.capacity), strict=True):
            self.launch(a, b)
        if rest:
            out.copy_(total[:n])

    def launch(self, partial: torch.Tensor, out: torch.Tensor, phases: Sequence[str] = PHASES) -> None:
        """Add all elements, contiguous, at most `capacity` of them, a multiple of 4 and at least one such."""
        n = partial.numel()
        shares = 1 if n <= self.one_shot else self.ranks.size
        programs = min(cdiv(n, BLOCK * shares), MAX_PROGRAMS)
        ordered_sum_kernel[(programs,)](
            *(partial, out, self.memory.pointers, self._state, n // 4),
            *(self._slot, self.capacity, self.ranks.rank),
            N_RANKS=self.ranks.size,
            MAX_PROGRAMS=MAX_PROGRAMS,
            BLOCK=BLOCK,
            SHARES=shares,
            SEND="SEND" in phases,
            ADD="ADD" in phases,
            GATHER="GATHER" in phases,
            MEET="MEET" in phases,
            num_warps=8,
            **PINNED,
        )
