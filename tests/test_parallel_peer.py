"""Sums over ranks that write into each other's memory: the bits of the tree, whichever way and however often."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranks
import torch

from bi_ops import parallel
from bi_ops.core import runtime
from bi_ops.parallel.peer import PeerAllGather, PeerAllReduce, PeerMemory, sums

#: Around a tile, and around the border between one-shot and two-shot, which is set to two tiles.
SIZES = (1, 2047, 2048, 2049, 4095, 4096, 4097, 3 * 4096 + 5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def partial(rank: int, n: int) -> torch.Tensor:
    """Neighbours all but cancel, so that another order leaves something else."""
    generators = [torch.Generator().manual_seed(seed) for seed in (rank // 2, 100 + rank)]
    large, small = (torch.randn(n, generator=g) for g in generators)
    return large * (1.0 - 2.0 * (rank % 2)) + small * 1e-3


def tree(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The oracle: neighbours first, rounded once."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0].to(dtype)


def fold(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The control: one rank after the other."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


# --------------------------------------------------------------------------------------------------------------
# the arithmetic, phase by phase, of ranks that are one process


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_have_the_bits_of_the_tree(size, dtype, device):
    n_bytes = PeerAllReduce.n_bytes(size, 4 * 4096)
    memory = [torch.zeros(n_bytes, dtype=torch.uint8, device=device) for _ in range(size)]
    given = [PeerMemory.of_tensors(parallel.Ranks(rank, size), memory) for rank in range(size)]
    made = [PeerAllReduce(m.ranks, 4 * 4096, device, 4096, m) for m in given]
    other = 0
    for n in (4, 2044, 2048, 2052, 4092, 4096, 4100, 3 * 4096 + 8):
        parts = [partial(rank, n).to(device) for rank in range(size)]
        outs = [torch.full((n,), 7.0, dtype=dtype, device=device) for _ in range(size)]
        for phase in ("SEND", "ADD", "GATHER"):
            for reduce, part, out in zip(made, parts, outs, strict=True):
                reduce.launch(part, out, (phase,))
        want = tree(parts, dtype)
        assert all(torch.equal(bits(out), bits(want)) for out in outs), n
        other += int((bits(fold(parts, dtype)) != bits(want)).sum())
    assert (other > 0) == (size > 2)  # of two there is one order


# --------------------------------------------------------------------------------------------------------------
# the whole kernel, of ranks that are processes


def calls() -> list[tuple[int, torch.dtype]]:
    """Of different sizes, so that programs of one call are not those of the next."""
    return [(n, dtype) for n in (*SIZES, *SIZES[::-1]) for dtype in DTYPES[: 1 + n % 3]]


def on_a_rank(memory: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every call, one after the other; larger ones are cut. Then one in which nobody waits, though the last is late."""
    here = parallel.Ranks.of()
    reduce = PeerAllReduce(here, 4096, memory[0].device, 4096, PeerMemory.of_tensors(here, memory))
    outs = [reduce(partial(here.rank, n).view(1, n), dtype)[0] for n, dtype in calls()]
    control = torch.empty(4096)
    if here.rank == here.size - 1:
        time.sleep(1.0)
    reduce.launch(partial(here.rank, 4096), control, ("SEND", "ADD", "GATHER"))
    return outs, control


@pytest.mark.skipif(not runtime.INTERPRET, reason="memory of the host; on a GPU see the test below")
@pytest.mark.parametrize("size", [2, 4])
def test_processes_wait_for_one_another(size):
    memory = [torch.zeros(PeerAllReduce.n_bytes(size, 4096), dtype=torch.uint8).share_memory_() for _ in range(size)]
    found = ranks.run(size, on_a_rank, memory)
    for i, (n, dtype) in enumerate(calls()):
        want = tree([partial(rank, n) for rank in range(size)], dtype)
        assert all(torch.equal(bits(outs[i]), bits(want)) for outs, _ in found), (i, n)
    want = tree([partial(rank, 4096) for rank in range(size)], torch.float32)
    assert [torch.equal(bits(control), bits(want)) for _, control in found] == [False] * (size - 1) + [True]


