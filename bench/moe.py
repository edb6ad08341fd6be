"""Mixture-of-experts layers of Qwen3-30B-A3B's size: speed and bits of every pass. Writes moe.csv, a row at a time.

    python bench/moe.py --out bench/results/h200 [--tokens 1024 8192 32768] [--routing balanced zipf] [--seconds 300]

Baselines: `torch._grouped_mm`, for whole layers in eager PyTorch between gathers and a sum, and vLLM's `fused_experts`
outside its batch-invariant mode, where vLLM is there. TFLOP/s count the (token, slot) pairs, not the padding. All sides
of a row are timed in this process, in turns, as CUDA graphs; medians. Hidden states, weights and routing are random.

bits_equal_vllm: with vLLM's kernels in its batch-invariant mode. batch_invariant: rows alone have the bits that they
have among others, and an expert's rows those of `bi_ops.matmul.mm`. A gradient that is accumulated in fp32 stands
beside `torch._grouped_mm` and the addition of its result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from record import kept, row_provenance, write_csv

from bi_ops import matmul, moe
from bi_ops.core import vllm
from bi_ops.moe.launch import launch_grouped_matmul, launch_grouped_wgrad

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
BF16 = torch.bfloat16
Call = Callable[[], object]
Sides = dict[str, Call]


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16) * scale


def milliseconds(sides: Sides, rounds: int) -> dict[str, float]:
    """The median time of each side, as a CUDA graph of one call on the current stream; the sides take turns."""
    stream = torch.cuda.current_stream()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {}
    for name, call in sides.items():
        for _ in range(2):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError as error:  # a baseline that cannot be captured has no figure
            if name == "ours":
                raise
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        graphs[name] = graph
        graph.replay()
    for i in range(rounds):
        for name in list(graphs)[:: -1 if i % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graphs[name].replay()
            end.record(stream)
            stream.synchronize()
            taken.setdefault(name, []).append(start.elapsed_time(end))
    return {name: sorted(ts)[len(ts) // 2] for name, ts in taken.items()}


def routed(tokens: int, routing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts): tokens that prefer no expert, or expert i in proportion to 1 / (i + 1)."""
    logits = -torch.empty(tokens, EXPERTS, device="cuda").exponential_().log()  # Gumbel's: the largest are a sample
    if routing == "zipf":
        logits -= torch.arange(1, EXPERTS + 1, device="cuda").log()[torch.randperm(EXPERTS, device="cuda")]
    return moe.router(logits, TOP_K)


@contextlib.contextmanager
def invariant_vllm() -> Iterator[None]:
    """vLLM's MoE as in its batch-invariant mode."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    fused_moe.get_moe_configs.cache_clear()
    try:
        yield
    finally:
        os.environ["VLLM_BATCH_INVARIANT"] = "0"
        fused_moe.get_moe_configs.cache_clear()


@functools.cache
def vllm_functions() -> tuple[Callable, Callable] | None:
    """(fused_experts, topk_softmax) of vLLM, if it is here."""
    if not vllm.availability():
        return None
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts, _custom_ops.topk_softmax


class Layer:
    """One layer's operands at so many tokens."""

    def __init__(self, tokens: int, routing: str) -> None:
        self.tokens, self.routing = tokens, routing
        self.gate_up = randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5)
        self.down = randn(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5)
        self.hidden = randn(tokens, HIDDEN)
        self.weights, self.experts = routed(tokens, routing)
        self.dispatched = moe.dispatch(self.experts, EXPERTS)
        # Unpadded, as the baselines have it.
        self.order = self.experts.flatten().argsort(stable=True)
        self.places = self.order.argsort()
        self.ends = self.experts.flatten().bincount(minlength=EXPERTS).cumsum(0).int()

    def grouped_mm_layer(self, hidden, gate_up, down, weights) -> torch.Tensor:
        x = hidden[self.order // TOP_K]
        x = torch._grouped_mm(x, gate_up.mT, offs=self.ends)
        gate, up = x.chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=self.ends)
        y = y[self.places].view(self.tokens, TOP_K, HIDDEN)
        return (y * weights[..., None].to(BF16)).sum(1)


