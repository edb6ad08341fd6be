"""Places in vLLM as data: a function, and what it must look like."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Point:
    """`module.attribute`, a function of `parameters`. attribute: a function's name, or Class.method."""

    module: str
    attribute: str
    parameters: tuple[str, ...]

    def holder(self, module: ModuleType) -> tuple[Any, str]:
        """(what holds the function: the module or a class of it, or None; the function's name there)"""
        owner, _, name = self.attribute.rpartition(".")
        return getattr(module, owner, None) if owner else module, name

    def stock(self, module: ModuleType) -> Callable[..., Any]:
        """The function.

        Raises:
            RuntimeError: it is missing or has other parameters, so this vLLM is not the one that was checked.
        """
        holder, name = self.holder(module)
        target = getattr(holder, name, None)
        difference = self.difference(tuple(inspect.signature(target).parameters) if callable(target) else None)
        if target is None or difference is not None:
            raise RuntimeError(
                f"vllm_plugin: {difference} in vLLM {importlib.metadata.version('vllm')}; install a release whose "
                "patch points were checked (see bi_ops doctor)"
            )
        return target

    def difference(self, found: tuple[str, ...] | None) -> str | None:
        """What is wrong with a function of parameters `found` here (None: there is none); None: nothing."""
        if found is None:
            return f"{self.module}.{self.attribute} is missing"
        if found != self.parameters:
            return f"{self.module}.{self.attribute} has parameters {found}, expected {self.parameters}"
        return None


class Replaced(NamedTuple):
    """A function of vLLM's that is replaced for the whole process. parameters: those that it has first."""

    module: str
    attribute: str
    parameters: tuple[str, ...]
    build: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str
