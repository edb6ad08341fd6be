"""Rollout engines by name, and the one function that makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bi_ops.core.orders import OrderRecord
from bi_ops.rollout.base import RolloutEngine

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM


class Entry(NamedTuple):
    """One kind of engine.

    make: (path, model, **options) -> engine. needs_model: it copies the model's weights; else it reads the checkpoint
    itself, and starts before the model is loaded, because it sizes its cache by what is free. orders: (path, attention)
    -> those of such an engine, without making it.
    """

    make: Callable[..., RolloutEngine]
    needs_model: bool
    orders: Callable[[str | Path, str | None], OrderRecord]


def _make_embedded(path: str | Path, model: CausalLM | None, **options: Any) -> RolloutEngine:
    from bi_ops.models import load_model
    from bi_ops.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(load_model(path) if model is None else model, **options)


def _embedded_orders(path: str | Path, attention: str | None) -> OrderRecord:
    from bi_ops.models import load_config
    from bi_ops.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine.orders_of(load_config(path), attention)


def _make_vllm(
    path: str | Path, model: CausalLM | None, *, attention: str | None = None, **options: Any
) -> RolloutEngine:
    from bi_ops.rollout.vllm_engine import VllmEngine

    return VllmEngine(path, attention=attention, **options)


def _vllm_orders(path: str | Path, attention: str | None) -> OrderRecord:
    from bi_ops.models import load_config
    from bi_ops.rollout.vllm_engine import VllmEngine

    return VllmEngine.orders_of(load_config(path), attention)


_TABLE: dict[str, Entry] = {
    "embedded": Entry(_make_embedded, True, _embedded_orders),
    "vllm": Entry(_make_vllm, False, _vllm_orders),
}


def register(name: str, entry: Entry) -> None:
    """Make an engine known by name; one of that name is replaced."""
    _TABLE[name] = entry


def names() -> tuple[str, ...]:
    """Every engine that can be made."""
    return tuple(_TABLE)


def lookup(name: str) -> Entry:
    """The engine of this name. Raises ValueError, listing the names, if there is none."""
    if name not in _TABLE:
        raise ValueError(f"rollout: no engine {name!r}; engines are {', '.join(_TABLE)}")
    return _TABLE[name]


def make_engine(name: str, path: str | Path, model: CausalLM | None = None, **options: Any) -> RolloutEngine:
    """The engine `name` over the checkpoint in `path`.

    Args:
        model: whose weights it samples with; needed only where `lookup(name).needs_model`, and then read from `path` if
            it is not given. options: the engine's own, among them `attention`, None for its default.

    Raises:
        ValueError: no such engine, or options that it refuses. RuntimeError: it cannot run here.
    """
    return lookup(name).make(path, model, **options)