def gemm_sides(layer: Layer, name: str) -> Iterator[tuple[str, int, Sides, Callable[[], bool]]]:
    """(pass, FLOP, sides, are the bits a GEMM's of one expert) of the passes of one weight."""
    weight = layer.gate_up if name == "gate_up" else layer.down
    _, n, k = weight.shape
    pairs, offsets = layer.experts.numel(), layer.dispatched.offsets
    rows = layer.dispatched.rows.shape[0]
    x, g = randn(rows, k), randn(rows, n)
    dense_x, dense_g = x[:pairs].clone(), g[:pairs].clone()
    flop = 2 * pairs * n * k
    ends = offsets.tolist()
    some = [e for e in range(EXPERTS) if ends[e + 1] > ends[e]][:: EXPERTS // 4]

    def by_expert(out: torch.Tensor, expected: Callable[[int, slice], torch.Tensor], per_row: bool) -> bool:
        spans = {e: slice(ends[e], ends[e + 1]) for e in some}
        return all(torch.equal(out[span] if per_row else out[e], expected(e, span)) for e, span in spans.items())

    mm = functools.partial(matmul.mm, backend="triton")
    yield (
        f"{name} forward",
        flop,
        {
            "ours": lambda: launch_grouped_matmul(x, weight, offsets),
            "grouped_mm": lambda: torch._grouped_mm(dense_x, weight.mT, offs=layer.ends),
        },
        lambda: by_expert(launch_grouped_matmul(x, weight, offsets), lambda e, s: mm(x[s], weight[e].t()), True),
    )
    yield (
        f"{name} dx",
        flop,
        {
            "ours": lambda: launch_grouped_matmul(g, weight.mT, offsets),
            "grouped_mm": lambda: torch._grouped_mm(dense_g, weight, offs=layer.ends),
        },
        lambda: by_expert(launch_grouped_matmul(g, weight.mT, offsets), lambda e, s: mm(g[s], weight[e]), True),
    )
    dw = torch.empty_like(weight)
    theirs: Call = lambda: torch._grouped_mm(dense_g.t(), dense_x, offs=layer.ends)  # noqa: E731

    def ours_dw() -> torch.Tensor:
        launch_grouped_wgrad(g, x, offsets, dw, accumulate=False, aligned=True)
        return dw

    yield (
        f"{name} dw",
        flop,
        {"ours": ours_dw, "grouped_mm": theirs},
        lambda: by_expert(ours_dw(), lambda e, s: mm(g[s].t(), x[s]), False),
    )
    main = torch.zeros(weight.shape, device="cuda")

    def carried() -> torch.Tensor:
        launch_grouped_wgrad(g, x, offsets, main, accumulate=True, aligned=True)
        return main

    def from_zero() -> bool:
        main.zero_()
        return by_expert(carried().to(BF16), lambda e, s: mm(g[s].t(), x[s]), False)

    sides: Sides = {
        "ours": carried,
        "grouped_mm": lambda: main.add_(torch._grouped_mm(dense_g.t(), dense_x, offs=layer.ends)),
    }
    yield f"{name} dw, fp32 accumulated", flop, sides, from_zero


def layer_sides(layer: Layer) -> Iterator[tuple[str, int, Sides, Callable[[], bool]]]:
    """The whole layer, from the routing on."""
    flop = 2 * layer.experts.numel() * 3 * HIDDEN * INTERMEDIATE
    inputs = (layer.hidden, layer.gate_up, layer.down, layer.weights)
    functions, few = vllm_functions(), min(layer.tokens, 37)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return moe.experts(*inputs, layer.experts)

    def grouped_mm() -> torch.Tensor:
        with torch.no_grad():
            return layer.grouped_mm_layer(*inputs)

    sides: Sides = {"ours": ours, "grouped_mm": grouped_mm}
    if functions is not None:
        sides["vllm"] = lambda: functions[0](*inputs, layer.experts)

    def alone() -> bool:
        with torch.no_grad():
            gate_up, down = inputs[1], inputs[2]
            part = moe.experts(layer.hidden[:few], gate_up, down, layer.weights[:few], layer.experts[:few])
        return torch.equal(part, ours()[:few])

    yield "layer forward", flop, sides, alone
    leaves = [t.detach().requires_grad_() for t in inputs]
    g = randn(layer.tokens, HIDDEN)
    hidden, gate_up, down, weights = leaves
    out = moe.experts(hidden, gate_up, down, weights, layer.experts)
    theirs = layer.grouped_mm_layer(*leaves)

    def backward(out: torch.Tensor) -> Call:
        return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)

    def gradient_alone() -> bool:
        part = [t.detach()[:few].requires_grad_() for t in (leaves[0], leaves[3])]
        small = moe.experts(part[0], leaves[1].detach(), leaves[2].detach(), part[1], layer.experts[:few])
        whole = torch.autograd.grad(out, (leaves[0], leaves[3]), g, retain_graph=True)
        return all(
            torch.equal(a, b[:few]) for a, b in zip(torch.autograd.grad(small, part, g[:few]), whole, strict=True)
        )

    yield "layer backward", 2 * flop, {"ours": backward(out), "grouped_mm": backward(theirs)}, gradient_alone


