"""Are the kernels of bi_ops as fast under another release of Triton? Writes triton_releases.csv.

    pip install --no-deps --target /tmp/triton-3.9 triton==3.9.0
    python bench/triton_releases.py --out bench/results/h200 --releases /tmp/triton-3.9 [...] [--runs 2]

The installed Triton is the baseline. Every run is a process of its own, and releases take turns, the installed one
first. A cell's figure is the median of a run's repetitions, by a CUDA graph but for backwards; a release's is that of
its better run. us_installed is the baseline's, ratio = us_installed / us: above 1 the other release is faster. Cells
are GEMMs and attention that Triton compiles: attention, decoding, a layer of 128 experts, weight gradients into fp32.
What the bits are says bench/bits.py, with the release's folder first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from compare import Cell, attention_cells, geometric_mean, median_us
from record import row_provenance, write_csv

HERE = Path(__file__).resolve().parent
SEQLENS, TOKENS = ("1024", "8192"), 8192


def gemm_cells() -> Iterator[Cell]:
    """Weight gradients of 8B into fp32; a layer of 128 experts."""
    import torch

    import bi_ops
    from bi_ops import moe

    def wgrad(n: int, k: int) -> list[Callable[[], object]]:
        g, x = (torch.randn(TOKENS, d, device="cuda", dtype=torch.bfloat16) for d in (n, k))
        buffer = torch.zeros(n, k, device="cuda")
        return [lambda: bi_ops.matmul.accumulate_weight_grad(buffer, g, x)]

    def experts(passes: str) -> list[Callable[[], object]]:
        def randn(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_(passes == "bwd")

        x, gate_up, down = randn(TOKENS, 2048), randn(128, 1536, 2048), randn(128, 2048, 768)
        weights, chosen = moe.router(torch.randn(TOKENS, 128, device="cuda", dtype=torch.bfloat16), 8)
        if passes == "fwd":
            return [lambda: moe.experts(x, gate_up, down, weights, chosen)]
        out = moe.experts(x, gate_up, down, weights, chosen)
        g = torch.randn_like(out)
        return [lambda: torch.autograd.grad(out, (x, gate_up, down), g, retain_graph=True)]

    for n, k in ((6144, 4096), (24576, 4096), (4096, 12288)):
        yield f"wgrad {n} {k}", partial(wgrad, n, k)
    for passes in ("fwd", "bwd"):
        yield f"experts 128 {passes}", partial(experts, passes)


def worker(budget_s: float) -> tuple[str, dict[str, float]]:
    """The release of Triton that is imported, and microseconds of every cell under it."""
    import torch
    import triton

    torch.manual_seed(0)
    found: dict[str, float] = {}
    cells = [c for c in attention_cells() if "decode" in c[0] or c[0].split()[2] in SEQLENS]
    for name, make in (*cells, *gemm_cells()):
        calls = make()
        found[name] = median_us(calls, budget_s, captured=not name.endswith("bwd"))
        del calls
    return triton.__version__, found


def run(release: Path | None, budget_s: float) -> tuple[str, dict[str, float]]:
    """(release, its figures) of a process that has `release` first on its path."""
    paths = [str(release)] if release else []
    paths += [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(HERE / "triton_releases.py"), "--worker", "--budget", str(budget_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{release or 'the installed Triton'}: {done.stderr[-2000:]}")
    name, figures = json.loads(done.stdout.splitlines()[-1])
    return name, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", type=Path, nargs="+", metavar="FOLDER", help="folders that have other releases")
    parser.add_argument("--out", type=Path, help="folder that triton_releases.csv is written to")
    parser.add_argument("--runs", type=int, default=2, help="runs of each release (2)")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of repetitions for a cell (0.05)")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.budget)))
        return 0
    if not (args.releases and args.out):
        parser.error("--releases and --out are needed")
    for folder in args.releases:
        if not (folder / "triton").is_dir():
            parser.error(f"{folder} has no triton: pip install --no-deps --target {folder} triton==...")

    best: dict[str, dict[str, float]] = {}
    installed = ""
    for _ in range(args.runs):
        for folder in (None, *args.releases):
            release, figures = run(folder, args.budget)
            installed = release if folder is None else installed
            known = best.setdefault(release, figures)
            best[release] = {cell: min(us, known[cell]) for cell, us in figures.items()}
            print(f"{release}: {len(figures)} cells", flush=True)
    if len(best) != 1 + len(args.releases):
        raise SystemExit(f"the releases found are {', '.join(best)}: folders must differ from the installed one")
    rows = []
    for release, figures in best.items():
        ratios = []
        for cell, us in figures.items():
            before = best[installed][cell]
            ratios.append(before / us)
            row = {"triton": release, "cell": cell, "us": round(us, 2), "us_installed": round(before, 2)}
            rows.append(row | {"ratio": round(before / us, 3), **row_provenance(args.commit)})
        print(
            f"{release}: {geometric_mean(ratios):.3f}x of {installed}'s speed, {min(ratios):.3f}x in the slowest cell"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "triton_releases.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
