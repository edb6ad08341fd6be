"""The gradient of a tied table by the rows that a step touched, beside whole matrices. Writes tied_table.csv.

    python bench/tied_table.py --out bench/results/h200 [--models 0.6B 1.7B] [--tokens 8192] [--cuts 1 4] [--seconds 45]

`by rows` is what training does; `dense` fills the table's sum with zeros and adds all of it to the head's. Parts: the
backward of the table, in so many micro-batches (`cuts`), and the sum of both at the end, which is also timed by other
configs. Tokens are drawn from the whole vocabulary, or, as words are, few of them often (`zipf`): `rows` counts those
that are touched. Bits are compared first, and an unequal one ends it. Every time is a median of replays of a CUDA graph
with a cold L2. --dry runs it on a tiny table on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from record import row_provenance, take_shortcuts, write_csv
from step_sides import SHAPES, VOCABULARY

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime
from bi_ops.core.main_grad import MainGrad
from bi_ops.embedding.config import TileConfig
from bi_ops.embedding.shards import accumulate_rows
from bi_ops.embedding.tied import add_touched_rows

CONFIGS = [TileConfig(*c) for c in ((8, 256), (16, 256), (32, 128), (4, 512), (8, 512), (1, 1024), (2, 1024))]
CONFIGS += [TileConfig(16, 256, num_warps=8), TileConfig(16, 512, num_warps=8)]
REPLAYS = 21


def timed(call: Callable[[], object]) -> float:
    """Median microseconds of a replay, behind work that the host needs no time for and that empties L2."""
    call()
    if runtime.INTERPRET:
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    other, found = torch.empty(1 << 26, device="cuda"), []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        other.zero_()
        torch.cuda._sleep(200_000)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return statistics.median(found[1:])


def drawn(kind: str, n: int, rows: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    ids = u * rows if kind == "uniform" else float(rows) ** u - 1.0  # a row's frequency: 1 / (1 + its number)
    return ids.long().clamp(0, rows - 1).to(device)


def measured(rows: int, hidden: int, tokens: int, kind: str, cuts: int) -> Iterator[dict[str, object]]:
    device = runtime.default_device()
    ids, g = drawn(kind, tokens, rows, device), torch.randn(tokens, hidden, device=device).to(torch.bfloat16)
    head, sums = torch.randn(rows, hidden, device=device), torch.empty(rows, hidden, device=device)
    touched = torch.empty(rows + 1, dtype=torch.bool, device=device)
    parts = list(zip(ids.chunk(cuts), g.chunk(cuts), strict=True))

    def backward(touched: torch.Tensor | None = None) -> MainGrad:
        main_grad = MainGrad(sums.shape, device, sums, touched)
        for some, of_them in parts:
            accumulate_rows(main_grad, of_them, some, 0)
        return main_grad

    dense = head + backward().collect()
    total = head.clone()
    sums.fill_(float("nan"))
    touched.fill_(True)
    found, marked = backward(touched).collect_rows()
    assert marked is not None
    add_touched_rows(total, found, marked)
    if not (torch.equal(total, dense) and not torch.equal(total, head)):  # and the control: something was added
        raise SystemExit(f"{rows} x {hidden}, {kind}, {cuts} micro-batches: other bits than dense sums")
    for config in CONFIGS:
        total.copy_(head)
        add_touched_rows(total, found, marked, config)
        if not torch.equal(total, dense):
            raise SystemExit(f"{config}: other bits")
    del dense
    shape = {"rows": int(marked[:-1].sum()), "cuts": cuts}
    yield {"part": "sum", "side": "by rows", "us": timed(lambda: add_touched_rows(total, found, marked)), **shape}
    for config in CONFIGS:
        us = timed(lambda config=config: add_touched_rows(total, found, marked, config))  # type: ignore[misc]
        yield {"part": "sum", "side": f"{config.rows} x {config.cols}, {config.num_warps} warps", "us": us, **shape}
    yield {"part": "backward", "side": "by rows", "us": timed(lambda: backward(touched)), **shape}
    yield {"part": "backward", "side": "dense", "us": timed(backward), **shape}
    yield {"part": "sum", "side": "dense", "us": timed(lambda: total.add_(sums)), **shape}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["1.7B", "0.6B"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--commit")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        take_shortcuts()
        args.models, args.tokens = ["dry"], 64
    args.out.mkdir(parents=True, exist_ok=True)
    begin, rows = time.monotonic(), list[dict[str, object]]()
    about = row_provenance(args.commit)
    for model in args.models:
        for cuts in args.cuts:
            for kind in ("uniform", "zipf"):
                if time.monotonic() - begin > args.seconds:
                    sys.exit(f"left out from {model}, {cuts} micro-batches, {kind} on")
                for row in measured(200 if args.dry else VOCABULARY, SHAPES[model][0], args.tokens, kind, cuts):
                    rows.append({"model": model, "tokens": args.tokens, "drawn": kind} | row | about)
                    write_csv(args.out / "tied_table.csv", rows)
                    print(*(f"{row[k]}" for k in ("part", "side", "rows", "cuts")), f"{row['us']:.1f} us", flush=True)


if __name__ == "__main__":
    main()
