"""Work spread over processes, and the processes over the GPUs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from bi_ops.core import runtime

Item = TypeVar("Item")
Found = TypeVar("Found")

#: Processes that share a GPU at most: each has a CUDA context, and they take turns.
PER_GPU = 16


def default_jobs() -> int:
    """A process for each core, since compiling kernels is most of the time, and at most `PER_GPU` for each GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, PER_GPU * (1 if runtime.INTERPRET else max(torch.cuda.device_count(), 1)))


def _visible() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _start(started: Any, gpus: Sequence[str]) -> None:
    """In each process, before it has a CUDA context: one thread, one GPU."""
    torch.set_num_threads(1)
    # Inductor would start as many processes again, in each of these.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with started.get_lock():
        place, started.value = started.value, started.value + 1
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]


def outcomes(
    run: Callable[[Item], Found], work: Sequence[Item], jobs: int, until: float | None = None
) -> Iterator[tuple[Item, Found | BaseException | None]]:
    """(item, what `run` returned) as they come; items are begun in their order.

    Args:
        run: a module's function. jobs: processes; 1: this one. until: of `time.monotonic`; what has not begun then is
            given with None. An item whose process died is given with the exception; what ran beside it is run again.
    """

    def late() -> bool:
        return until is not None and time.monotonic() >= until

    if jobs == 1:
        for item in work:
            yield item, None if late() else run(item)
        return
    left, most = list(work), jobs
    while left:
        lost: list[tuple[Item, BaseException]] = []
        for item, found in _of_a_pool(run, left, min(most, len(left)), late):
            if isinstance(found, BrokenProcessPool):
                lost.append((item, found))  # one of them did it, or one before it, which nobody says
            else:
                yield item, found
        lost.sort(key=lambda pair: left.index(pair[0]))
        if len(lost) == len(left):
            if most == 1:  # the first one, in a process that had done nothing before
                yield lost.pop(0)
                most = jobs
            else:
                most = 1
        left = [item for item, _ in lost]


def _of_a_pool(
    run: Callable[[Item], Found], work: Sequence[Item], jobs: int, late: Callable[[], bool]
) -> Iterator[tuple[Item, Found | BaseException | None]]:
    """As `outcomes`; all that had not ended when a process died has that exception."""
    context = multiprocessing.get_context("spawn")
    arguments = (context.Value("i", 0), [] if runtime.INTERPRET else _visible())
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=arguments) as pool:
        futures = {pool.submit(run, item): item for item in work}
        for future in as_completed(futures):
            if late():
                for other in futures:
                    other.cancel()
            if future.cancelled():
                yield futures[future], None
            else:
                yield futures[future], future.exception() or future.result()
