"""Is this commit as fast as that one? Two checkouts, one GPU, in turns. Writes compare.csv.

    python bench/compare.py --old OTHER_CHECKOUT --out bench/results/h100 [--runs 2] [--every 3]

Every run is a process of its own that imports one of the two checkouts; runs alternate, old first. Only public
functions are called, so both sides run the same lines. Cells are those of the GEMM, attention and training-step
benchmarks, every third of them, fixed by their place in the list. A cell's figure is the median of a run's repetitions;
a side's figure is the better of its runs; the spread is how far the runs of old lie apart. vLLM is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = (1, 4, 16, 64, 128, 512, 2048, 8192)
SEQLENS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
COLD = 120 << 20  # bytes that do not fit the L2 cache

Cell = tuple[str, Callable[[], list[Callable[[], object]]]]


def gemm_cells() -> Iterator[Cell]:
    """Forward at several row counts, dX, dW in bf16 and dW into fp32 of every linear layer of four models."""
    import torch
    from products import products

    import bi_ops

    def forward(m: int, n: int, k: int) -> list[Callable[[], object]]:
        copies = max(1, min(16, math.ceil(COLD / (2 * n * k))))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16).t() for _ in range(copies)]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        return [partial(bi_ops.matmul.mm, x, w) for w in weights]

    def wgrad(t: int, n: int, k: int) -> list[Callable[[], object]]:
        g, x = (torch.randn(t, d, device="cuda", dtype=torch.bfloat16) for d in (n, k))
        buffer = torch.zeros(n, k, device="cuda")
        return [lambda: bi_ops.matmul.accumulate_weight_grad(buffer, g, x)]

    def backward(t: int, n: int, k: int) -> list[Callable[[], object]]:
        x = torch.randn(t, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        g = torch.randn(t, n, device="cuda", dtype=torch.bfloat16)
        return [lambda: torch.autograd.grad(bi_ops.matmul.linear(x, w), (x, w), g)]

    for model in ("0.6B", "1.7B", "4B", "8B"):
        for name, n, k in products(model):
            for m in ROWS:
                yield f"gemm {model} {name} {m}", partial(forward, m, n, k)
            if name != "lm_head":
                yield f"linear {model} {name} 8192", partial(backward, 8192, n, k)
                yield f"wgrad {model} {name} 8192", partial(wgrad, 8192, n, k)


def attention_cells() -> Iterator[Cell]:
    """Forward and backward over equal lengths, and decoding, causal, eight query heads per key head."""
    import torch

    from bi_ops.attention import flash_attention, paged_attention

    def training(d: int, s: int, passes: str) -> list[Callable[[], object]]:
        heads, batch = 4096 // d, max(TOKENS // s, 1)
        q, k, v = (
            torch.randn(batch * s, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=passes == "bwd")
            for h in (heads, heads // 8, heads // 8)
        )
        cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * s
        if passes == "fwd":
            return [lambda: flash_attention(q, k, v, cu, max_seqlen=s)]
        out = flash_attention(q, k, v, cu, max_seqlen=s)
        g = torch.randn_like(out)
        return [lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)]

    def decode(d: int, batch: int, context: int) -> list[Callable[[], object]]:
        heads, pages = 4096 // d, batch * (context // 16)
        shape = (2, pages, 16, heads // 8, d)
        k_cache, v_cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(pages, device="cuda").int().view(batch, -1)
        q = torch.randn(batch, heads, d, device="cuda", dtype=torch.bfloat16)
        cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        return [lambda: paged_attention(q, k_cache, v_cache, table, cu, lengths, max_seqlen_q=1)]

    for d in HEAD_DIMS:
        for s in SEQLENS:
            for passes in ("fwd", "bwd"):
                yield f"attention {d} {s} {passes}", partial(training, d, s, passes)
        for batch in (1, 8, 64):
            yield f"attention {d} decode {batch}", partial(decode, d, batch, 8192)


def chosen(cells: Iterator[Cell], every: int) -> list[Cell]:
    return [cell for i, cell in enumerate(cells) if i % every == 0]


def median_us(calls: list[Callable[[], object]], budget_s: float, captured: bool) -> float:
    """Median microseconds of a call, by CUDA events around all calls, repeated for about `budget_s`.

    captured: the calls are made by a CUDA graph, so the host's time does not count.
    """
    import torch

    def eager() -> None:
        for call in calls:
            call()

    eager()
    torch.cuda.synchronize()
    repeat = eager
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        repeat = graph.replay
    took: list[float] = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    while len(took) < 5 or (time.perf_counter() - began < budget_s and len(took) < 200):
        start.record()
        repeat()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(took)[len(took) // 2]


def host_us() -> dict[str, float]:
    """Least microseconds of the host per eager `linear`, where the GPU has nothing to do."""
    import torch

    import bi_ops

    x, weight = (torch.randn(s, device="cuda").bfloat16() for s in ((1, 256), (256, 256)))
    found = {}
    for grad in (False, True):
        weight.requires_grad_(grad)
        best = math.inf
        for _ in range(15):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(300):
                bi_ops.matmul.linear(x, weight)
            best = min(best, (time.perf_counter() - began) / 300 * 1e6)
        found[f"host linear {'with' if grad else 'without'} grad"] = best
    return found


def worker(every: int, budget_s: float) -> dict[str, float]:
    """The figures of one run of the checkout that is imported, in microseconds."""
    import torch

    import bi_ops

    assert Path(bi_ops.__file__).resolve().is_relative_to(Path.cwd()), bi_ops.__file__
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    cells = chosen(gemm_cells(), every) + chosen(attention_cells(), every)
    for name, make in cells:
        if name.startswith(("gemm", "linear")):  # what serves an unverified shape is not what serves later
            for call in make()[:1]:
                call()
    warmup = getattr(bi_ops, "warmup", None)  # checkouts before it verify in the first call
    if warmup is not None:
        warmup()
    bi_ops.matmul.linear(*(torch.randn(s, device="cuda").bfloat16() for s in ((1, 256), (256, 256))))
    if warmup is not None:
        warmup()
    for name, make in cells:
        calls = make()
        figures[name] = median_us(calls, budget_s, captured=not name.startswith("linear") and not name.endswith("bwd"))
        del calls
    return figures | host_us()


def run_step(checkout: Path, model: str) -> dict[str, float]:
    """A training step of the checkout's own bench/step.py, in microseconds."""
    command = [sys.executable, "bench/step.py", "--out", "/tmp", "--one", "bi_ops", model]
    done = subprocess.run(command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return {f"step {model} {n}": row[f"{n}_ms"] * 1e3 for n in ("forward", "backward", "step", "captured")}


def environment(checkout: Path) -> dict[str, str]:
    paths = [str(checkout), str(checkout / "bench"), os.environ.get("PYTHONPATH", "")]
    caches = Path(tempfile.gettempdir()) / f"compare-{checkout.name}"  # each side builds and verifies for itself
    own = {"TORCH_EXTENSIONS_DIR": str(caches / "extensions"), "XDG_CACHE_HOME": str(caches / "cache")}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="the other checkout")
    parser.add_argument("--out", type=Path, help="folder that compare.csv is written to")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side")
    parser.add_argument("--every", type=int, default=3, help="every so many cells are timed")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of repetitions for a cell")
    parser.add_argument("--steps", nargs="*", default=["0.6B", "1.7B"], help="models whose training step is timed")
    parser.add_argument("--commits", nargs=2, metavar=("OLD", "NEW"), help="where there is no git checkout")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.path.remove(str(HERE))  # the checkout's own modules are meant
        print(json.dumps(worker(args.every, args.budget)))
        return 0
    if args.old is None or args.out is None:
        parser.error("--old and --out are needed")

    sides = {"old": args.old.resolve(), "new": HERE.parent}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    began = time.monotonic()
    for _ in range(args.runs):
        for side, checkout in sides.items():
            options = ["--worker", "--every", str(args.every), "--budget", str(args.budget)]
            command = [sys.executable, str(HERE / "compare.py"), *options]
            done = subprocess.run(
                command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{side}: {done.stderr[-2000:]}", file=sys.stderr)
                return 1
            figures = json.loads(done.stdout.splitlines()[-1])
            for model in args.steps:
                figures |= run_step(checkout, model)
            found[side].append(figures)
            print(f"[{time.monotonic() - began:5.0f} s] {side}: {len(figures)} cells", flush=True)
    return report(found, args)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def report(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> int:
    """Write compare.csv and print a line per kind; 1 if a kind's geometric mean is over 2% slower."""
    from record import provenance, write_csv

    record = provenance(args.commits[1] if args.commits else None)
    rows: list[dict[str, Any]] = []
    for name in found["old"][0]:
        old, new = ([run[name] for run in found[side]] for side in ("old", "new"))
        spread = max(old) / min(old) - 1
        slower = min(new) / min(old) - 1
        rows.append(
            {
                "cell": name,
                "old_us": round(min(old), 3),
                "new_us": round(min(new), 3),
                "new_over_old": round(1 + slower, 4),
                "old_spread": round(spread, 4),
                "old_commit": args.commits[0] if args.commits else "",
                **record,
            }
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "compare.csv", rows)
    worst = 0.0
    for kind in dict.fromkeys(r["cell"].split()[0] for r in rows):
        mine = [r for r in rows if r["cell"].split()[0] == kind]
        mean = geometric_mean([r["new_over_old"] for r in mine])
        spread = geometric_mean([1 + r["old_spread"] for r in mine])
        slowest = max(mine, key=lambda r: r["new_over_old"])
        print(
            f"{kind:10} {len(mine):3} cells: new takes {mean:.4f}x of old's time; old's runs lie {spread:.4f}x apart; "
            f"slowest {slowest['new_over_old']:.3f}x at {slowest['cell']}"
        )
        worst = max(worst, mean)
    return 1 if worst > 1.02 else 0


if __name__ == "__main__":
    sys.exit(main())
