"""Backends: more than one implementation of an operator, one table per operator, one place that chooses.

A backend says which orders it computes. Backends of one order have the same bits and may be swapped for speed; a
backend of another order is another result, so what generated a rollout decides what trains on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from bi_ops.core import replay
from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order


@dataclass(frozen=True)
class Support:
    """Whether something can be done, and why (not). True where it can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Backend:
    """One implementation of an operator.

    name: what `backend=` takes. note: one line for people. batch_invariant: keeps the contract; one that does not
    serves only where it is named, and never in the mode. automatic: may be chosen without being named.
    """

    name: ClassVar[str]
    note: ClassVar[str] = ""
    batch_invariant: ClassVar[bool] = True
    automatic: ClassVar[bool] = True

    def available(self) -> Support:
        """Can it run on this machine? Asked often: keep the answer."""
        return Support(True)

    def order(self, problem: Any, arch: Arch) -> Order:
        """The order in which it computes `problem`, which `supports` has accepted."""
        raise NotImplementedError

    def supports(self, problem: Any, arch: Arch) -> Support:
        """Does it compute `problem` on `arch`? Never a function of rows, tokens or sequences."""
        return Support(True)


B = TypeVar("B", bound=Backend)
Choose = TypeVar("Choose", bound=Callable[..., object])


class Backends(Generic[B]):
    """The backends of one operator, in order of preference.

    `select` is the one place that chooses: the named backend, else one that computes the order that is asked for, else
    the first that can run here and supports the problem.
    """

    def __init__(self, op: str, backends: tuple[B, ...] = ()) -> None:
        self.op = op
        self._backends = list(backends)
        self._caches: list[Callable[[], None]] = []
        self.select = self.cached(self._select)

    def cached(self, choose: Choose) -> Choose:
        """`choose` with its answers kept until the table changes: a choice is asked for in every call."""
        kept = functools.lru_cache(maxsize=4096)(choose)
        self._caches.append(kept.cache_clear)
        return kept  # type: ignore[return-value]

    def _changed(self) -> None:
        replay.forget()
        for clear in self._caches:
            clear()

    def __iter__(self) -> Iterator[B]:
        return iter(self._backends)

    def register(self, backend: B, first: bool = False) -> B:
        """Add a backend, last or first in preference; one of its name is replaced."""
        self._backends = [b for b in self._backends if b.name != backend.name]
        self._backends.insert(0 if first else len(self._backends), backend)
        self._changed()
        return backend

    def unregister(self, name: str) -> None:
        """Take a backend out of the table."""
        self._backends.remove(self.get(name))
        self._changed()

    def names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self._backends)

    def get(self, name: str) -> B:
        """The backend of this name. Raises ValueError, listing the names, if there is none."""
        for b in self._backends:
            if b.name == name:
                return b
        raise ValueError(f"{self.op}: no backend {name!r}; backends are {', '.join(self.names())}")

    def _select(self, problem: Hashable, arch: Arch, backend: str | None = None, order: Order | None = None) -> B:
        """Who computes `problem` on `arch`.

        Args:
            problem: hashable; what decides bits, and no count of rows. backend: a name; None: choose. order: only
                a backend that computes this order.

        Raises:
            ValueError: no backend of that name. RuntimeError: it cannot run here, does not serve the problem, or
            computes another order; without a name: nobody can.
        """
        if backend is not None:
            named = self.get(backend)
            if why := self._refusal(named, problem, arch, order):
                raise RuntimeError(f"{self.op}: backend {backend!r} {why}")
            return named
        refusals = []
        for b in self._backends:
            if not b.automatic:
                continue
            why = self._refusal(b, problem, arch, order)
            if not why:
                return b
            refusals.append(f"{b.name} {why}")
        raise RuntimeError(f"{self.op}: no backend can serve {problem} ({'; '.join(refusals)})")

    @staticmethod
    def _refusal(b: B, problem: Hashable, arch: Arch, order: Order | None) -> str:
        """Why `b` does not compute `problem` in `order`; empty if it does."""
        if not (here := b.available()):
            return f"cannot run here: {here.reason}"
        if not (fits := b.supports(problem, arch)):
            return f"cannot serve {fits.reason}"
        if order is not None and (computed := b.order(problem, arch)) != order:
            return f"computes another order: {computed}, asked for {order}"
        return ""

    def table(self) -> list[dict[str, object]]:
        """A row per backend, for people: name, ok, reason, batch_invariant, automatic, note."""
        rows: list[dict[str, object]] = []
        for b in self._backends:
            here = b.available()
            facts = {"batch_invariant": b.batch_invariant, "automatic": b.automatic, "note": b.note}
            rows.append({"name": b.name, "ok": here.ok, "reason": here.reason, **facts})
        return rows
