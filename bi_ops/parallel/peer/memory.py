"""Memory that every rank of a host can read and write, the same size on each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from bi_ops.parallel.ranks import Ranks

Made = TypeVar("Made")


def over_peer_memory(
    make: Callable[[], Made], asked: bool | None, ranks: Ranks, device: torch.device, op: str
) -> Made | None:
    """What `make` makes over the memory of ranks; None where they are to use collectives, or, unless asked, have to.

    asked: None means where the GPUs reach each other; a warning, in the name of `op`, says where they do not.

    Raises:
        RuntimeError: as `PeerMemory`, if it was asked for.
    """
    if ranks.size == 1 or asked is False or (asked is None and device.type != "cuda"):
        return None
    try:
        return make()
    except RuntimeError as error:
        if asked:
            raise
        warnings.warn(f"{op}: ranks exchange by collectives, which takes longer: {error}", stacklevel=2)
        return None


class PeerMemory:
    """`n_bytes` of each rank, zeros at first; a kernel reaches all of them through a table of pointers.

    Of torch's symmetric memory, over NVLink or PCIe, without multicast. Every rank makes this call, before a CUDA graph
    that uses the memory is captured. The allocation lives as long as this object.

    Args:
        ranks: those of one host. n_bytes: of each; device: this rank's GPU.

    Raises:
        RuntimeError: ranks of several hosts, GPUs that cannot reach each other's memory, or a GPU that ranks share
            without TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 in the environment.
    """

    def __init__(self, ranks: Ranks, n_bytes: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        group = dist.group.WORLD if ranks.group is None else ranks.group
        try:
            own = symmetric.empty(n_bytes, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, cast(Any, group))
        except RuntimeError as error:
            raise RuntimeError(
                f"parallel.peer: {ranks.size} ranks cannot share memory: {str(error).splitlines()[0]}. Take "
                "GPUs of one host that reach each other (doctor shows them), or sums by collectives"
            ) from error
        own.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # before a rank writes into what another one clears
        tensors = [handle.get_buffer(rank, (n_bytes,), torch.uint8) for rank in range(ranks.size)]
        self._set(ranks, n_bytes, [int(p) for p in handle.buffer_ptrs], device, tensors, (own, handle))

    @classmethod
    def of_tensors(cls, ranks: Ranks, tensors: Sequence[torch.Tensor]) -> PeerMemory:
        """The memory of these tensors, one for each rank, which this process can reach, and which hold zeros."""
        made = cls.__new__(cls)
        made._set(ranks, tensors[0].nbytes, [t.data_ptr() for t in tensors], tensors[0].device, tensors)
        return made

    def _set(
        self,
        ranks: Ranks,
        n_bytes: int,
        pointers: Sequence[int],
        device: torch.device,
        tensors: Sequence[torch.Tensor],
        kept: tuple[Any, ...] = (),
    ) -> None:
        self.ranks, self.n_bytes, self._kept = ranks, n_bytes, kept
        #: uint8 [n_bytes] of each rank: its memory, as this one reaches it.
        self.tensors = tuple(tensors)
        #: int64 [ranks], where each rank's memory begins for this one.
        self.pointers = torch.tensor(pointers, dtype=torch.int64, device=device)
