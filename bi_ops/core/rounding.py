"""Weights that stay rounded: forwards read one copy in the compute dtype until the master changes.

Without one every forward rounds the master again. The values are the same, so no bit depends on it. A change is seen by
a tensor's version counter and its address: what writes to `weight.data` in place goes unseen, as autograd does not see
it either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bi_ops.core.operators import dispatcher_is_watched

_State = tuple[int, int, int]


@dataclass
class Kept:
    """copy: the rounded weight. state: of weight and copy when their values last agreed."""

    copy: torch.Tensor
    state: _State | None = None

    def is_behind(self, weight: torch.Tensor) -> bool:
        """One of the two was written since."""
        return _state(weight, self.copy) != self.state


def _state(weight: torch.Tensor, copy: torch.Tensor) -> _State:
    return weight._version, weight.data_ptr(), copy._version


_KEPT = WeakTensorKeyDictionary()


def keep(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of `weight` in `dtype`, contiguous, that `rounded` returns from now on; the one that there is, if any."""
    kept = _KEPT.get(weight)
    if kept is None or kept.copy.dtype != dtype or not _fits(weight, kept.copy):
        kept = keep_in(weight, torch.empty(weight.shape, dtype=dtype, device=weight.device))
    refresh(weight)
    return kept.copy


def keep_in(weight: torch.Tensor, copy: torch.Tensor) -> Kept:
    """From now on `copy`, of the shape of `weight`, is where it is rounded to, when it is refreshed."""
    _KEPT[weight] = kept = Kept(copy)
    return kept


def _fits(weight: torch.Tensor, copy: torch.Tensor) -> bool:
    return weight.shape == copy.shape and weight.device == copy.device


@torch.no_grad()
def refresh(weight: torch.Tensor) -> int:
    """Round a weight that has changed into its copy, if it has one; the copy's address, 0 without one."""
    kept = _KEPT.get(weight) if _KEPT else None
    if kept is None:
        return 0
    if not _fits(weight, kept.copy):  # it was moved
        del _KEPT[weight]
        return 0
    if kept.is_behind(weight):
        kept.copy.copy_(weight)
        kept.state = _state(weight, kept.copy)
    return kept.copy.data_ptr()


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight.to(dtype)``, of a weight with a copy in `dtype` that copy."""
    if weight.dtype == dtype or dispatcher_is_watched() or not _KEPT:  # in this order for torch.compile
        return weight.to(dtype)
    kept = _KEPT.get(weight)
    if kept is None or kept.copy.dtype != dtype:
        return weight.to(dtype)
    if kept.is_behind(weight) and weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return weight.to(dtype)  # a graph's replay would round again, and nothing says that it did
    return kept.copy if refresh(weight) else weight.to(dtype)


def written(weight: torch.Tensor, copy: torch.Tensor) -> None:
    """The weight was written, and `copy` with its rounded values: if that is the one kept, it is the weight's again."""
    kept = _KEPT.get(weight)
    if kept is not None and kept.copy is copy:
        kept.state = _state(weight, copy)
