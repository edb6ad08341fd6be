"""Parts of tensors that the GPUs of a host copy into each other's memory, and their sums in the order of the tree.

A kernel of a collective library takes SMs, and a persistent GEMM beside it waits for each that it does not get. Here
the copy engines move the parts, and a stream waits for what other ranks have sent, not a kernel: of the SMs a sum takes
its additions alone. These, and copies within a GPU, which take SMs too, have to wait until a GEMM beside them ends. So
much is sent at once, and then added at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bi_ops.core.integers import cdiv
from bi_ops.core.pairwise import pairwise_into
from bi_ops.parallel.peer.memory import PeerMemory
from bi_ops.parallel.ranks import Ranks

#: Bytes of all ranks' parts that are on their way at once; they are received in one of two halves of so many. The
#: gradients of a layer of 1.7B are 200 MiB.
BYTES = 256 << 20
#: Bytes between two ranks' signals, so that no two of them share a line of the cache; parts begin at multiples of it.
LINE = 256
#: Of the driver: wait until the difference, as a signed number of 32 bits, is not negative; then see every write that
#: came before that one, where the device can be asked to (`CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES`).
_AT_LEAST, _FLUSH, _CAN_FLUSH = 0, 1 << 30, 98
#: Of so many sizes of parts it is kept where they travel: of each layer, and of rows that are others in each step.
PLANS = 64


class _Span(NamedTuple):
    """Of part `i` the elements that are sent at once. cut: which; None: all.

    there: by rank, where that one receives this rank's. here: by rank, where this one receives theirs.
    """

    i: int
    cut: slice | None
    there: Sequence[torch.Tensor]
    here: Sequence[torch.Tensor]

    def of(self, part: torch.Tensor) -> torch.Tensor:
        return part if self.cut is None else part[self.cut]


class PeerCopies:
    """An `Exchange` of ranks of one host, by copies into each other's memory; the bits of any other.

    Every rank makes the same calls in the same order, on any stream: a call comes behind the one before it. A CUDA
    graph may capture calls, all on one stream, and be replayed.

    A swap: send what is for the others, give each a signal, wait for theirs, take the signals back. Swaps receive in
    two halves in turn, and a call makes an even number of them. So before a half is written again its owner has given
    a signal in the other one, which it does behind all that it has done with what the first held.

    Args:
        ranks: at least 2 of one host, a power of two. device: this rank's GPU. n_bytes: that are received at once.
        memory: at least `memory_bytes` of each rank; None: allocated.

    Raises:
        ValueError: a number of ranks that is no power of two above 1, fewer bytes than they need, or too little memory.
        RuntimeError: as `PeerMemory`.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, n_bytes: int = BYTES, memory: PeerMemory | None = None
    ) -> None:
        if ranks.size < 2 or ranks.size & (ranks.size - 1):
            raise ValueError(f"parallel.peer: {ranks.size} ranks; they are added pairwise: take 2, 4 or 8")
        if n_bytes < ranks.size * LINE:
            raise ValueError(f"parallel.peer: n_bytes is {n_bytes}; {ranks.size} ranks need {ranks.size * LINE}")
        needed = self.memory_bytes(ranks.size, n_bytes)
        self.ranks, self._slot = ranks, n_bytes // ranks.size // LINE * LINE
        self.memory = PeerMemory(ranks, needed, device) if memory is None else memory
        if self.memory.n_bytes < needed:
            raise ValueError(f"parallel.peer: {n_bytes} bytes need {needed}, not {self.memory.n_bytes}")
        self._others = [(ranks.rank + i) % ranks.size for i in range(1, ranks.size)]  # not all to one rank first
        self.device = device
        halves = [[self._half(half, rank) for rank in range(ranks.size)] for half in range(2)]
        #: By half and rank: where it receives, a row of bytes from each; and int32 [1] from each, 1 until it was taken.
        self._rows = [[t[ranks.size * LINE :].view(ranks.size, -1) for t in half] for half in halves]
        self._given = [
            [[t[of * LINE :][:4].view(torch.int32) for of in range(ranks.size)] for t in half] for half in halves
        ]
        self._signals: _OfHost | _OfStream = _OfStream(device) if device.type == "cuda" else _OfHost()
        self._done: torch.cuda.Event | None = None
        self._plan = functools.lru_cache(PLANS)(self._planned)

    @staticmethod
    def memory_bytes(size: int, n_bytes: int) -> int:
        """Of each of `size` ranks: two halves, of a signal of each and what they send."""
        return 2 * size * (LINE + cdiv(n_bytes, size * LINE) * LINE)

    @torch.no_grad()
    def sum(self, flats: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """flats: [ranks * n], contiguous -> of each this rank's part [n] of the pairwise sum over the ranks.

        outs: where these are put, which may be this rank's part of a flat; None: in memory of their own.

        Raises:
            ValueError: another shape, not contiguous, or on another device.
        """
        me, size = self.ranks.rank, self.ranks.size
        for flat in flats:
            self._check("sum", flat, flat.numel() % size == 0, f"a multiple of {size} elements")
        parts = [flat.view(size, -1).unbind() for flat in flats]
        found = [torch.empty_like(each[me]) for each in parts] if outs is None else list(outs)
        with self._in_order():
            for half, spans in self._plan(*((len(each[me]), each[me].dtype) for each in parts)):
                self._swap(half, spans, parts)
                for span in spans:
                    received = [*span.here]
                    received[me] = span.of(parts[span.i][me])
                    pairwise_into(span.of(found[span.i]), received, me)
        return found

    @torch.no_grad()
    def gather(self, outs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]) -> None:
        """shards: [n]; outs: [ranks * n], which get those of all ranks; contiguous. A shard may be its part of its out.

        Raises:
            ValueError: other shapes or dtypes, not contiguous, or on another device.
        """
        me, size = self.ranks.rank, self.ranks.size
        for out, shard in zip(outs, shards, strict=True):
            fits = out.dtype == shard.dtype and out.numel() == size * shard.numel()
            self._check("gather", shard, shard.ndim == 1, "[n]")
            self._check("gather", out, fits, f"{size} times the shard's {list(shard.shape)} in {shard.dtype}")
        parts = [out.view(size, -1).unbind() for out in outs]
        sent = [[shard] * size for shard in shards]
        with self._in_order():
            for half, spans in self._plan(*((len(shard), shard.dtype) for shard in shards)):
                self._swap(half, spans, sent)
                for span in spans:
                    for rank in self._others:
                        span.of(parts[span.i][rank]).copy_(span.here[rank])
            for each, shard in zip(parts, shards, strict=True):
                if each[me].data_ptr() != shard.data_ptr():
                    each[me].copy_(shard)

    def _check(self, op: str, t: torch.Tensor, fits: bool, wanted: str) -> None:
        if not (fits and t.ndim == 1 and t.is_contiguous() and t.device.type == self.device.type):
            raise ValueError(
                f"parallel.peer: {op} got {list(t.shape)} of {t.dtype} on {t.device}; it must be one contiguous axis "
                f"on {self.device.type}, {wanted}"
            )

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """What the block launches comes behind the last such block, whichever stream that was on."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._done is not None:
            stream.wait_event(self._done)
        yield
        self._done = stream.record_event()

    def _planned(self, *parts: tuple[int, torch.dtype]) -> list[tuple[int, list[_Span]]]:
        """(half, what is sent at once) until all parts are, of so many elements of a dtype each.

        Their number is even; the last may have nothing.
        """
        loads: list[list[tuple[int, int, int, int]]] = [[]]  # which part, begin, end, at which byte of a row
        used = 0
        for i, (n, dtype) in enumerate(parts):
            a = 0
            while a < n:
                if used == self._slot:
                    loads.append([])
                    used = 0
                b = min(a + (self._slot - used) // dtype.itemsize, n)
                loads[-1].append((i, a, b, used))
                used += cdiv((b - a) * dtype.itemsize, LINE) * LINE
                a = b
        loads += [[]] * (len(loads) % 2)
        me, size = self.ranks.rank, self.ranks.size

        def place(half: int, of: int, sender: int, at: int, n: int, dtype: torch.dtype) -> torch.Tensor:
            return self._rows[half][of][sender][at : at + n * dtype.itemsize].view(dtype)

        return [
            (
                number % 2,
                [
                    _Span(
                        i,
                        None if b - a == parts[i][0] else slice(a, b),
                        [place(number % 2, rank, me, at, b - a, parts[i][1]) for rank in range(size)],
                        [place(number % 2, me, rank, at, b - a, parts[i][1]) for rank in range(size)],
                    )
                    for i, a, b, at in load
                ],
            )
            for number, load in enumerate(loads)
        ]

    def _half(self, half: int, rank: int) -> torch.Tensor:
        """Of that rank's memory: signals, then rows."""
        size = self.ranks.size * (LINE + self._slot)
        return self.memory.tensors[rank][half * size :][:size]

    def _swap(self, half: int, spans: Sequence[_Span], parts: Sequence[Sequence[torch.Tensor]]) -> None:
        """parts: of each, what is for each rank. When it is through, what all have sent is in this rank's rows.

        With nothing to send these are signals alone.
        """
        me, given = self.ranks.rank, self._given[half]
        for rank in self._others:
            for span in spans:
                span.there[rank].copy_(span.of(parts[span.i][rank]), non_blocking=True)
            self._signals.give(given[rank][me], 1)
        for rank in self._others:
            self._signals.wait(given[me][rank], 1)
            self._signals.give(given[me][rank], 0)


