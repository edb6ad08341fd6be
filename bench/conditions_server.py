"""A server in a process of its own, many clients, and what they get when it is killed and started again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A completion: the sampled ids and their log-probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def read_answer(reply: dict[str, Any]) -> Answer:
    """The first choice of an OpenAI completion whose tokens are written as "token_id:7"."""
    found = reply["choices"][0]["logprobs"]
    return Answer(tuple(int(t.rpartition(":")[2]) for t in found["tokens"]), tuple(found["token_logprobs"]))


class Server:
    """An HTTP server that answers /health and /v1/completions; `command` gets --host and --port."""

    def __init__(self, command: list[str], log: Path, patience: float = 300) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [*command, "--host=127.0.0.1", f"--port={self.port}"]
        self.log, self.patience = log, patience
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it is healthy. Raises RuntimeError if it ends or is not in time."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}; see {self.log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server was not healthy after {self.patience} s; see {self.log}")

    def kill(self) -> None:
        """SIGKILL to the server and to every process that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def ask(self, body: dict[str, Any]) -> Answer:
        """One completion. Raises OSError if the server is gone."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.patience) as reply:
                return read_answer(json.load(reply))
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"the server answered {error.code}: {error.read()[:500]!r}") from None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def ask_all(
    server: Server, bodies: list[dict[str, Any]], clients: int, kill_after: int | None = None
) -> tuple[list[Answer], dict[int, Answer]]:
    """An answer to each body, asked by so many clients at a time.

    kill_after: after so many answers the server is killed and started again, and who got none asks again. Then what was
    answered before is asked once more: those answers are the second result, by the body's index.

    Raises:
        OSError, RuntimeError: the server was gone, or refused a body, and was not killed here.
    """
    answers: dict[int, Answer] = {}
    killed: list[int] = []
    lock = threading.Lock()

    def client(index: int) -> None:
        answer = server.ask(bodies[index])
        with lock:
            answers[index] = answer
            if kill_after is not None and not killed and len(answers) >= kill_after:
                killed.extend(answers)
                server.kill()

    def ask(indices: Iterable[int]) -> None:
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(client, i) for i in indices]:
                try:
                    future.result()
                except (OSError, ValueError, http.client.HTTPException):  # killed before or while it answered
                    if kill_after is None or started:
                        raise

    started = False
    ask(range(len(bodies)))
    again: dict[int, Answer] = {}
    if kill_after is not None:
        server.start()
        started = True
        ask([i for i in range(len(bodies)) if i not in answers])
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            again = dict(zip(killed, pool.map(lambda i: server.ask(bodies[i]), killed), strict=True))
    return [answers[i] for i in range(len(bodies))], again
