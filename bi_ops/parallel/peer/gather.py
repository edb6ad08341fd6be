"""What every rank of a host has, side by side on each of them: moved, and nothing computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.triton_helpers import PINNED
from bi_ops.parallel.peer.kernels import gather_kernel
from bi_ops.parallel.peer.memory import PeerMemory
from bi_ops.parallel.peer.sums import MAX_PROGRAMS
from bi_ops.parallel.ranks import Ranks

#: Of the kernel, one after the other.
PHASES = ("SEND", "MEET", "GATHER")
#: Words of 4 bytes of a tile.
TILE = 1024
#: Of all ranks: the kernel counts words in 32 bits.
MAX_BYTES = 1 << 32


class PeerAllGather:
    """Gathers along the last axis by one kernel that writes into the other ranks' memory.

    A rank waits for the others once. A CUDA graph may capture a call, and be replayed; all ranks make the same calls in
    the same order, on one stream. While a rank waits for the others its programs keep their SMs.

    Args:
        ranks: at least 2 of one host. n_bytes: of a rank, in one launch; rows of larger tensors go one part after the
            other. device: this rank's GPU.
        memory: at least `memory_bytes` of each rank; None: allocated.

    Raises:
        ValueError: one rank, no bytes or too many, or too little memory. RuntimeError: as `PeerMemory`.
    """

    def __init__(self, ranks: Ranks, n_bytes: int, device: torch.device, memory: PeerMemory | None = None) -> None:
        if ranks.size < 2:
            raise ValueError(f"parallel.peer: {ranks.size} rank has nothing to gather; take at least 2")
        if not 0 < n_bytes * ranks.size <= MAX_BYTES:
            raise ValueError(
                f"parallel.peer: n_bytes is {n_bytes}; it must be those that a rank sends at once, and of all "
                f"{ranks.size} at most {MAX_BYTES}"
            )
        self.ranks, self.most = ranks, n_bytes
        self._slot = cdiv(n_bytes, 4 * TILE) * TILE
        needed = self.memory_bytes(ranks.size, n_bytes)
        self.memory = PeerMemory(ranks, needed, device) if memory is None else memory
        if self.memory.n_bytes < needed:
            raise ValueError(f"parallel.peer: {n_bytes} bytes a rank need {needed}, not {self.memory.n_bytes}")
        self._state = torch.zeros(2, dtype=torch.int32, device=device)

    @staticmethod
    def memory_bytes(size: int, n_bytes: int) -> int:
        """Of each of `size` ranks: signals, and twice what each has sent."""
        return 8 * size * MAX_PROGRAMS + 2 * 4 * size * cdiv(n_bytes, 4 * TILE) * TILE

    @torch.no_grad()
    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        """own: [..., K] of one shape and dtype on every rank, rows of whole 4 bytes -> [..., ranks * K].

        Raises:
            ValueError: rows of more bytes than were allowed, or of no multiple of 4, or another device.
        """
        row = own.shape[-1] * own.element_size()
        if row > self.most or row % 4 or own.device != self._state.device:
            raise ValueError(
                f"parallel.peer: {list(own.shape)} of {own.dtype} on {own.device} must have rows of at most "
                f"{self.most} bytes, whole 4s, and be on {self._state.device}"
            )
        out = own.new_empty((*own.shape[:-1], self.ranks.size * own.shape[-1]))
        if own.numel():
            rows = own.contiguous().view(-1, own.shape[-1]).view(torch.int32)
            at_once = self.most // row
            for part, gathered in zip(rows.split(at_once), out.view(len(rows), -1).split(at_once), strict=True):
                self.launch(part, gathered)
        return out

    def fits(self, own: torch.Tensor) -> bool:
        """May it be given, whatever its other sizes?"""
        row = own.shape[-1] * own.element_size()
        return row <= self.most and row % 4 == 0

    def launch(self, own: torch.Tensor, out: torch.Tensor, phases: Sequence[str] = PHASES) -> None:
        """own: int32 [M, K]; out: as many bytes from each rank."""
        m, k = own.shape
        cols = min(next_power_of_2(k), TILE)
        rows = TILE // cols
        programs = min(cdiv(m, rows) * cdiv(k, cols), MAX_PROGRAMS)
        gather_kernel[(programs,)](
            *(own, out.view(torch.int32), self.memory.pointers, self._state, m, k, self._slot, self.ranks.rank),
            N_RANKS=self.ranks.size,
            MAX_PROGRAMS=MAX_PROGRAMS,
            ROWS=rows,
            COLS=cols,
            SEND="SEND" in phases,
            MEET="MEET" in phases,
            GATHER="GATHER" in phases,
            num_warps=4,
            **PINNED,
        )
