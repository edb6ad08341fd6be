"""Sums of partial outputs over GPUs of a host in a fixed order, and gathers, beside NCCL's. Writes peer.csv.

    torchrun --nproc-per-node 2 bench/peer.py --out bench/results/h200 [--rows 1 64 8192] [--hidden 2048] [--replays 50]

A row: what "sum": [rows, hidden], fp32 partial outputs on every rank to bf16 sums; "gather": bf16 [rows, hidden /
ranks] of every rank side by side. Sides, each captured CALLS times in a CUDA graph that the ranks replay together;
microseconds of one call, the median over replays of the slowest rank:

    peer          `PeerAllReduce`, `PeerAllGather`: one kernel that writes into the other ranks' memory
    collectives   of a sum `OrderedAllReduce`: the same bits, from collectives that only move data
    nccl          NCCL's all-reduce of partial outputs that are already rounded to bf16: half the bytes, no fixed order;
                  its all-gather, and a copy that puts the ranks' parts side by side

bits_equal: are the first two equal to the tree, or to what is gathered, on every rank, in each of the replays?
nccl_differs counts elements.
Exit status 1 if bits are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from record import row_provenance, write_csv

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch
import torch.distributed as dist

from bi_ops.core.pairwise import pairwise_
from bi_ops.parallel import Ranks
from bi_ops.parallel.gradients import all_gather
from bi_ops.parallel.peer import PeerAllGather, PeerAllReduce
from bi_ops.parallel.tensor import OrderedAllReduce

CALLS = 10  # in a graph
ROWS = (1, 8, 64, 256, 1024, 8192)
HIDDEN = (2048, 4096)
BF16 = torch.bfloat16
GATHERED = 64 << 20  # bytes of all ranks in one launch, as in vLLM
Sum = Callable[[], torch.Tensor]


def captured(call: Sum) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of CALLS calls, and what the last one returns."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [call() for _ in range(CALLS)]
    return graph, outs[-1]


def microseconds(graph: torch.cuda.CUDAGraph, replays: int, check: Callable[[], None]) -> float:
    """Of a call, on the slowest rank: medians over replays, of which `check` sees what each has left."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(replays + 1):
        dist.barrier()
        torch.cuda._sleep(200_000)  # ranks come from the barrier at different times: nobody's clock starts before
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1e3 * begin.elapsed_time(end) / CALLS)
        check()
    return max(Ranks.of().gather(statistics.median(taken[1:])))


def measure(ranks: Ranks, peer: PeerAllReduce, rows: int, hidden: int, replays: int) -> dict[str, object]:
    """A row of peer.csv, the same on every rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    every = torch.empty(ranks.size, rows, hidden, device=device)
    for rank, part in enumerate(every):
        part.normal_(generator=torch.Generator(device).manual_seed(rank))
    partial = every[ranks.rank].clone()
    rounded = partial.to(BF16)
    want = pairwise_(every).to(BF16)
    collectives = OrderedAllReduce(ranks)

    def nccl() -> torch.Tensor:
        out = rounded.clone()
        dist.all_reduce(out)
        return out

    sides: dict[str, Sum] = {
        "peer": lambda: peer(partial, BF16),
        "collectives": lambda: collectives(partial, BF16),
        "nccl": nccl,
    }
    found, differ = timed(sides, want, ranks, replays)
    copied = graph_of_copy(rounded, replays)
    return {
        **{"what": "sum", "ranks": ranks.size, "rows": rows, "hidden": hidden, "replays": replays * CALLS},
        **{f"{side}_us": round(us, 2) for side, us in found.items()},
        "copy_us": round(copied, 2),
        "peer_over_nccl": round(found["peer"] / (found["nccl"] - copied), 3),
        "bits_equal": differ["peer"] == differ["collectives"] == 0,
        "nccl_differs": differ["nccl"],
    }


def measure_gather(ranks: Ranks, peer: PeerAllGather, rows: int, hidden: int, replays: int) -> dict[str, object]:
    """A row of peer.csv, the same on every rank."""
    device, k = torch.device("cuda", torch.cuda.current_device()), hidden // ranks.size
    every = torch.empty(ranks.size, rows, k, device=device)
    for rank, part in enumerate(every):
        part.normal_(generator=torch.Generator(device).manual_seed(rank))
    own, want = every[ranks.rank].to(BF16), every.transpose(0, 1).reshape(rows, -1).to(BF16)

    def nccl() -> torch.Tensor:
        parts = own.new_empty(ranks.size * rows, k)
        all_gather(parts, own)
        return parts.view(ranks.size, rows, k).movedim(0, 1).reshape(rows, -1)

    found, differ = timed({"peer": lambda: peer(own), "nccl": nccl}, want, ranks, replays)
    return {
        **{"what": "gather", "ranks": ranks.size, "rows": rows, "hidden": hidden, "replays": replays * CALLS},
        **{
            "peer_us": round(found["peer"], 2),
            "collectives_us": "",
            "nccl_us": round(found["nccl"], 2),
            "copy_us": 0.0,
        },
        "peer_over_nccl": round(found["peer"] / found["nccl"], 3),
        "bits_equal": differ["peer"] == 0,
        "nccl_differs": differ["nccl"],
    }


def timed(
    sides: dict[str, Sum], want: torch.Tensor, ranks: Ranks, replays: int
) -> tuple[dict[str, float], dict[str, int]]:
    """(microseconds of a call, elements of 16 bits that differed from `want` over all replays) of each side."""
    found: dict[str, float] = {}
    differ: dict[str, int] = {}
    for side, call in sides.items():
        graph, out = captured(call)
        different = torch.zeros((), dtype=torch.int64, device=want.device)

        def check(out: torch.Tensor = out, different: torch.Tensor = different) -> None:
            different.add_((out.view(torch.int16) != want.view(torch.int16)).sum())

        found[side] = microseconds(graph, replays, check)
        differ[side] = max(ranks.gather(int(different)))
    return found, differ


def graph_of_copy(rounded: torch.Tensor, replays: int) -> float:
    """What the copy before NCCL's sum, which is in place, takes of its time."""
    graph, _ = captured(rounded.clone)
    return microseconds(graph, replays, lambda: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that peer.csv is written to")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    ranks = Ranks.of_torchrun()
    record = row_provenance(args.commit)
    peer = PeerAllReduce(ranks, max(args.rows) * max(args.hidden), torch.device("cuda", torch.cuda.current_device()))
    gather = PeerAllGather(ranks, GATHERED // ranks.size, torch.device("cuda", torch.cuda.current_device()))
    found: list[dict[str, object]] = []
    for hidden, rows in itertools.product(args.hidden, args.rows):
        for row in (
            measure(ranks, peer, rows, hidden, args.replays),
            measure_gather(ranks, gather, rows, hidden, args.replays),
        ):
            found.append(row)
            if ranks.rank == 0:
                args.out.mkdir(parents=True, exist_ok=True)
                write_csv(args.out / "peer.csv", [row | record for row in found])
                print(" ".join(f"{k} {v}" for k, v in found[-1].items()), flush=True)
    dist.destroy_process_group()
    return 0 if all(row["bits_equal"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