class _OfHost:
    """Signals in memory that processes of a host share."""

    def give(self, signal: torch.Tensor, value: int) -> None:
        """Behind everything that was written before."""
        signal.fill_(value)

    def wait(self, signal: torch.Tensor, value: int) -> None:
        """Until it is at least `value`."""
        while int(signal) < value:
            time.sleep(0)


class _OfStream:
    """Signals that the current stream of a GPU gives, and waits for: neither the host does, nor an SM.

    The driver puts a fence of the whole system before it writes one.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises RuntimeError where the driver does not know them."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            self._store, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"parallel.peer: the driver has no signals between streams: {error}") from error
        for function in (self._store, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        can_flush = ctypes.c_int(0)
        index = torch.cuda.current_device() if device.index is None else device.index
        self._checked(driver.cuDeviceGetAttribute(ctypes.byref(can_flush), _CAN_FLUSH, index), "cuDeviceGetAttribute")
        self._until = _AT_LEAST | (_FLUSH if can_flush.value else 0)

    def give(self, signal: torch.Tensor, value: int) -> None:
        """Behind everything that the stream has written before."""
        self._call(self._store, "cuStreamWriteValue32", signal, value, 0)

    def wait(self, signal: torch.Tensor, value: int) -> None:
        """What the stream gets from now on comes when it is at least `value`."""
        self._call(self._wait, "cuStreamWaitValue32", signal, value, self._until)

    def _call(self, function: Callable[..., int], name: str, signal: torch.Tensor, value: int, flags: int) -> None:
        """Raises RuntimeError if the driver refuses it."""
        stream = torch.cuda.current_stream(signal.device).cuda_stream
        self._checked(function(stream, signal.data_ptr(), value, flags), name)

    @staticmethod
    def _checked(error: int, name: str) -> None:
        if error:
            raise RuntimeError(f"parallel.peer: {name} failed with error {error} of the driver")
