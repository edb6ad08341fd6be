"""What a call allocates, launches and writes, as far as `bi_ops.core.replay` has to know it.

A launch that may be replayed is written ``recorded(kernel)[grid](...)``; `empty` and `filled` allocate what it needs or
returns. Outside of a recording they do what their names say and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.compiler import CompiledKernel

from bi_ops.core import runtime


class Launch(NamedTuple):
    """A launch that was made. arguments: all of the kernel's, in their order. run: makes it again, given such.

    run is None where that cannot be: a kernel that another thread compiles, or an argument left to its default.
    allocated: how many of the recording's tensors there were.
    """

    kernel: str
    run: Callable[..., object] | None
    arguments: dict[str, Any]
    allocated: int


class Recording:
    """What a call allocates, writes and launches while this is entered."""

    def __init__(self) -> None:
        #: And what each begins filled with, None: anything.
        self.allocated: list[tuple[torch.Tensor, int | None]] = []
        self.written: list[torch.Tensor] = []
        self.launches: list[Launch] = []

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
            names = self._kernel.arg_names
            given = dict(zip(names, args, strict=False)) | options
            run: Callable[..., object] | None = None
            if given.keys() >= set(names):
                if runtime.INTERPRET:
                    run = ordinary
                elif isinstance(compiled, CompiledKernel):
                    run = compiled[(*grid, 1, 1)[:3]]
            arguments = {name: given[name] for name in names if name in given}
            n = len(self._recording.allocated)
            self._recording.launches.append(Launch(self._kernel.fn.__name__, run, arguments, n))
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
        recording.allocated.append((t, None))
    return t


def filled(
    like: torch.Tensor,
    shape: torch.Size | tuple[int, ...] | int,
    dtype: torch.dtype | None = None,
    value: int = 0,
) -> torch.Tensor:
    """Memory of `like`'s kind that holds `value`; a replay allocates and fills it anew, before its first launch."""
    t = like.new_full((shape,) if isinstance(shape, int) else shape, value, dtype=dtype)
    if (recording := _current.recording) is not None:
        recording.allocated.append((t, value))
    return t


def written(t: torch.Tensor) -> None:
    """Tell autograd, and a recording, that an operator writes into its argument `t`."""
    torch.autograd.graph.increment_version(t)
    if (recording := _current.recording) is not None:
        recording.written.append(t)
