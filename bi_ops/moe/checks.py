"""What arguments must be."""

from __future__ import annotations

import torch

from bi_ops.core import checks
from bi_ops.core.limits import SMALL

#: Experts of a layer, at most: a program holds their counts in registers.
MOST_EXPERTS = 4096
#: Slots of a token, at most.
MOST_SLOTS = 64


def matrix(op: str, name: str, t: torch.Tensor) -> None:
    """Raise unless `t` is [rows, columns] of a floating-point dtype."""
    checks.tensor(op, name, t, ndim=2)
    checks.dtype(op, name, t)


def expert_weight(op: str, name: str, weight: torch.Tensor, x: torch.Tensor, columns: int) -> None:
    """Raise unless `weight` is [E, N, columns] in the dtype of x, or fp32."""
    checks.tensor(op, name, weight, ndim=3)
    checks.dtype(op, name, weight)
    checks.same_device(op, x=x, **{name: weight})
    if weight.dtype != torch.float32:
        checks.same_dtype(op, x=x, **{name: weight})
    ok = weight.shape[0] >= 1 and weight.shape[2] == columns
    checks.shape(op, ok, lambda: f"{name} must be [experts, N, {columns}], got {list(weight.shape)}")
    count(op, weight.shape[0])
    ok = weight.shape[1] * weight.shape[2] < SMALL
    checks.shape(op, ok, lambda: f"{name} {list(weight.shape)}: kernels count 2**31 elements of an expert's weight")


def count(op: str, num_experts: int) -> None:
    """Raise ValueError where there are more experts than kernels count."""
    ok = num_experts <= MOST_EXPERTS
    checks.shape(op, ok, lambda: f"{num_experts} experts; kernels count up to {MOST_EXPERTS}")


def int32(op: str, name: str, t: torch.Tensor, ndim: int, like: torch.Tensor) -> None:
    """Raise unless `t` is int32, of this rank, on the device of `like`."""
    checks.tensor(op, name, t, ndim=ndim)
    checks.dtype(op, name, t, (torch.int32,))
    checks.same_device(op, **{name: t, "the other tensor": like})


def slots(op: str, experts: torch.Tensor) -> None:
    """Raise unless `experts` is int32 [T, k]."""
    checks.tensor(op, "experts", experts, ndim=2)
    checks.dtype(op, "experts", experts, (torch.int32,))
    ok = 1 <= experts.shape[1] <= MOST_SLOTS
    checks.shape(op, ok, lambda: f"experts must be [tokens, 1 to {MOST_SLOTS} slots], got {list(experts.shape)}")
    ok = experts.shape[0] * experts.shape[1] < 2**27
    checks.shape(op, ok, lambda: f"experts {list(experts.shape)}: rows are counted in 32 bits; call it in parts")


def units(op: str, cu_units: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raise unless `cu_units` is None, or int32 [U + 1]."""
    if cu_units is not None:
        int32(op, "cu_units", cu_units, 1, like)
        n = cu_units.shape[0]
        checks.shape(op, n >= 2, lambda: f"cu_units must hold the first tokens of the units and their end, got [{n}]")
