"""Processes that get ready at the same time, compiling, and then take turns, each alone with the machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

READY = "ready for its turn"
#: Seconds in which what a process has printed is read once it has ended.
GRACE = 5.0


def wait_for_turn() -> None:
    """In a process of `Turn`: say that it is ready, and wait until it is its turn."""
    print(READY, flush=True)
    sys.stdin.readline()


class Turn:
    """A process that calls `wait_for_turn` once. Everything it prints is kept."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.printed: list[str] = []
        self.errors: list[str] = []
        self._ready = threading.Event()
        streams = ((self._process.stdout, self.printed), (self._process.stderr, self.errors))
        self._readers = [threading.Thread(target=self._read, args=given, daemon=True) for given in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            if line.rstrip("\n") == READY:
                self._ready.set()
            else:
                lines.append(line.rstrip("\n"))
        self._ready.set()  # it has ended

    def wait_ready(self, timeout: float | None) -> None:
        """Until it is ready, or has ended, or the time is over."""
        self._ready.wait(timeout)

    def take(self, timeout: float | None) -> int | None:
        """Its turn: the exit status; None if it had to be ended because the time was over."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.write("\n")
            self._process.stdin.close()
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            return None
        for reader in self._readers:
            reader.join(GRACE)  # what the process has started may keep its pipes open
        return status

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
