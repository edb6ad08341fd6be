"""What torch makes of an operator's arguments: its errors and the strides of its results, from meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from bi_ops.mode.served.registry import OpOverload, Tensor


def on_meta(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `op` returns for tensors without memory; None where the result depends on values, or torch has no such form.

    Raises:
        whatever torch raises for shapes, dtypes and options that it refuses.
    """

    def empty(t: Any) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t

    try:
        return op(*tree_map(empty, args), **tree_map(empty, kwargs))
    except (NotImplementedError, AssertionError):  # of torch's formula for shapes, which is not what torch raises
        return None
    except RuntimeError as error:
        if "meta" in str(error).lower():
            return None
        raise


def _strided(t: Any, like: Any) -> Any:
    if (
        not isinstance(t, Tensor)
        or not isinstance(like, Tensor)
        or t.shape != like.shape
        or t.stride() == like.stride()
    ):
        return t
    return torch.empty_like(like, device=t.device, dtype=t.dtype).copy_(t)


def strided_as(results: Any, expected: Any) -> Any:
    """`results`, a tensor or several, with the strides of torch's."""
    if expected is None or isinstance(results, Tensor):
        return results if expected is None else _strided(results, expected)
    return tuple(_strided(t, like) for t, like in zip(results, expected, strict=True))
