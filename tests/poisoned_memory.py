"""Fresh memory that is NaN, so that what a kernel forgets to write is seen."""

from __future__ import annotations

from collections.abc import Callable

import torch

_empty, _empty_like, _new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty


def _poison(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point() and t.device.type != "meta" and not isinstance(t, torch._subclasses.FakeTensor):
        t.detach().fill_(float("nan"))
    return t


def install(set_attribute: Callable[..., None] = setattr) -> None:
    """Have `torch.empty` and its kin return NaN."""
    set_attribute(torch, "empty", lambda *a, **k: _poison(_empty(*a, **k)))
    set_attribute(torch, "empty_like", lambda *a, **k: _poison(_empty_like(*a, **k)))
    set_attribute(torch.Tensor, "new_empty", lambda *a, **k: _poison(_new_empty(*a, **k)))
