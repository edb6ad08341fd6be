"""Collectives of torch.distributed: what moves numbers between ranks passes, what adds them by its own order raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bi_ops.core import checks

OpOverload = torch._ops.OpOverload
_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "fsdp")


def is_collective(op: OpOverload) -> bool:
    """Whether `op` belongs to torch.distributed."""
    return op.namespace in _NAMESPACES


def check(op: OpOverload, args: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> None:
    """Raise NotImplementedError for a collective that reduces floating-point numbers over more than one rank."""
    if "reduce" not in op._schema.name or not any(t.is_floating_point() or t.is_complex() for t in tensors):
        return
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
    if str(given.get("reduce_op", given.get("reduceOp"))).lower() in ("min", "max"):
        return  # in no order; ReduceOp objects cannot be read, so that c10d's max is refused too
    group = given.get("process_group")
    if group is not None and torch.distributed.ProcessGroup.unbox(group).size() == 1:
        return
    what = ", ".join(checks.describe(t) for t in tensors)
    raise NotImplementedError(
        f"batch-invariant mode: {op._schema.name} on {what} adds floating-point numbers in an order that the "
        "collectives' library chooses by size and number of ranks. Way out: gather them and add rank by rank, "
        "`parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size())]; "
        "torch.distributed.all_gather(parts, t); torch.stack(parts).sum(0)`; DDP does so with "
        "`ddp.register_comm_hook(None, bi_ops.mode.ordered_all_reduce_hook)`"
    )


def ordered_all_reduce_hook(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DistributedDataParallel: the mean of a bucket of gradients, added rank by rank in fp32.

    It gathers what every rank has: the memory of one bucket times the number of ranks. state: the process group, None
    for the default one.

    Returns:
        a future of the bucket's gradients.
    """
    grads = bucket.buffer()
    n_ranks = torch.distributed.get_world_size(state)
    parts = [torch.empty_like(grads) for _ in range(n_ranks)]
    work = torch.distributed.all_gather(parts, grads, group=state, async_op=True)

    def added(_: Any) -> torch.Tensor:
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return (total / n_ranks).to(grads.dtype)

    return work.get_future().then(added)
