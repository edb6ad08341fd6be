"""vLLM's sleep mode: its weights and its KV cache leave the GPU between rollouts, so that training has their memory."""

from __future__ import annotations

from typing import Any

import torch

#: What vLLM calls what it gives back, in the order in which it returns: weights are filled before the cache is there.
TAGS = ("weights", "kv_cache")

#: vLLM's levels: weights are kept in the host's memory, or forgotten.
LEVELS = (1, 2)


class SleepMode:
    """Which parts of an engine are on the GPU.

    Args:
        llm: vLLM's `LLM`. enabled: it was made with enable_sleep_mode.
    """

    def __init__(self, llm: Any, enabled: bool) -> None:
        self._llm, self.enabled = llm, enabled
        #: The tags of what is not on the GPU.
        self._away: list[str] = []
        #: The weights have no values, until `filled`.
        self._empty = False

    @property
    def asleep(self) -> bool:
        """Is anything not on the GPU?"""
        return bool(self._away)

    def sleep(self, level: int) -> None:
        """Give the memory back; nothing happens if the engine is asleep.

        Raises:
            RuntimeError: sleep mode is off. ValueError: a level that vLLM does not have.
        """
        if not self.enabled:
            raise RuntimeError("sleep: the engine holds its memory; make it with sleep_mode=True")
        if level not in LEVELS:
            raise ValueError(f"sleep: level is {level!r}; it must be 1 (weights stay in host memory) or 2 (forgotten)")
        if not self.asleep:
            self._llm.sleep(level=level)
            self._away, self._empty = list(TAGS), level == 2

    def wake_up(self, *tags: str) -> None:
        """Take the memory of these parts again; those that are there stay as they are."""
        wanted = [tag for tag in self._away if tag in tags]
        if wanted:
            torch.cuda.empty_cache()  # what torch keeps of training is not vLLM's to take
        for tag in wanted:
            self._llm.wake_up(tags=[tag])
            self._away.remove(tag)

    def filled(self) -> None:
        """The weights have values again."""
        self._empty = False

    def check(self, op: str) -> None:
        """Raise RuntimeError if the engine cannot generate now."""
        if self.asleep:
            raise RuntimeError(f"{op}: the engine is asleep; call update_weights, or wake_up after sleep(level=1)")
        if self._empty:
            raise RuntimeError(f"{op}: the engine forgot its weights when it slept; call update_weights")