def on_a_gpu(replays: int) -> dict[str, Any]:
    """Eager calls, and a captured one that is replayed on other values; on symmetric memory."""
    here, device = parallel.Ranks.of(), torch.device("cuda", torch.cuda.current_device())
    reduce = PeerAllReduce(here, 1 << 20, device)
    eager = {n: reduce(partial(here.rank, n).to(device), torch.bfloat16).cpu() for n in (*SIZES, 1 << 19, 3 << 20)}
    given = torch.zeros(5 * 4096, device=device)
    reduce(given, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [reduce(given, torch.bfloat16) for _ in range(3)]  # an odd number: halves alternate over replays
    different = torch.zeros((), dtype=torch.int64, device=device)
    for i in range(replays):
        parts = [partial(rank, given.numel()).to(device) * (i + 1) for rank in range(here.size)]
        given.copy_(parts[here.rank])
        graph.replay()
        want = tree(parts, torch.bfloat16)
        different += sum((bits(out) != bits(want)).sum() for out in outs)
    return {"eager": eager, "different": int(different)}


@pytest.mark.gpu
@pytest.mark.skipif(runtime.INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_on_gpus_or_on_one(size, monkeypatch):
    """Of a host with fewer GPUs two share one; a waiting program then holds its SM for a slice of time."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    for result in ranks.run(size, on_a_gpu, 50):
        assert result["different"] == 0
        for n, out in result["eager"].items():
            assert torch.equal(bits(out), bits(tree([partial(rank, n) for rank in range(size)], torch.bfloat16))), n


# --------------------------------------------------------------------------------------------------------------
# gathers

#: Rows and columns around a tile, whole ones and not; the last is more than goes at once.
SHAPES = [(1, 8), (1, 2048), (3, 2050), (5, 96), (64, 512), (17, 30), (300, 512)]


def own_part(rank: int, m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1000 * rank + m * k)).bfloat16()


def gathers_on_a_rank(memory: list[torch.Tensor] | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `on_a_rank`, of gathers; memory None: symmetric memory, and in the end a CUDA graph that is replayed."""
    here = parallel.Ranks.of()
    device = runtime.default_device() if memory else torch.device("cuda", torch.cuda.current_device())
    gather = PeerAllGather(here, 1 << 18, device, None if memory is None else PeerMemory.of_tensors(here, memory))
    outs = [gather(own_part(here.rank, *shape).to(device)) for shape in (*SHAPES, *SHAPES)]
    control = torch.zeros(64, here.size * 512, dtype=torch.bfloat16, device=device)
    if memory is not None:
        if here.rank == here.size - 1:
            time.sleep(1.0)
        gather.launch((own_part(here.rank, 64, 512) + 1).view(torch.int32), control, ("SEND", "GATHER"))
        return outs, control
    given = own_part(here.rank, 64, 512).to(device)
    gather(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [gather(given) for _ in range(3)]
    for _ in range(50):
        given += 1
        graph.replay()
    want = torch.cat([own_part(rank, 64, 512).to(device) for rank in range(here.size)], 1)
    for _ in range(50):
        want += 1
    return [out.cpu() for out in outs], torch.stack([(out != want).sum() for out in captured]).cpu()


def check_gathers(found: list[tuple[list[torch.Tensor], torch.Tensor]]) -> None:
    for outs, _ in found:
        for out, (m, k) in zip(outs, (*SHAPES, *SHAPES), strict=True):
            want = torch.cat([own_part(rank, m, k) for rank in range(len(found))], 1)
            assert torch.equal(bits(out), bits(want)), (m, k)


@pytest.mark.skipif(not runtime.INTERPRET, reason="memory of the host; on a GPU see the test below")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_gather_what_each_has(size):
    n_bytes = PeerAllGather.memory_bytes(size, 1 << 18)
    found = ranks.run(
        size, gathers_on_a_rank, [torch.zeros(n_bytes, dtype=torch.uint8).share_memory_() for _ in range(size)]
    )
    check_gathers(found)
    want = torch.cat([own_part(rank, 64, 512) + 1 for rank in range(size)], 1)
    assert [torch.equal(bits(control), bits(want)) for _, control in found] == [False] * (size - 1) + [True]


@pytest.mark.gpu
@pytest.mark.skipif(runtime.INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("size", [2, 4])
def test_gpus_gather_what_each_has(size, monkeypatch):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    found = ranks.run(size, gathers_on_a_rank, None)
    check_gathers(found)
    assert all(not different.any() for _, different in found)


# --------------------------------------------------------------------------------------------------------------
# what it refuses


def test_what_does_not_fit_is_named(device):
    three = [torch.zeros(8, dtype=torch.uint8, device=device)] * 3
    with pytest.raises(ValueError, match=r"parallel.peer: 3 ranks; they are added pairwise: take 2, 4 or 8"):
        PeerAllReduce(parallel.Ranks(0, 3), 8, device, memory=PeerMemory.of_tensors(parallel.Ranks(0, 3), three))
    two = parallel.Ranks(0, 2)
    with pytest.raises(ValueError, match=r"4096 elements need \d+ bytes, not 8"):
        PeerAllReduce(two, 4096, device, memory=PeerMemory.of_tensors(two, three[:2]))
    with pytest.raises(ValueError, match="elements is 0"):
        PeerAllReduce(two, 0, device, memory=PeerMemory.of_tensors(two, three[:2]))
    memory = [torch.zeros(PeerAllReduce.n_bytes(2, 8), dtype=torch.uint8, device=device)] * 2
    reduce = PeerAllReduce(two, 8, device, memory=PeerMemory.of_tensors(two, memory))
    with pytest.raises(TypeError, match=r"\[2, 3\] is torch.bfloat16, .*; partial outputs are fp32"):
        reduce(torch.zeros(2, 3, device=device).bfloat16(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"\[3, 2\] on .* must be contiguous"):
        reduce(torch.zeros(2, 3, device=device).t(), torch.bfloat16)
    assert reduce(torch.zeros(0, 3, device=device), torch.bfloat16).shape == (0, 3)
    assert sums.ONE_SHOT % sums.BLOCK == 0
    with pytest.raises(ValueError, match="1 rank has nothing to gather"):
        PeerAllGather(parallel.Ranks(), 8, device)
    with pytest.raises(ValueError, match="n_bytes is 0; it must be those that a rank sends at once"):
        PeerAllGather(two, 0, device)
    with pytest.raises(ValueError, match=r"8 bytes a rank need \d+, not \d+"):
        PeerAllGather(two, 8, device, PeerMemory.of_tensors(two, three[:2]))
    some = [torch.zeros(PeerAllGather.memory_bytes(2, 8), dtype=torch.uint8, device=device)] * 2
    gather = PeerAllGather(two, 8, device, PeerMemory.of_tensors(two, some))
    for wrong in (torch.zeros(2, 3, device=device), torch.zeros(1, 3, device=device).bfloat16()):
        assert not gather.fits(wrong)
        with pytest.raises(ValueError, match=r"must have rows of at most 8 bytes, whole 4s"):
            gather(wrong)
    assert gather(torch.zeros(0, 2, device=device)).shape == (0, 4)
