"""Inputs of a check: their shape, and values that break sums which ordinary numbers leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """Rows [*lead, k], of a matrix with n columns. strided: inputs are views, of other memory layouts."""

    lead: tuple[int, ...]
    k: int
    n: int
    strided: bool = False

    @property
    def rows(self) -> int:
        return torch.Size(self.lead).numel()


def _huge(t: Tensor, info: torch.finfo, _: torch.Generator) -> Tensor:
    return t.tanh() * (info.max / 8)


def _denormal(t: Tensor, info: torch.finfo, _: torch.Generator) -> Tensor:
    return t * (info.tiny / 4)


def _cancelling(t: Tensor, info: torch.finfo, _: torch.Generator) -> Tensor:
    """Neighbours along the last axis cancel but for their last bits."""
    t = t.clone()
    pairs = t.shape[-1] // 2
    t[..., 1 : 2 * pairs : 2] = -t[..., 0 : 2 * pairs : 2] * (1 + 2 * info.eps)
    return t


def _mixed(t: Tensor, info: torch.finfo, generator: torch.Generator) -> Tensor:
    """Either sign, magnitudes over many binades."""
    span = 10 if info.bits == 16 and info.max < 1e5 else 30
    return t * torch.exp2(torch.randint(-span, span, t.shape, generator=generator).float())


def _negative_zero(t: Tensor, info: torch.finfo, generator: torch.Generator) -> Tensor:
    """-0.0, and here and there a number."""
    return torch.where(torch.rand(t.shape, generator=generator) < 0.8, torch.tensor(-0.0), t)


#: Kinds of values, by name: what becomes of normal random numbers.
KINDS: dict[str, Callable[[Tensor, torch.finfo, torch.Generator], Tensor]] = {
    "normal": lambda t, info, _: t,
    "denormal": _denormal,
    "huge": _huge,
    "cancelling": _cancelling,
    "mixed": _mixed,
    "negative zero": _negative_zero,
}


def _assorted(t: Tensor, info: torch.finfo, generator: torch.Generator) -> Tensor:
    """Each index of the first axis of another kind than the one before."""
    t, kinds = t.clone(), [change for name, change in KINDS.items() if name != "assorted"]
    for i, change in enumerate(kinds):
        if t[i :: len(kinds)].numel():
            t[i :: len(kinds)] = change(t[i :: len(kinds)], info, generator)
    return t


KINDS["assorted"] = _assorted


class Make:
    """Makes inputs of one shape and dtype; what a subject's `inputs` is given.

    shape: the sizes. dtype: of floating-point inputs. values: one of `KINDS`. lengths: rows of each sequence of the
    batch, where an item of the batch is a sequence.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        values: str = "normal",
        seed: int = 7,
        lengths: tuple[int, ...] = (),
    ) -> None:
        self.shape, self.dtype, self.device, self.values, self.lengths = shape, dtype, device, values, lengths
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *size: int) -> Tensor:
        """Random values of this kind; if strided, every second column of a tensor of another memory layout."""
        wide = (*size[:-1], 2 * size[-1]) if self.shape.strided else size
        t = torch.randn(wide, generator=self.generator)
        t = KINDS[self.values](t, torch.finfo(self.dtype), self.generator).to(self.device, self.dtype)
        if not self.shape.strided:
            return t
        return t.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2] if t.ndim > 2 else t[..., ::2]

    def ints(self, high: int, *size: int) -> Tensor:
        """Random int64 in [0, high)."""
        return torch.randint(high, size, generator=self.generator).to(self.device)

    def x(self) -> Tensor:
        """[*lead, k]."""
        return self.randn(*self.shape.lead, self.shape.k)

    def matrix(self) -> Tensor:
        """[rows, k]."""
        return self.randn(self.shape.rows, self.shape.k)
