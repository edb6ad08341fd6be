"""The optimizer step against torch's: the gradient norm, clipping, AdamW at Qwen3's parameters. Writes optim.csv.

    python bench/optim.py --out bench/results/h100 [--models 0.6B 1.7B 4B] [--sweep] [--dry]

Bytes bound all of it. Lower bounds, bytes a parameter at the GPU's bandwidth (--bandwidth, of an H100 unless told):

    norm                  4   read the gradient
    clip                 12   and write it scaled
    adamw                28   read parameter, gradient, two moments; write all but the gradient
    adamw, copy, zero    34   and write the bf16 copy, and zeros to the gradient
    step                 32   norm, then AdamW of the gradient scaled on the way

torch's side is `clip_grad_norm_(foreach=True)` and `AdamW(fused=True)`, with a foreach copy and a foreach zero where we
have them in the pass. Both sides work on the same tensors, in turns. Times are medians of CUDA events, taken while the
GPU is still busy with something else, so the host does not count; what a call takes the host is a column of its own. A
model whose tensors do not fit the memory is left out.

Before that the bits are checked: AdamW's against torch's (foreach=False), the norm's against reruns and against rows
that are summed in shards. Exit status 1 if they differ. --sweep times neighbours of the configs instead, and writes
optim_sweep.csv. --dry runs it all at a tiny model, on the CPU too; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from record import row_provenance, write_csv

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops import optim
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.optim import adamw, config, ops

#: hidden, intermediate, layers, query heads, key heads, tied embeddings; head_dim 128, vocabulary 151,936.
MODELS = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "dry": (64, 128, 2, 4, 2, True),
}
BANDWIDTH = 3.35e12  # bytes/s of an H100; of an H200 4.8e12
BYTES = {"norm": 4, "clip": 12, "adamw": 28, "adamw, copy, zero": 34, "step": 32}
HYPER: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0
REPEATS = 9
SPARE = 2 << 30  # bytes that are left free

Call = Callable[[], object]


def shapes(model: str) -> list[tuple[int, ...]]:
    """Every parameter of a model, as bi_ops holds it: q, k and v in one matrix, gate and up in one."""
    hidden, intermediate, layers, heads, kv_heads, tied = MODELS[model]
    vocabulary = 1000 if model == "dry" else 151936
    layer = [
        (hidden,),
        ((heads + 2 * kv_heads) * 128, hidden),
        (128,),
        (128,),
        (hidden, heads * 128),
        (hidden,),
        (2 * intermediate, hidden),
        (hidden, intermediate),
    ]
    return [(vocabulary, hidden), *layer * layers, (hidden,), *([] if tied else [(vocabulary, hidden)])]


def count(model: str) -> int:
    return sum(torch.Size(s).numel() for s in shapes(model))


def fits(model: str, bytes_each: int, device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.mem_get_info(device)[0] - SPARE > bytes_each * count(model)


def flat(model: str, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """A tensor per parameter, together in buffers as gradients are; every one starts at a multiple of 256 bytes."""
    sizes = [torch.Size(s) for s in shapes(model)]
    buffer = torch.zeros(sum(cdiv(s.numel(), 64) * 64 for s in sizes), dtype=dtype, device=device)
    starts = itertools.accumulate((cdiv(s.numel(), 64) * 64 for s in sizes), initial=0)
    return [buffer[i : i + s.numel()].view(s) for s, i in zip(sizes, starts, strict=False)]


class Setup:
    """Parameters, gradients and moments of a model, and optimizers of both sides that share them."""

    def __init__(self, model: str, device: torch.device, copies: bool) -> None:
        self.params = [torch.nn.Parameter(t.normal_(std=0.02)) for t in flat(model, torch.float32, device)]
        self.grads = [t.normal_(std=1e-3) for t in flat(model, torch.float32, device)]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.copies = flat(model, torch.bfloat16, device) if copies else []
        of: dict[torch.Tensor, torch.Tensor] = dict(zip(self.params, self.copies, strict=False))
        self.ours = optim.AdamW(self.params, **HYPER)
        self.with_copies = optim.AdamW(self.params, bf16_copies=of, **HYPER)
        self.torch = torch.optim.AdamW(self.params, fused=True, **HYPER)
        m, v = flat(model, torch.float32, device), flat(model, torch.float32, device)
        for p, m_, v_ in zip(self.params, m, v, strict=True):
            for optimizer, where in ((self.ours, "cpu"), (self.with_copies, "cpu"), (self.torch, device)):
                optimizer.state[p] = {"step": torch.zeros((), device=where), "exp_avg": m_, "exp_avg_sq": v_}

    def sides(self) -> Iterator[tuple[str, dict[str, Call]]]:
        """What is timed: the name of it, and the call of each side."""
        total = getattr(torch.nn.utils, "get_total_norm", None)
        clip = torch.nn.utils.clip_grad_norm_
        norms = {"bi_ops": lambda: optim.global_norm(self.grads)}
        yield "norm", norms | ({"torch": lambda: total(self.grads, foreach=True)} if total else {})
        yield (
            "clip",
            {
                "bi_ops": lambda: optim.clip_grad_norm_(self.params, self.below()),
                "torch": lambda: clip(self.params, self.below(), foreach=True),
            },
        )
        yield "adamw", {"bi_ops": self.ours.step, "torch": self.torch.step}
        yield "step", {"bi_ops": self.our_step, "torch": lambda: (clip(self.params, MAX_NORM), self.torch.step())}
        if self.copies:
            yield (
                "adamw, copy, zero",
                {"bi_ops": lambda: self.with_copies.step(zero_grad=True), "torch": self.torch_copy_zero},
            )

    def below(self) -> float:
        """A bound that every norm here is above, so that there is something to scale; not so low that all becomes 0."""
        return MAX_NORM / 2

    def our_step(self) -> None:
        self.ours.step(grad_scale=optim.clip_scale(optim.global_norm(self.grads), MAX_NORM))

    @torch.no_grad()
    def torch_copy_zero(self) -> None:
        self.torch.step()
        torch._foreach_copy_(self.copies, list[torch.Tensor](self.params))
        torch._foreach_zero_(self.grads)


def refill(setup: Setup) -> None:
    """Gradients that a side has scaled or zeroed, so that each works on ordinary numbers."""
    for g in setup.grads:
        g.normal_(std=1e-3)


def gpu_ms(call: Call) -> float:
    """Milliseconds of the GPU, which is busy with something else while the host prepares the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # about 11 ms at 1.8 GHz
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def wall_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def times(sides: dict[str, Call], before: Call, device: torch.device) -> dict[str, tuple[float, float]]:
    """Of each side the medians of (milliseconds of the GPU, of the host). before: called before each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(2 + (REPEATS if device.type == "cuda" else 1)):
        # There and back: what runs second finds the GPU warmer and its clock lower.
        for name, call in list(sides.items())[:: -1 if i % 2 else 1]:
            before()
            if device.type == "cpu":
                host = gpu = wall_ms(call)
            else:
                torch.cuda.synchronize()
                host = wall_ms(call)
                before()
                gpu = gpu_ms(call)
            if i >= 2:  # the first compile, and send tables
                taken[name].append((gpu, host))
    return {n: (statistics.median(g for g, _ in t), statistics.median(h for _, h in t)) for n, t in taken.items()}


def rows(model: str, device: torch.device, bandwidth: float) -> Iterator[dict[str, object]]:
    """One row per operation and side."""
    n = count(model)
    setup = Setup(model, device, copies=fits(model, 18, device))
    for what, sides in setup.sides():
        refill(setup)
        # What a call leaves behind (scaled or zeroed gradients) costs the next one the same; only clipping minds.
        before = (lambda: refill(setup)) if what == "clip" else (lambda: None)
        lower = BYTES[what] * n / bandwidth * 1e3
        measured = times(sides, before, device)
        for side, (ms, host) in measured.items():
            yield {
                "model": model,
                "parameters": n,
                "tensors": len(setup.params),
                "what": what,
                "side": side,
                "ms": round(ms, 4),
                "host_ms": round(host, 4),
                "bytes_each": BYTES[what],
                "gb_s": round(BYTES[what] * n / ms / 1e6, 1),
                "lower_bound_ms": round(lower, 4),
                "of_lower_bound": round(lower / ms, 4),
                "speed": round(measured["torch"][0] / ms, 3) if "torch" in measured else "",
            }


def bits(device: torch.device) -> dict[str, bool]:
    """What must hold: AdamW has torch's bits (on a GPU), the norm those of reruns and of rows summed in shards."""
    sizes = [*shapes("dry"), (1001,), (33, 777), (3, 9002)]
    ours, theirs = ([torch.nn.Parameter(torch.empty(s, device=device)) for s in sizes] for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data.normal_())
    mine, other = optim.AdamW(ours, **HYPER), torch.optim.AdamW(theirs, foreach=False, fused=False, **HYPER)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        other.step()
    found = {}
    if device.type == "cuda":  # torch's CPU kernels take other products first
        found["adamw_equals_torch"] = all(
            torch.equal(a, b)
            for p, q in zip(ours, theirs, strict=True)
            for a, b in (
                (p, q),
                (mine.state[p]["exp_avg"], other.state[q]["exp_avg"]),
                (mine.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"]),
            )
        )
    grads = [p.grad for p in ours if p.grad is not None]
    norm = optim.global_norm(grads)
    found["norm_reruns_equal"] = all(torch.equal(optim.global_norm(grads), norm) for _ in range(5))
    sums = optim.row_sums(grads)
    shards = [torch.cat([optim.row_sums([part])[0] for part in g.chunk(3)]) for g in grads]
    found["norm_shards_equal"] = all(torch.equal(a, b) for a, b in zip(sums, shards, strict=True))
    found["norm_shards_equal"] &= torch.equal(optim.norm_of_row_sums(shards), norm)
    return found


def sweep(model: str, device: torch.device, bandwidth: float) -> Iterator[dict[str, object]]:
    """Neighbours of the configs, at one model; their bits must not differ."""
    setup, n = Setup(model, device, copies=fits(model, 18, device)), count(model)
    expected = optim.global_norm(setup.grads)

    def row(what: str, how: object, call: Call, equal: object) -> dict[str, object]:
        call()
        ms = times({"bi_ops": call}, lambda: None, device)["bi_ops"][0]
        gb_s = round(BYTES[what] * n / ms / 1e6, 1)
        print(f"{what}: {how}: {ms:.3f} ms, {gb_s} GB/s", flush=True)
        share = round(BYTES[what] * n / bandwidth * 1e3 / ms, 4)
        return {"model": model, "what": what, "config": str(how), "ms": round(ms, 4), "gb_s": gb_s} | {
            "of_lower_bound": share,
            "bits_equal": equal,
        }

    chosen = config.norm(1 << 20)
    for spans, warps in ((4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16)):
        how = chosen._replace(rows=spans, num_warps=warps)
        equal = torch.equal(ops.launch_norm(setup.grads, config=how), expected)
        yield row("norm", how, partial(ops.launch_norm, setup.grads, config=how), equal)
    hyper = adamw.Hyper.of(HYPER, 10)
    states = [setup.ours.state[p] for p in setup.params]
    moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    tensors = adamw.Columns(list(setup.params), list(setup.grads), *moments, [None] * len(states))
    for block, blocks, warps in itertools.product((512, 1024, 2048), (1, 2, 4, 8), (4, 8)):
        if block // warps not in (128, 256):  # elements of a warp: 4 or 8 a thread
            continue
        tile = config.ElementwiseConfig(block, blocks, warps)
        yield row("adamw", tile, partial(adamw.launch_adamw, tensors.p[0], tensors, hyper, None, False, tile), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that optim.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["0.6B", "1.7B", "4B", "8B"])
    parser.add_argument("--sweep", action="store_true", help="configs at the first of the models; optim_sweep.csv")
    parser.add_argument("--dry", action="store_true", help="a tiny model; the figures mean nothing")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="of the GPU's memory, bytes/s")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    models, device = ["dry"] if args.dry else args.models, runtime.default_device()
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    if args.sweep:
        swept = [r | about for r in sweep(models[0], device, args.bandwidth)]
        write_csv(args.out / "optim_sweep.csv", swept)
        return 0 if all(r["bits_equal"] in (True, "") for r in swept) else 1
    held = bits(device)
    print(", ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in held.items()), flush=True)
    found: list[dict[str, object]] = []
    start = time.monotonic()
    for model in models:
        if not fits(model, 16, device):
            print(f"{model}: left out, {16 * count(model) / 2**30:.0f} GiB do not fit the free memory", flush=True)
            continue
        for row in rows(model, device, args.bandwidth):
            found.append(row | {"bits_hold": all(held.values())} | about)
            fields = ("model", "what", "side", "ms", "host_ms", "gb_s", "of_lower_bound", "speed")
            print("  ".join(f"{row[f]!s:>10}" for f in fields), flush=True)
            write_csv(args.out / "optim.csv", found)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        print(f"[{time.monotonic() - start:5.0f} s] {model}", flush=True)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
