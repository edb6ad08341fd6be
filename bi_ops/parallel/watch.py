"""Which rank has ended: a process that is killed says nothing, and the others wait for it in a collective.

Every rank keeps a connection to the first one. The operating system closes those of a process that ends, however it
ends, and keep-alive packets find a machine that is gone. So a rank is lost when its connection ends without a farewell,
and the first one tells the others. Nothing is asked of a rank that computes, so a slow one is not taken for a lost one.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from typing import IO

import torch.distributed as dist

from bi_ops.parallel.ranks import Ranks

#: Seconds that a rank has to notice by itself, in its collective; then its process is ended.
GRACE = 30.0
#: Seconds in which a lost connection of torch.distributed is explained.
EXPLAINED = 5.0
#: Seconds in which ranks find one another.
CONNECTED = 60.0
#: Seconds until a machine that does not answer is gone: idle, between packets, and how many of them.
KEEPALIVE = (5, 5, 3)
#: The exit code of a process that is ended.
EXIT_CODE = 3


class RankLost(RuntimeError):
    """Another rank has ended. rank: which; why: its own words, None where it had none."""

    def __init__(self, rank: int, why: str | None, size: int) -> None:
        said = "was killed, or its machine is gone" if why is None else f"failed with {why}"
        super().__init__(
            f"parallel: rank {rank} of {size} {said}; this run is over. Resume it from its latest checkpoint "
            "(--resume), on any number of ranks that divides the atoms, with shards or without"
        )
        self.rank, self.why = rank, why


def _server(backlog: int) -> socket.socket:
    """On a port that is free, of every address of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
        if hasattr(socket, name):  # as Linux calls them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Watch:
    """The connections of this rank: to the first one, or as that to all others.

    A line on a connection is JSON: null is a farewell, [rank, words] a rank that has failed or is lost.
    """

    def __init__(self, ranks: Ranks, grace: float) -> None:
        self.ranks, self.grace = ranks, grace
        self.found: RankLost | None = None
        self.explained = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._connections = self._connect()
        self._thread = threading.Thread(target=self._listen, name="bi_ops ranks", daemon=True)
        self._thread.start()

    def _connect(self) -> dict[int, socket.socket]:
        """By rank: the first one's to all others, theirs to the first.

        Raises:
            RuntimeError: a rank cannot be reached.
        """
        with contextlib.ExitStack() as stack:
            server = address = None
            if self.ranks.rank == 0:
                # torchrun says where the first rank is; without it all are on one machine.
                host = os.environ.get("MASTER_ADDR", "localhost")
                server = stack.enter_context(_server(self.ranks.size))
                address = (host, server.getsockname()[1], secrets.token_hex(16))
            host, port, token = next(a for a in self.ranks.gather(address) if a is not None)
            try:
                found = self._call(host, port, token) if server is None else self._answer(server, token)
            except OSError as error:
                raise RuntimeError(
                    f"parallel: rank {self.ranks.rank} of {self.ranks.size} found no connection between the first rank "
                    f"and the others at {host}, port {port} ({error}); every rank must reach MASTER_ADDR"
                ) from error
        for connection in found.values():
            connection.settimeout(None)
            _keep_alive(connection)
        return found

    def _call(self, host: str, port: int, token: str) -> dict[int, socket.socket]:
        connection = socket.create_connection((host, port), timeout=CONNECTED)
        connection.sendall(f"{token} {self.ranks.rank:8d}".encode())
        return {0: connection}

    def _answer(self, server: socket.socket, token: str) -> dict[int, socket.socket]:
        found: dict[int, socket.socket] = {}
        server.settimeout(CONNECTED)
        while len(found) < self.ranks.size - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECTED)
            said = connection.recv(len(token) + 9, socket.MSG_WAITALL)
            if hmac.compare_digest(said[: len(token)], token.encode()):
                found[int(said[len(token) :])] = connection
            else:
                connection.close()  # somebody else's
        return found

    def _listen(self) -> None:
        """Until every other rank has said farewell, or one is lost."""
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for connection in self._connections.values():
                stack.enter_context(connection)
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, (rank, connection.makefile("rb")))
            while selector.get_map():
                for key, _ in selector.select():
                    rank, file = key.data
                    said = self._read(file)
                    if said is None:  # a farewell
                        selector.unregister(key.fileobj)
                        continue
                    self._lost(*(said or (rank, None)))
                    return

    @staticmethod
    def _read(file: IO[bytes]) -> tuple[int, str | None] | tuple[()] | None:
        """A line; () where the connection has ended."""
        try:
            line = file.readline()
            return None if line == b"null\n" else tuple(json.loads(line)) if line else ()  # type: ignore[return-value]
        except (OSError, ValueError):
            return ()

    def _lost(self, rank: int, why: str | None) -> None:
        """Tell everyone, and end this process unless it ends by itself."""
        self.found = RankLost(rank, why, self.ranks.size)
        self.explained.set()
        if self.ranks.rank == 0:
            self.tell([rank, why])
        if not self._over.is_set():
            # At once: what started the ranks may end this one too, as torchrun does.
            print(f"rank {self.ranks.rank}: {self.found}", file=sys.stderr, flush=True)
            if not self._over.wait(self.grace):
                os._exit(EXIT_CODE)  # the main thread is inside a collective that does not end

    def tell(self, what: object) -> None:
        """Write a line to every connection that still takes one."""
        with self._lock:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(what).encode() + b"\n")

    def close(self, wait: bool) -> None:
        """The main thread is through with the ranks; `wait`: until they are, or nearly so."""
        self._over.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if wait:
            self._thread.join(EXPLAINED)


@contextlib.contextmanager
def watched(ranks: Ranks, grace: float = GRACE) -> Iterator[None]:
    """While this is entered, on every rank, the end of one ends all, with an error that names it.

    Where a collective has failed because a rank is gone, `RankLost` is raised from its error. Where a collective waits
    on (NCCL waits for its own timeout), the process is ended after `grace` seconds, with the same words on stderr: a
    thread cannot be called back from there. What a rank raises itself it raises as it is, and the others are told.

    Raises:
        RankLost: another rank has ended, or raised.
    """
    if ranks.size == 1:
        yield
        return
    watch = _Watch(ranks, grace)
    try:
        yield
    except BaseException as error:
        # A collective's: torch.distributed has no class of its own for every backend.
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            watch.explained.wait(EXPLAINED)
            if watch.found is not None:
                watch.close(wait=False)
                raise watch.found from error
        watch.tell([ranks.rank, f"{type(error).__name__}: {error}"])
        watch.close(wait=False)
        raise
    watch.tell(None)
    watch.close(wait=True)
