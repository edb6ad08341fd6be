"""Processes that say what they are doing, and are killed at a moment of it."""

from __future__ import annotations

import functools
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bi_ops.core import runtime

Value = TypeVar("Value")
#: What yields while it waits for a process, and returns in the end.
Waiting = Generator[None, None, Value]
#: What a process does, in order, and the call that begins it: (where, name). The first one is how a process starts.
Phases = Mapping[str, "tuple[Any, str] | None"]


class Watch:
    """What a process does, in a page that it shares with the one that forked it.

    numbers: the phase, when the process began and when the phase did, and the last length of each phase, in seconds.
    age: how long the process has run, as it was last looked at.
    """

    def __init__(self, phases: Phases) -> None:
        self.phases, self.names = phases, list(phases)
        self.numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.age = 0.0

    def phase(self) -> str:
        return self.names[int(self.numbers[0])]

    def length(self, phase: str) -> float:
        return self.numbers[3 + self.names.index(phase)]

    def begin(self, phase: str) -> None:
        at = self.names.index(phase)
        if at != self.numbers[0]:
            self.numbers[2] = self.end()
            self.numbers[0] = at

    def end(self) -> float:
        """Note the length of the phase, as of now."""
        now = time.monotonic()
        self.numbers[3 + int(self.numbers[0])] = now - self.numbers[2]
        return now

    def install(self) -> None:
        """In the process that is watched."""
        for phase, call in self.phases.items():
            if call is not None:
                setattr(*call, self.beginning(phase, getattr(*call)))

    def beginning(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            self.begin(phase)
            return function(*args, **options)

        return call


@dataclass(frozen=True)
class Moment:
    """So many seconds of a process, or, with a phase, of the first time that it is in it."""

    seconds: float
    phase: str | None = None

    def has_come(self, watch: Watch) -> bool:
        if self.phase is None:
            return watch.age >= self.seconds
        return watch.phase() == self.phase and time.monotonic() - watch.numbers[2] >= self.seconds


def age(child: int, watch: Watch) -> float:
    """Seconds that a process has run: of a processor's time without a GPU, which waits for nothing but its turn."""
    if runtime.INTERPRET:
        return time.clock_gettime(~child << 3 | 2)  # clock_getcpuclockid(3)
    return time.monotonic() - watch.numbers[1]


def together(waiting: Iterable[Waiting[Any]]) -> list[Any]:
    """What these return, each going on while the others wait."""
    going = dict(enumerate(waiting))
    found: dict[int, Any] = {}
    while going:
        for i, one in list(going.items()):
            try:
                next(one)
            except StopIteration as end:
                found[i] = end.value
                del going[i]
        time.sleep(0.002)
    return [found[i] for i in sorted(found)]


def forked(
    work: Callable[[], object], errors: Path, moment: Moment | None = None, watch: Watch | None = None
) -> Waiting[int | None]:
    """Do `work` in a fork of this process; killed when the moment has come.

    Returns:
        its exit status, and its traceback in `errors`; None if it was killed.
    """
    watch = watch or Watch({"": None})
    watch.numbers[1] = watch.numbers[2] = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            with open(errors.with_suffix(".log"), "w") as log:  # engines say much
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                watch.install()
                work()
                watch.end()
            os._exit(0)
        except BaseException:
            errors.write_text(traceback.format_exc())
            os._exit(1)
    while True:
        watch.age = age(child, watch)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if moment is not None and moment.has_come(watch):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        yield
