"""torch's rules of dtypes, for layers and for functions that are replaced before torch's dispatcher sees them."""

from __future__ import annotations

from typing import Any

import torch

#: Operators of torch for which it matters, and the kinds of device where autocast computes them in fp32.
IN_FP32 = {
    op: frozenset(
        kind
        for kind in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(op, f"Autocast{kind.upper()}")
    )
    for op in ("aten::rms_norm",)
}


def autocast_is_on(x: torch.Tensor) -> bool:
    """Whether torch.autocast is on for the device of x."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def lowered(*operands: Any) -> tuple[Any, ...]:
    """The operands of a GEMM or of attention, cast to autocast's dtype where it is on; fp64 and None stay."""
    if not autocast_is_on(operands[0]):
        return operands
    dtype = torch.get_autocast_dtype(operands[0].device.type)
    return tuple(_cast(t, dtype) for t in operands)


def widened(op: str, *operands: Any) -> tuple[Any, ...]:
    """The operands of torch's operator `op`, of `IN_FP32`, cast to fp32 where autocast computes it in fp32."""
    if not (autocast_is_on(operands[0]) and operands[0].device.type in IN_FP32[op]):
        return operands
    return tuple(_cast(t, torch.float32) for t in operands)


def _cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


def norm_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weight` in a dtype that `bi_ops.norm` takes beside x; torch takes any, and its result has the dtype of x."""
    return weight if weight.dtype in (x.dtype, torch.float64) else weight.float()
