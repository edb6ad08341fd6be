"""The processes that share a batch: torchrun's, or one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

#: Set to 1 in the environment, ranks share GPUs where there are fewer of them, and gloo moves data through the host.
SHARED_GPU = "BI_OPS_SHARED_GPU"


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`, in `group` (None: torch.distributed's default group)."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """Those of a group of torch.distributed; one alone where nothing was initialised."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """Those that torchrun has started, each on the GPU of its local rank; one alone outside of torchrun.

        Raises:
            RuntimeError: a host has fewer GPUs than ranks, and `SHARED_GPU` is not set.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            backend = "gloo"
            if torch.cuda.is_available():
                rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                shared = os.environ.get(SHARED_GPU) == "1"
                if rank >= n_gpus and not shared:
                    raise RuntimeError(
                        f"parallel: local rank {rank} has no GPU, for this host has {n_gpus}; start as many processes "
                        f"as GPUs (torchrun --nproc-per-node {n_gpus}), or, to try a layout, set {SHARED_GPU}=1: ranks "
                        "then share GPUs, slowly"
                    )
                torch.cuda.set_device(rank % n_gpus)
                backend = "gloo" if shared else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend)
        return cls.of()

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        """This process among `size` neighbours, and among those that stand at its place in the other neighbourhoods.

        The first share a model (tensor parallelism), the second a batch (data parallelism). Every rank calls it.

        Raises:
            ValueError: a size that does not divide the ranks.
        """
        if size < 1 or self.size % size:
            raise ValueError(
                f"parallel: {self.size} ranks are not groups of {size}; start a multiple of {size} with torchrun"
            )
        if size in (1, self.size):
            return (self, ALONE) if size > 1 else (ALONE, self)
        every = dist.get_process_group_ranks(dist.group.WORLD if self.group is None else self.group)
        near = [every[i : i + size] for i in range(0, self.size, size)]
        groups = [
            dist.new_subgroups_by_enumeration(some)[0] for some in (near, [list(r) for r in zip(*near, strict=True)])
        ]
        return Ranks.of(groups[0]), Ranks.of(groups[1])

    def check_captured(self, device: torch.device) -> None:
        """Raise ValueError unless a CUDA graph of `device` can hold collectives of these ranks, as NCCL's."""
        if self.size > 1 and device.type == "cuda" and "cuda:nccl" not in dist.get_backend_config(self.group):
            raise ValueError(
                f"parallel: {self.size} ranks move data of GPUs by {dist.get_backend_config(self.group)}, through the "
                "host, which a CUDA graph cannot hold; give each rank a GPU (NCCL), or run without graphs"
            )

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order, on each of them. Tensors in them must be on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def each(self, function: Callable[[], object]) -> None:
        """Call `function` on every rank; where it raises on one, every rank raises.

        Raises:
            RuntimeError: it raised on other ranks, which are named. A rank on which it raised raises that.
        """
        error: Exception | None = None
        try:
            function()
        except Exception as e:
            error = e
        said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [f"rank {rank}: {what}" for rank, what in enumerate(said) if what is not None]
        if failed:
            raise RuntimeError("parallel: not every rank could go on; " + "; ".join(failed))

    def on_first(self, function: Callable[[], _T]) -> _T:
        """What rank 0 gets from `function`, which runs nowhere else; where it raises, every rank does."""
        if self.size == 1:
            return function()
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = function()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        if found[1] is not None:
            raise found[1]
        return found[0]


#: One process that has its batches for itself.
ALONE = Ranks()
