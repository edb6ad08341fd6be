"""Kernels compiled in parallel before they are needed: a step is traced, every launch compiled and none run.

Triton compiles a kernel in the call that first launches it, has gcc build its launcher and loads both, one kernel after
the other. Here each call hands all of this to a pool and goes on; the results are in Triton's cache, for this process
and for later ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from bi_ops.core import replay, runtime
from bi_ops.core.files import cache_folder, write_json

#: Called with (kernels compiled, kernels asked for so far).
Progress = Callable[[int, int], None]


class _Pool:
    """The executor that Triton gives kernels to: a task ends with a kernel that can be launched at once."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def submit(self, compiled: Callable[[], Any]) -> Future[Any]:
        # A thread of the pool has a current GPU of its own, and modules belong to one.
        return self._threads.submit(_ready, compiled, torch.cuda.current_device())


def _ready(compiled: Callable[[], Any], device: int) -> Any:
    """The kernel, its launcher built and both loaded onto the GPU, which Triton leaves to the first launch."""
    from triton.runtime.errors import OutOfResources

    kernel = compiled()
    # A config that this GPU does not hold raises where it is launched, and a sweep compiles such ones too.
    with torch.cuda.device(device), contextlib.suppress(OutOfResources):
        kernel.run  # noqa: B018  (the property builds and loads)
    return kernel


class Compiled:
    """What was compiled. kernels: their names, one for each specialisation."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.done = 0


@contextlib.contextmanager
def compile_only(jobs: int | None = None, progress: Progress = lambda done, total: None) -> Iterator[Compiled]:
    """While this is entered, launches of Triton's and Gluon's kernels compile in `jobs` threads and do not run.

    What kernels would have written is undefined memory then, so nothing may depend on values. Leaving it waits for all,
    which are then on the GPU. LLVM, ptxas and gcc, most of the time, run without the GIL. In the interpreter
    nothing is compiled. Kernels that Triton tunes by timing several configs are left for their first launch.

    Raises:
        RuntimeError: a kernel does not compile; triton's own error.
    """
    found = Compiled()
    if runtime.INTERPRET:
        yield found
        return
    from triton.runtime import _async_compile
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    lock, run, tune = threading.Lock(), JITFunction.run, Autotuner.run
    with replay.paused(), ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        mode = _async_compile.AsyncCompileMode(_Pool(pool))

        def compile_and_return(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            with lock:  # the thread of the backward launches too, and it has a context of its own
                before, token = len(mode.raw_futures), _async_compile.active_mode.set(mode)
                try:
                    kernel = run(self, *args, grid=grid, warmup=True, **options)
                finally:
                    _async_compile.active_mode.reset(token)
                if len(mode.raw_futures) > before:
                    found.kernels.append(self.fn.__name__)
                    mode.raw_futures[-1].add_done_callback(count)
            return kernel

        def tune_later(self: Any, *args: Any, **options: Any) -> Any:
            return tune(self, *args, **options) if len(self.configs) == 1 else None

        def count(future: Any) -> None:
            found.done += 1
            progress(found.done, len(found.kernels))

        JITFunction.run, Autotuner.run = compile_and_return, tune_later
        try:
            yield found
        finally:
            JITFunction.run, Autotuner.run = run, tune
            for future in list(mode.future_kernels.values()):
                future.result()


def use_cache(path: str | Path) -> None:
    """Keep kernels in `path` instead of Triton's own folder, for instance one that a cluster shares.

    Entries are named by the kernel's source, the compiler and the GPU, so machines of several kinds may share it.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(path)


# --------------------------------------------------------------------------------------------------------------
# what is warm: a file of records


def where() -> str:
    """GPU, driver and versions: what compiled kernels belong to."""
    if runtime.INTERPRET:
        return "interpreter"
    names = (torch.cuda.get_device_name(), f"driver {_driver()}", f"torch {torch.__version__}")
    return ", ".join((*names, f"Triton {triton.__version__}", f"cache {triton.knobs.cache.dir}"))


def _driver() -> str:
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return next((word for word in first.split() if word[:1].isdigit() and "." in word), "unknown")
    return "unknown"


def path() -> Path:
    """Where the records are."""
    return cache_folder() / "warm_kernels.json"


def records() -> dict[str, Any]:
    """What was compiled on this GPU, driver and versions: the step's name to its number of kernels and seconds."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    here = found.get(where(), {}) if isinstance(found, dict) else {}
    return here if isinstance(here, dict) else {}


def remember(step: str, kernels: int, seconds: float) -> None:
    """Record that the kernels of `step` are in the cache."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    found = found if isinstance(found, dict) else {}
    path().parent.mkdir(parents=True, exist_ok=True)
    mine = found.get(where())
    found[where()] = {
        **(mine if isinstance(mine, dict) else {}),
        step: {"kernels": kernels, "seconds": round(seconds, 1)},
    }
    write_json(path(), found)