def flat(out: object) -> list[torch.Tensor]:
    return [t.clone() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]


def bits_equal_vllm(layer: Layer, name: str) -> object:
    """Has vLLM's batch-invariant mode these bits? Empty where it computes no such thing, or is not here."""
    functions = vllm_functions()
    if functions is None or name not in ("layer forward", "router"):
        return ""
    if name == "router":
        logits = randn(layer.tokens, EXPERTS, scale=2)
        weights, experts = moe.router(logits, TOP_K)
        theirs = torch.empty_like(weights), torch.empty_like(experts)
        functions[1](*theirs, torch.empty_like(experts), logits, True)
        return torch.equal(weights, theirs[0]) and torch.equal(experts, theirs[1])
    with invariant_vllm(), torch.no_grad():
        theirs = functions[0](layer.hidden, layer.gate_up, layer.down, layer.weights, layer.experts)
        return torch.equal(theirs, moe.experts(layer.hidden, layer.gate_up, layer.down, layer.weights, layer.experts))


def rows(layer: Layer, rounds: int, passes: str) -> Iterator[dict[str, object]]:
    empty: dict[str, object] = dict.fromkeys(
        ("ours_tflops", "grouped_mm_tflops", "vllm_tflops", "best_tflops", "best"), ""
    )
    common: dict[str, object] = {"tokens": layer.tokens, "routing": layer.routing}
    equal = {"bits_equal_vllm": bits_equal_vllm(layer, "router"), "reruns_equal": "", "batch_invariant": ""}
    if re.search(passes, "router"):
        yield {"pass": "router", **common, **empty, **equal}
    for part in (layer_sides(layer), gemm_sides(layer, "gate_up"), gemm_sides(layer, "down")):
        for name, flop, sides, is_invariant in part:
            if not re.search(passes, name):
                continue
            invariant = is_invariant()
            if "accumulated" in name:  # another sum each time
                rerun: object = ""
            else:
                first = flat(sides["ours"]())
                rerun = all(
                    all(torch.equal(a, b) for a, b in zip(first, flat(sides["ours"]()), strict=True)) for _ in range(3)
                )
                del first
            vllms = bits_equal_vllm(layer, name)
            speed = {n: flop / ms / 1e9 for n, ms in milliseconds(sides, rounds).items()}
            best = max((n for n in speed if n != "ours"), key=lambda n: speed[n], default="")
            yield {
                **{"pass": name, **common},
                **{f"{n}_tflops": round(speed[n], 1) if n in speed else "" for n in ("ours", "grouped_mm", "vllm")},
                **{"best_tflops": round(speed[best], 1) if best else "", "best": best},
                **{"bits_equal_vllm": vllms, "reruns_equal": rerun, "batch_invariant": invariant},
            }
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 1024, 32768])
    parser.add_argument("--routing", nargs="+", default=["balanced", "zipf"], choices=["balanced", "zipf"])
    parser.add_argument("--passes", default="", help="a pattern of the passes that are timed; rows of others stay")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further pass after as many")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    given = parser.parse_args()
    began, found, where = time.monotonic(), list[dict[str, object]](), row_provenance(given.commit)
    path = given.out / "moe.csv"
    # Captures need another stream than the default one, and a backward runs on its forward's.
    with torch.cuda.stream(torch.cuda.Stream()):
        for tokens in given.tokens:
            for routing in given.routing:
                torch.manual_seed(0)
                for row in rows(Layer(tokens, routing), given.rounds, given.passes):
                    found.append(row | where)
                    write_csv(path, [*kept(path, found, ("pass", "tokens", "routing")), *found])
                    print(*row.values(), sep="  ", flush=True)
                    if time.monotonic() - began > given.seconds:
                        print("out of time")
                        return 2
                torch.cuda.empty_cache()
    bad = [r for r in found if False in (r["reruns_equal"], r["batch_invariant"], r["bits_equal_vllm"])]
    for row in bad:
        print("NOT EQUAL:", *list(row.values())[:3])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
