"""Gradients and weights that the GPUs of a host copy into each other's memory: the bits of any other exchange."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from stack_fakes import StackModel
from test_fsdp import two_updates
from test_parallel import equal
from test_parallel_overlap import OddModel, gradients_of
from test_parallel_peer import bits, fold, partial, tree

from bi_ops import parallel
from bi_ops.core import runtime
from bi_ops.parallel.fsdp import FullySharded
from bi_ops.parallel.peer import PeerCopies, PeerMemory
from bi_ops.parallel.peer import copies as copying
from bi_ops.parallel.peer.copies import LINE

#: A piece is 64 numbers of a rank: less than one, one, several, and a piece that is not full.
SIZES = (4, 64, 256, 260)


def copies(memory: list[torch.Tensor]) -> PeerCopies:
    """Of this rank. memory: of all ranks, in the host; of GPUs it is allocated."""
    here = parallel.Ranks.of()
    n_bytes = here.size * LINE
    if runtime.INTERPRET:
        device = torch.device("cpu")
        return PeerCopies(here, device, n_bytes, PeerMemory.of_tensors(here, memory))
    return PeerCopies(here, torch.device("cuda", torch.cuda.current_device()), n_bytes)


def shared(size: int, n: int = 1) -> list[list[torch.Tensor]]:
    """Memory for `n` exchanges, which forked processes share."""
    n_bytes = PeerCopies.memory_bytes(size, size * LINE)
    each = [[torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(size)] for _ in range(n)]
    return [[t.share_memory_() for t in memory] for memory in each]


def on_a_rank(memory: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sums and gathers in turn, of all sizes, twice; one rank is late, another time another one."""
    exchange, found = copies(memory), []
    here, device = exchange.ranks, exchange.device
    for i, n in enumerate((*SIZES, *SIZES)):
        if here.rank == i % here.size:
            time.sleep(0.02)
        given = partial(here.rank, here.size * n).to(device)
        before = given.clone()
        [shard] = exchange.sum([given])
        assert torch.equal(bits(given), bits(before)), "what is sent is written over"
        out = torch.full((here.size * n,), 7.0, device=device)
        exchange.gather([out], [shard])
        of_out = out.view(here.size, n)[here.rank]  # as FSDP2 calls it
        of_out.mul_(2.0)
        exchange.gather([out], [of_out])
        found.append((shard.cpu(), out.cpu()))
        halves = torch.arange(here.size * n).bfloat16().to(device).view(here.size, n)
        apart = torch.zeros(here.size * n, dtype=torch.bfloat16, device=device)
        exchange.gather([apart], [halves[here.rank]])
        assert torch.equal(apart, halves.flatten())
    every = [partial(here.rank, here.size * n).to(device) for n in (*SIZES, 0, *SIZES)]  # many in a call: some are cut
    shards = exchange.sum(every)
    into = [torch.full_like(shard, 3.0) for shard in shards]
    assert all(a is b for a, b in zip(exchange.sum(every, into), into, strict=True))
    outs = [torch.empty_like(t) for t in every]
    exchange.gather(outs, shards)
    for i, n in enumerate((*SIZES, 0, *SIZES)):
        wanted = found[SIZES.index(n)] if n else (torch.empty(0),) * 2
        assert torch.equal(bits(shards[i].cpu()), bits(wanted[0])), n
        assert torch.equal(bits(into[i].cpu()), bits(wanted[0])), n
        assert torch.equal(bits(2.0 * outs[i].cpu()), bits(wanted[1])), n
    in_place = [t.view(here.size, -1)[here.rank] for t in every]
    exchange.gather(every, exchange.sum(every, in_place))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(every, outs, strict=True))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_sums_and_gathers_have_the_bits_of_the_tree(size):
    ranks.need_gpus(size)
    memory, other = shared(size)[0], 0
    results = ranks.run(size, on_a_rank, memory)
    for i, n in enumerate((*SIZES, *SIZES)):
        parts = [partial(rank, size * n) for rank in range(size)]
        want = tree(parts, torch.float32)
        other += int((bits(fold(parts, torch.float32)) != bits(want)).sum())
        for rank, found in enumerate(results):
            shard, out = found[i]
            assert torch.equal(bits(shard), bits(want.view(size, n)[rank])), (n, rank)
            assert torch.equal(bits(out), bits(want * 2.0)), (n, rank)
    assert (other > 0) == (size > 2)  # the control; of two there is one order


def layouts_on_a_rank(memory: list[list[torch.Tensor]]) -> dict[str, Any]:
    """Whole and in shards, gradients exchanged while the backward goes on."""
    here = parallel.Ranks.of()
    waiting = [copies(each) for each in memory]
    odd = parallel.Whole(OddModel(), parallel.order(4), here, exchange=waiting[0])
    sharded = FullySharded(StackModel(), parallel.order(8), here, exchange=iter(waiting[1:]).__next__)
    swaps = [0] * len(waiting)
    for i, each in enumerate(waiting):

        def counted(*args: Any, i: int = i, real: Any = each._swap) -> None:
            swaps[i] += 1
            real(*args)

        each._swap = counted  # type: ignore[method-assign, assignment]
    found = {"whole": gradients_of(odd), "shards": two_updates(sharded)}
    assert all(n > 0 and n % 2 == 0 for n in swaps), swaps
    return found


