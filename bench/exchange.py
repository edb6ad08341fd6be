"""An exchange of gradients over the GPUs of a host, alone and beside a backward's GEMMs. Writes exchange.csv.

    torchrun --nproc-per-node 2 bench/exchange.py --out bench/results/h200 [--elements 25165824] [--rounds 9]

A row: gradients of so many fp32 elements on every rank, in matrices as a layer of Qwen3 has them, are added in the
order of the tree, and the sums gathered, as training does with a layer's, on a stream of its own. ways:

    collectives   all-to-all, additions, all-gather (`parallel.gradients.Collectives`)
    copies        the same parts by the GPUs' copy engines (`parallel.peer.PeerCopies`)

exchange_ms: alone. gemms_ms: dW and dX of an MLP of 1.7B at 8,192 tokens, as often as fill the time, alone.
gemms_beside_ms, both_ms: the GEMMs and everything, when both run at once; both are launched before either begins.
slower: gemms_beside_ms / gemms_ms. Medians over rounds of the slowest rank. bits_equal: the sums are those of the other
way, on every rank. Exit status 1 if not.
`--dry` runs a tiny size on the CPU over gloo; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from record import row_provenance, write_csv

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch
import torch.distributed as dist

from bi_ops import matmul
from bi_ops.core import runtime
from bi_ops.parallel import Ranks
from bi_ops.parallel.gradients import Collectives, Exchange
from bi_ops.parallel.peer import PeerCopies

#: Of a layer of 0.6B, 1.7B and 8B.
ELEMENTS = (15 << 20, 3 << 24, 23 << 23)
#: Of a layer's elements: q, k and v, what comes out of attention, gate and up, down.
SHARES = (2, 1, 6, 3)
#: Cycles of a GPU in which the host launches everything.
LAUNCHING = 20_000_000
TOKENS, HIDDEN, INNER = 8192, 2048, 6144


#: Of a clock.
Moment = float | torch.cuda.Event


def matrices(flat: torch.Tensor, size: int) -> list[torch.Tensor]:
    """A layer's, one after the other; each in as many parts as there are ranks."""
    unit = len(flat) // sum(SHARES) // (4 * size) * (4 * size)
    sizes = [share * unit for share in SHARES[:-1]]
    return list(flat.split([*sizes, len(flat) - sum(sizes)]))


class Clock:
    """Milliseconds of a stream, or of the host where there is no GPU."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def now(self) -> Moment:
        return time.perf_counter() if self._stream is None else self._stream.record_event(self._event())

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    @staticmethod
    def between(begin: Moment, end: Moment) -> float:
        """Once the GPU has nothing left to do."""
        if isinstance(begin, float) and isinstance(end, float):
            return 1e3 * (end - begin)
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end)


def gemms(tokens: int, hidden: int, inner: int) -> Callable[[], None]:
    """dW into fp32, then dX, of a matrix [2 * inner, hidden]."""
    like = torch.empty(0, dtype=torch.bfloat16, device=runtime.default_device())
    g, x, weight = (like.new_empty(s).normal_() for s in ((tokens, 2 * inner), (tokens, hidden), (2 * inner, hidden)))
    total = torch.zeros(2 * inner, hidden, device=like.device)

    @torch.no_grad()
    def run() -> None:
        matmul.accumulate_weight_grad(total, g, x)
        matmul.mm(g, weight)

    return run


def measure(ranks: Ranks, exchange: Exchange, n: int, run: Callable[[], None], rounds: int) -> dict[str, float]:
    """Milliseconds, on the slowest rank."""
    device = runtime.default_device()
    is_gpu = device.type == "cuda"
    main = torch.cuda.current_stream() if is_gpu else None
    side = torch.cuda.Stream(priority=-1) if is_gpu else None
    of_main, of_side = Clock(main), Clock(side)
    flat = torch.randn(n, device=device)

    def begin() -> Moment:
        if is_gpu:
            torch.cuda.synchronize()
        ranks.gather(None)
        if is_gpu:
            torch.cuda._sleep(LAUNCHING)
        start = of_main.now()
        if side is not None and isinstance(start, torch.cuda.Event):
            side.wait_event(start)
        return start

    def exchanged() -> tuple[float, ...]:
        outs = matrices(flat.clone(), ranks.size)
        start = begin()
        with torch.cuda.stream(side):
            exchange.gather(outs, exchange.sum(outs))
            end = of_side.now()
        if is_gpu:
            torch.cuda.synchronize()
        return (Clock.between(start, end),)

    def beside(times: int, with_exchange: bool) -> tuple[float, ...]:
        outs = matrices(flat.clone(), ranks.size)
        start = begin()
        if with_exchange:
            with torch.cuda.stream(side):
                exchange.gather(outs, exchange.sum(outs))
                ends = of_side.now()
        for _ in range(times):
            run()
        end = of_main.now()
        if is_gpu:
            torch.cuda.synchronize()
        gemms_ms = Clock.between(start, end)
        return gemms_ms, max(gemms_ms, Clock.between(start, ends)) if with_exchange else gemms_ms

    def median(call: Callable[[], tuple[float, ...]]) -> list[float]:
        taken = [call() for _ in range(rounds + 2)][2:]
        every = ranks.gather([statistics.median(values) for values in zip(*taken, strict=True)])
        return [max(values) for values in zip(*every, strict=True)]

    [alone] = median(exchanged)
    [one, _] = median(lambda: beside(1, False))
    times = max(round(1.5 * alone / one), 1) if is_gpu else 1
    [gemms_ms, _], [beside_ms, both_ms] = median(lambda: beside(times, False)), median(lambda: beside(times, True))
    found = {"exchange_ms": alone, "gemms_ms": gemms_ms, "gemms_beside_ms": beside_ms, "both_ms": both_ms}
    return {name: round(ms, 4) for name, ms in found.items()} | {"slower": round(beside_ms / gemms_ms, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that exchange.csv is written to")
    parser.add_argument("--elements", type=int, nargs="+", default=ELEMENTS, help="multiples of 4 * ranks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="a tiny size on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    ranks, record = Ranks.of_torchrun(), row_provenance(args.commit)
    if ranks.size < 2:
        parser.error("one rank has nothing to exchange: start it with torchrun --nproc-per-node 2")
    if args.dry:
        args.elements, args.rounds = [64 * ranks.size], 1
    run = gemms(*((32, 16, 32) if args.dry else (TOKENS, HIDDEN, INNER)))
    ways: dict[str, Exchange] = {"collectives": Collectives(ranks)}
    ways["copies"] = Collectives(ranks) if args.dry else PeerCopies(ranks, runtime.default_device())
    rows: list[dict[str, object]] = []
    for n in args.elements:
        generator = torch.Generator().manual_seed(ranks.rank)
        given = torch.randn(n, generator=generator).to(runtime.default_device())
        sums = {way: torch.cat(exchange.sum(matrices(given, ranks.size))) for way, exchange in ways.items()}
        first, *others = (t.view(torch.int32) for t in sums.values())
        equal = all(ranks.gather(all(torch.equal(first, other) for other in others)))
        for way, exchange in ways.items():
            found = measure(ranks, exchange, n, run, args.rounds)
            rows.append({"ranks": ranks.size, "elements": n, "way": way, **found, "bits_equal": equal})
            if ranks.rank == 0:
                args.out.mkdir(parents=True, exist_ok=True)
                write_csv(args.out / "exchange.csv", [row | record for row in rows])
                print(*(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    dist.destroy_process_group()
    return 0 if all(row["bits_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
