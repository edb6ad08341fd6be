"""Orders as values: what fixes an operator's bits, as data that code passes, prints, hashes and compares.

An operator's `order(problem, arch)` takes no count of rows, tokens, sequences or SMs. Kernels take the constants that
shape a sum from the order alone; a config only sets the speed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Order:
    """Base of every operator's order: frozen, hashable, printable. Equal orders mean equal bits on one architecture."""

    def as_dict(self) -> dict[str, Any]:
        """The order as JSON can hold it: its kind, then its fields."""
        return {"kind": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


@dataclass(frozen=True)
class ElementwiseOrder(Order):
    """Every element is computed by itself in fp32; `forward` and `backward` name the values that are rounded, in turn.

    A value is rounded to the dtype of the result, or to fp32 where its name says so.
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Order):
        return value.as_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class OrderRecord:
    """The orders that a model was computed in: what a rollout hands to what trains on it.

    arch: the name of the architecture. orders: for each operator of the model, `Order.as_dict()`.
    """

    arch: str
    orders: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, arch: str, orders: Mapping[str, Order]) -> OrderRecord:
        """The record of these orders, by operator."""
        return cls(arch, {name: order.as_dict() for name, order in sorted(orders.items())})

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it, its digest included."""
        return {"arch": self.arch, "orders": {n: dict(o) for n, o in self.orders.items()}, "digest": self.digest}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OrderRecord:
        """What `as_dict` wrote.

        Raises:
            ValueError: no such record, or one whose digest is not that of its orders.
        """
        try:
            record = cls(str(values["arch"]), {n: dict(o) for n, o in values["orders"].items()})
            told = values["digest"]
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"orders: not a record of orders ({type(e).__name__}: {e})") from e
        if told != record.digest:
            raise ValueError(f"orders: the record's digest is {told}, its orders have {record.digest}; it was edited")
        return record

    @property
    def digest(self) -> str:
        """SHA-256 over architecture and orders, 16 hexadecimal digits: equal digests, equal orders."""
        text = json.dumps({"arch": self.arch, "orders": self.orders}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: OrderRecord) -> list[str]:
        """What differs, a line each, this record's value first; empty if nothing does."""
        found = [] if self.arch == other.arch else [f"architecture {self.arch} and {other.arch}"]
        for name in sorted({*self.orders, *other.orders}):
            mine, theirs = self.orders.get(name), other.orders.get(name)
            if mine != theirs:
                found.append(f"{name}: {mine} and {theirs}")
        return found