def test_layouts_have_the_bits_of_one_process():
    ranks.need_gpus(2)
    one = gradients_of(parallel.Whole(OddModel(), parallel.order(4)))
    shards = two_updates(parallel.Whole(StackModel(), parallel.order(8)))
    for result in ranks.run(2, layouts_on_a_rank, shared(2, 3)):
        assert equal(result["whole"], one)
        for what in ("norms", "grads", "weights"):
            assert equal(result["shards"][what], shards[what]), what


def unsignalled(memory: list[torch.Tensor]) -> torch.Tensor:
    """The last rank is late, and the first does not wait for it."""
    exchange = copies(memory)
    if exchange.ranks.rank == exchange.ranks.size - 1:
        time.sleep(1.0)
    else:
        exchange._given[0][exchange.ranks.rank][exchange.ranks.size - 1].fill_(1)
    return exchange.sum([partial(exchange.ranks.rank, 8)])[0]


@pytest.mark.skipif(not runtime.INTERPRET, reason="the host's memory")
def test_who_does_not_wait_has_other_bits():
    first, last = ranks.run(2, unsignalled, shared(2)[0])
    want = tree([partial(rank, 8) for rank in range(2)], torch.float32).view(2, 4)
    assert not torch.equal(first, want[0])
    assert torch.equal(last, want[1])


def replayed_on_a_gpu(replays: int) -> int:
    """Elements that differ, of a sum and a gather in a CUDA graph that is replayed on other values."""
    here = parallel.Ranks.of()
    exchange = PeerCopies(here, torch.device("cuda", torch.cuda.current_device()), here.size * 4096)
    given = torch.zeros(here.size * 3000, device=exchange.device)
    out = torch.empty_like(given)
    exchange.gather([out], exchange.sum([given]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange.gather([out], exchange.sum([given]))
    different = 0
    for i in range(replays):
        parts = [partial(rank, given.numel()).to(given.device) * (i + 1) for rank in range(here.size)]
        given.copy_(parts[here.rank])
        graph.replay()
        different += int((bits(out) != bits(tree(parts, torch.float32))).sum())
    return different


@pytest.mark.gpu
def test_a_graph_of_an_exchange_can_be_replayed():
    ranks.need_gpus(2)
    assert ranks.run(2, replayed_on_a_gpu, 50) == [0, 0]


class Driver:
    """In place of the GPU's: what it was asked, and what it answers."""

    def __init__(self, can_flush: int, error: int = 0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.can_flush, self.error = can_flush, error

    def function(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.asked.append((name, *args))
            return self.error

        return call

    def cuDeviceGetAttribute(self, found: Any, attribute: int, index: int) -> int:
        found._obj.value = self.can_flush
        self.asked.append(("attribute", attribute, index))
        return 0


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=7))


@pytest.mark.parametrize(("can_flush", "flags"), [(0, 0), (1, 1 << 30)])
def test_a_stream_waits_for_a_number_and_the_host_does_not(can_flush, flags, stream, monkeypatch):
    driver, signal = Driver(can_flush), torch.zeros(1, dtype=torch.int32)
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        setattr(driver, name, driver.function(name))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    signals = copying._OfStream(torch.device("cuda", 1))
    signals.give(signal, 5)
    signals.wait(signal, 5)
    address = signal.data_ptr()
    assert driver.asked == [
        ("attribute", 98, 1),
        ("cuStreamWriteValue32_v2", 7, address, 5, 0),
        ("cuStreamWaitValue32_v2", 7, address, 5, flags),
    ]
    driver.error = 801
    with pytest.raises(RuntimeError, match="cuStreamWaitValue32 failed with error 801 of the driver"):
        signals.wait(signal, 6)


def test_a_driver_without_signals_is_said(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(RuntimeError, match="the driver has no signals between streams"):
        copying._OfStream(torch.device("cuda", 0))


def test_what_cannot_be_exchanged_is_refused():
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="3 ranks; they are added pairwise: take 2, 4 or 8"):
        PeerCopies(parallel.Ranks(0, 3), device)
    with pytest.raises(ValueError, match=f"n_bytes is 256; 2 ranks need {2 * LINE}"):
        PeerCopies(parallel.Ranks(0, 2), device, 256)
    memory = [torch.zeros(PeerCopies.memory_bytes(2, 1024), dtype=torch.uint8) for _ in range(2)]
    exchange = PeerCopies(parallel.Ranks(0, 2), device, 1024, PeerMemory.of_tensors(parallel.Ranks(0, 2), memory))
    for flat in (torch.zeros(7), torch.zeros(8, 2)[:, 0], torch.zeros(4, 2), torch.zeros(8, device="meta")):
        with pytest.raises(ValueError, match=r"sum got \[.*contiguous axis on cpu, a multiple of 2 elements"):
            exchange.sum([flat])
    for out in (torch.zeros(6), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match=r"gather got \[.*2 times the shard's \[4\] in torch.float32"):
            exchange.gather([out], [torch.zeros(4)])
    small = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(ValueError, match="1024 bytes need 3072, not 64"):
        PeerCopies(parallel.Ranks(0, 2), device, 1024, PeerMemory.of_tensors(parallel.Ranks(0, 2), small))
