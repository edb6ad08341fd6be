"""Providers: more than one implementation of an operator, one table, one place that chooses.

A provider either has the bits of the operator's Triton kernel (`same_bits=True`) and may be chosen for speed, or it
has not, and then nothing may mix the two: what generated a rollout decides what trains on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bi_ops.core.backends import Support as Availability
from bi_ops.core.vllm import availability as vllm_availability

__all__ = ["Availability", "Provider", "ProviderTable", "vllm_availability"]


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    name: what users force it by. available: can it run on this machine. same_bits: equals the Triton kernel.
    batch_invariant: keeps the contract; one that does not serves where it is forced by name, and never in the mode.
    """

    name: str
    available: Callable[[], Availability]
    same_bits: bool
    note: str = ""
    batch_invariant: bool = True


@dataclass
class ProviderTable:
    """The providers of one operator, in order of preference; the first that is available is chosen."""

    op: str
    providers: tuple[Provider, ...]
    _forced: str | None = field(default=None, init=False)

    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.providers)

    def get(self, name: str) -> Provider:
        for p in self.providers:
            if p.name == name:
                return p
        raise ValueError(f"{self.op}: no provider {name!r}; providers are {', '.join(self.names())}")

    def check(self, name: str) -> None:
        """Raise RuntimeError saying why unless provider `name` can run here."""
        here = self.get(name).available()
        if not here.ok:
            raise RuntimeError(f"{self.op}: provider {name!r} cannot run here: {here.reason}")

    def force(self, name: str | None) -> None:
        """Use provider `name` from now on (None: choose again). Raises if it cannot run here."""
        if name is not None:
            self.check(name)
        self._forced = name

    @contextlib.contextmanager
    def forced(self, name: str | None) -> Iterator[None]:
        """Use provider `name` inside the block."""
        before = self._forced
        self.force(name)
        try:
            yield
        finally:
            self._forced = before

    def choose(self) -> str:
        """The name of the provider that runs: the forced one, else the first available one."""
        if self._forced is not None:
            return self._forced
        for p in self.providers:
            if p.available().ok:
                return p.name
        reasons = "; ".join(f"{p.name}: {p.available().reason}" for p in self.providers)
        raise RuntimeError(f"{self.op}: no provider can run here ({reasons})")

    def why(self) -> str:
        """One line for people: why `choose` returns what it returns."""
        name = self.choose()
        if self._forced is not None:
            return "forced"
        return self.get(name).available().reason
