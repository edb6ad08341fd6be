"""Selective activation recomputation: what a backward computes again instead of keeping it in memory.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022): operators that are cheap and
have large results, such as norms, rotation and silu-and-mul, run again in the backward, GEMMs and attention do not.
A kernel that runs again on the same tensors has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from bi_ops.core.operators import dispatcher_is_watched

#: What a decoder layer keeps for its backward.
Recompute = Literal["selective", "layer", "none"]


def check_recompute(op: str, mode: object) -> Recompute:
    """`mode`. Raises ValueError for what is none."""
    if mode not in get_args(Recompute):
        raise ValueError(f"{op}: recompute is {mode!r}; it must be one of {', '.join(get_args(Recompute))}")
    return mode  # type: ignore[return-value]


class _Recipe:
    """The hooks of `recomputed`. What was saved is packed as its index, or as itself with its version."""

    def __init__(self, outputs: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]]) -> None:
        self.index = {t.data_ptr(): i for i, t in enumerate(outputs) if t.numel()}
        self.sizes = [t.numel() for t in outputs]
        self.again = again
        self.saved: set[int] = set()
        self.values: dict[int, torch.Tensor] = {}

    def pack(self, t: torch.Tensor) -> Any:
        i = self.index.get(t.data_ptr())
        if i is not None and t.numel() == self.sizes[i] and t.is_contiguous():
            self.saved.add(i)
            return i, t.shape
        # Detached, or a node that saves its own result would keep itself alive.
        return t.detach(), t._version

    def unpack(self, packed: Any) -> torch.Tensor:
        what, detail = packed
        if isinstance(what, torch.Tensor):
            if what._version != detail:
                raise RuntimeError(
                    f"a tensor {list(what.shape)} that a backward needs was modified in place after the forward; "
                    "modify a copy, or after the backward"
                )
            return what
        if what not in self.values:
            with torch.no_grad():
                found = self.again()
            self.values = {i: found[i] for i in self.saved}
        return self.values.pop(what).view(detail)


def recomputed(
    on: bool, outputs: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]]
) -> contextlib.AbstractContextManager[Any]:
    """While this is entered, operators that save one of `outputs` for their backward leave it to be computed again.

    Args:
        on: False for a context that does nothing, as there is without gradients, under torch.compile, a mode or a
            transform. outputs: contiguous tensors. again: computes them once more, from detached tensors; it is called
            in the backward.

    Raises (in the backward):
        RuntimeError: another tensor that was saved here has been modified in place since.
    """
    if not on or not torch.is_grad_enabled() or dispatcher_is_watched():
        return contextlib.nullcontext()
    recipe = _Recipe(outputs, again)
    return torch.autograd.graph.saved_tensors_hooks(recipe.pack, recipe.unpack)


def checkpointed(on: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; if `on`, its backward runs it again and keeps nothing but the inputs until then."""
    if not on or not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing in a layer draws random numbers, and its shapes do not change.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
