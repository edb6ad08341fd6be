"""What a call allocates, launches and writes, as far as `bi_ops.core.replay` has to know it.

A launch that may be replayed is written ``recorded(kernel)[grid](...)``; `empty` allocates what it needs or returns.
Outside of a recording both do what their names say and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.compiler import CompiledKernel

from bi_ops.core import runtime


class Launch(NamedTuple):
    """A launch that was made. run: makes it again, given all of the kernel's arguments in their order."""

    run: Callable[..., object]
    arguments: list[Any]


class Recording:
    """allocated, written: tensors. launches: None once a launch cannot be made again."""

    def __init__(self) -> None:
        self.allocated: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []
        self.launches: list[Launch] | None = []

    def __enter__(self) -> Recording:
        _current.recording = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.recording = None


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


def is_recording() -> bool:
    """Is a call of this thread being recorded?"""
    return _current.recording is not None


class _Recorded:
    """A kernel whose launches join a recording."""

    def __init__(self, kernel: Any, recording: Recording) -> None:
        self._kernel, self._recording = kernel, recording

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        ordinary = self._kernel[grid]

        def launch(*args: Any, **options: Any) -> object:
            compiled = ordinary(*args, **options)
            given = dict(zip(self._kernel.arg_names, args, strict=False)) | options
            run: Callable[..., object] | None = None
            if runtime.INTERPRET:
                run = ordinary
            elif isinstance(compiled, CompiledKernel):
                run = compiled[(*grid, 1, 1)[:3]]
            if run is None or not given.keys() >= set(self._kernel.arg_names):
                self._recording.launches = None  # compiled later, by another thread, or an argument has a default
            elif self._recording.launches is not None:
                self._recording.launches.append(Launch(run, [given[name] for name in self._kernel.arg_names]))
            return compiled

        return launch


def recorded(kernel: Any) -> Any:
    """`kernel`; its launch joins the recording of this thread, if there is one."""
    recording = _current.recording
    return kernel if recording is None else _Recorded(kernel, recording)


def empty(
    like: torch.Tensor, shape: torch.Size | tuple[int, ...] | int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``like.new_empty(shape)``, which a replay allocates anew."""
    t = like.new_empty(shape, dtype=dtype)
    if (recording := _current.recording) is not None:
        recording.allocated.append(t)
    return t


def written(t: torch.Tensor) -> None:
    """Tell autograd, and a recording, that an operator writes into its argument `t`."""
    torch.autograd.graph.increment_version(t)
    if (recording := _current.recording) is not None:
        recording.written.append(t)
