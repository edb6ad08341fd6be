"""A whole decoder layer of Qwen3 while decoding: bi_ops as its vLLM plugin runs it, against vLLM's own kernels.

    python bench/decode_layer.py --out bench/results/h200 [--models 0.6B 8B] [--batches 1 8 64] [--keys 512]

Writes decode_layer.csv, a row a model and batch, and decode_layer_kernels.csv, a row a kernel. Times are microseconds
of the GPU a layer: medians of CUDA graphs of LAYERS layers, each with weights and keys of its own, so that both are
cold, all sides in turns in one process. The stock side is vLLM's custom operators with cuBLAS and FlashAttention 3
as full CUDA graphs hold it, queries' and keys' norms and rotation fused, and needs vLLM. `waiting_us` is bi_ops without
reading weights and metadata ahead. Each graph is replayed with other hidden states, and must end in the bits of the
same calls one by one: what reads too early finds the last replay's values.

Of a kernel, `us` is its own duration, beside others that run, and `adds_us` how much later it ends than all before it.
A batch of more than 64 has cuBLASLt verified first, whose binding may have to be built. `--dry` runs the layer in
Triton's interpreter on tiny inputs; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from products import MODELS
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch
from torch.autograd import DeviceType

from bi_ops import activation, attention, matmul, norm, rope
from bi_ops.core.compile_ahead import compile_only

LAYERS, PAGE, HEAD_DIM, EPS = 8, 16, 128, 1e-6
BATCHES, KEYS = (1, 8, 64), 512
FEW = 64  # rows of the `decode` GEMM; cuBLASLt computes more

#: (layer's weights and cache, what is alike for all layers, hidden states, residual) -> hidden states, residual
LayerFn = Callable[["Layer", "Batch", torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """Of one decoder layer: weights of the norms and the linear layers, and the KV cache as vLLM lays it out."""

    norms: list[torch.Tensor]  # before attention, before the MLP, of queries, of keys
    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    cache: torch.Tensor  # [blocks, Hkv, PAGE, 2 * D]


@dataclass(frozen=True)
class Batch:
    """What a decoding step is told of its sequences; one new token each."""

    positions: torch.Tensor
    angles: torch.Tensor
    table: torch.Tensor
    cu: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    heads: int
    kv_heads: int
    keys: int


def layer_of(sizes: tuple[int, int, int, int], n_blocks: int, device: str, dtype: torch.dtype) -> Layer:
    hidden, intermediate, heads, kv_heads = sizes

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=0.03)

    return Layer(
        [1 + weight(n) for n in (hidden, hidden, HEAD_DIM, HEAD_DIM)],
        weight((heads + 2 * kv_heads) * HEAD_DIM, hidden),
        weight(hidden, heads * HEAD_DIM),
        weight(2 * intermediate, hidden),
        weight(hidden, intermediate),
        torch.empty((n_blocks, kv_heads, PAGE, 2 * HEAD_DIM), device=device, dtype=dtype).normal_(),
    )


def batch_of(n: int, keys: int, heads: int, kv_heads: int, device: str, dtype: torch.dtype) -> Batch:
    pages = -(-keys // PAGE)
    table = 1 + torch.randperm(n * pages, device=device).int().view(n, pages)
    positions = torch.full((n,), keys - 1, device=device)
    slots = table[:, (keys - 1) // PAGE].long() * PAGE + (keys - 1) % PAGE
    cu = torch.arange(n + 1, device=device, dtype=torch.int32)
    lengths = torch.full((n,), keys, device=device, dtype=torch.int32)
    angles = rope.cos_sin_cache(HEAD_DIM, keys, dtype=dtype, device=device)
    return Batch(positions, angles, table, cu, lengths, slots, heads, kv_heads, keys)


def by_bi_ops(
    layer: Layer, b: Batch, x: torch.Tensor, residual: torch.Tensor, ahead: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The calls of `vllm_plugin.layers` and `vllm_plugin.backend`."""
    linear = partial(matmul.inference_linear, constant_weight=ahead)
    w_in, w_post, w_q, w_k = layer.norms
    x, residual = norm.add_rms_norm(x, residual, w_in, EPS, constant_weight=ahead)
    given = (w_q, w_k, b.positions, b.angles, b.heads, EPS)
    q, k, v = norm.qk_norm_rope(linear(x, layer.qkv), *given, constant_weight=ahead)
    k_cache, v_cache = layer.cache.transpose(1, 2).split(HEAD_DIM, dim=-1)
    attention.write_cache(k, v, k_cache, v_cache, b.slots, constant_metadata=ahead)
    out, pages = torch.empty_like(q), (k_cache, v_cache, b.table, b.cu, b.lengths)
    attention.paged_attention(q, *pages, backend="triton", out=out, constant_metadata=ahead)
    x, residual = norm.add_rms_norm(linear(out.flatten(1), layer.o), residual, w_post, EPS, constant_weight=ahead)
    return linear(activation.silu_and_mul(linear(x, layer.gate_up)), layer.down), residual


def by_vllm(b: Batch) -> LayerFn:
    """vLLM's own kernels. Like the layers' buffers, FlashAttention's schedule is made once for a batch."""
    import vllm._custom_ops as ops
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    splits = 32  # vLLM's most for CUDA graphs
    schedule = get_scheduler_metadata(
        *(b.lengths.shape[0], 1, b.keys, b.heads, b.kv_heads, HEAD_DIM, b.lengths),
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=b.cu,
        page_size=PAGE,
        causal=True,
        window_size=(-1, -1),
        num_splits=splits,
    )
    one = torch.ones((), device=b.cu.device)
    sizes = [n * HEAD_DIM for n in (b.heads, b.kv_heads, b.kv_heads)]

    def run(layer: Layer, b: Batch, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        linear = torch.nn.functional.linear
        w_in, w_post, w_q, w_k = layer.norms
        ops.fused_add_rms_norm(x, residual, w_in, EPS)
        qkv = linear(x, layer.qkv)
        ops.fused_qk_norm_rope(
            *(qkv, b.heads, b.kv_heads, b.kv_heads, HEAD_DIM, EPS, w_q, w_k, b.angles, True, b.positions)
        )
        q, k, v = (t.unflatten(1, (-1, HEAD_DIM)) for t in qkv.split(sizes, dim=-1))
        k_cache, v_cache = layer.cache.transpose(1, 2).split(HEAD_DIM, dim=-1)
        ops.reshape_and_cache_flash(k, v, k_cache, v_cache, b.slots, "auto", one, one)
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        flash_attn_varlen_func(
            q=q,
            k=k_cache,
            v=v_cache,
            out=out,
            cu_seqlens_q=b.cu,
            max_seqlen_q=1,
            seqused_k=b.lengths,
            max_seqlen_k=b.keys,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            window_size=[-1, -1],
            block_table=b.table,
            scheduler_metadata=schedule,
            fa_version=3,
            num_splits=splits,
        )
        x = linear(out.flatten(1), layer.o)
        ops.fused_add_rms_norm(x, residual, w_post, EPS)
        gate_up = linear(x, layer.gate_up)
        act = torch.empty((x.shape[0], gate_up.shape[1] // 2), device=x.device, dtype=x.dtype)
        torch.ops._C.silu_and_mul(act, gate_up)
        return linear(act, layer.down), residual

    return run


@dataclass(frozen=True)
class Captured:
    """A graph of all layers. Hidden states are copied to `x` and `residual` in front of them, within the graph."""

    graph: torch.cuda.CUDAGraph
    x: torch.Tensor
    residual: torch.Tensor
    out: tuple[torch.Tensor, torch.Tensor]


def all_layers(
    run: LayerFn, layers: list[Layer], b: Batch, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = x.clone(), residual.clone()  # vLLM's operators write in place
    for layer in layers:
        x, residual = run(layer, b, x, residual)
    return x, residual


def captured(run: LayerFn, layers: list[Layer], b: Batch, x: torch.Tensor, residual: torch.Tensor) -> Captured:
    x, residual = x.clone(), residual.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            all_layers(run, layers, b, x, residual)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = all_layers(run, layers, b, x, residual)
    return Captured(graph, x, residual, out)


def holds(run: LayerFn, made: Captured, layers: list[Layer], b: Batch) -> bool:
    """Does the graph end in the bits of the calls one by one, whatever it is given and was given before?"""
    equal = True
    for i in range(5):
        torch.manual_seed(i)
        made.x.normal_()
        made.residual.normal_()
        made.graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in made.out]
        x, residual = made.x.clone(), made.residual.clone()
        for layer in layers:
            x, residual = run(layer, b, x, residual)
            torch.cuda.synchronize()
        equal = equal and all(torch.equal(g, w) for g, w in zip(got, (x, residual), strict=True))
    return equal


def medians(sides: dict[str, Captured], rounds: int) -> dict[str, float]:
    """Microseconds a layer of each side, in turns there and back."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name, side in list(sides.items())[:: -1 if i % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side.graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken[name].append(start.elapsed_time(end) * 1e3 / LAYERS)
    return {name: sorted(ts)[len(ts) // 2] for name, ts in taken.items()}


def kernels_of(side: Captured, replays: int = 5) -> list[dict[str, object]]:
    """The kernels of a replay by name, in the order in which they first start: calls and times a layer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            side.graph.replay()
            torch.cuda.synchronize()
    on_gpu = (e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.name.startswith("Mem"))
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_gpu)
    calls: dict[str, int] = defaultdict(int)
    us: dict[str, float] = defaultdict(float)
    adds: dict[str, float] = defaultdict(float)
    last = 0.0
    for start, end, name in spans:
        name = name.split("<")[0].split("(")[0].removeprefix("void ")[:80]
        calls[name] += 1
        us[name] += end - start
        fresh = start - last > 50  # the first of a replay
        adds[name] += end - start if fresh else max(end - last, 0.0)
        last = max(last, end)
    a_layer = 1 / (replays * LAYERS)
    return [
        {
            "kernel": name,
            "calls": round(n * a_layer, 3),
            "us": round(us[name] * a_layer, 3),
            "adds_us": round(adds[name] * a_layer, 3),
        }
        for name, n in calls.items()
    ]


def dry() -> None:
    """The layer in the interpreter, with one token twice: equal rows."""
    layer, b = layer_of((256, 128, 2, 1), 8, "cpu", torch.bfloat16), batch_of(2, 33, 2, 1, "cpu", torch.bfloat16)
    b.table[1].copy_(b.table[0])
    b.slots[1] = -1
    x, residual = (torch.randn(1, 256).bfloat16().repeat(2, 1) for _ in range(2))
    x, residual = all_layers(by_bi_ops, [layer, layer], b, x, residual)
    assert torch.equal(x[0], x[1])
    assert not x.isnan().any()
    print("dry run done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that the results are written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["0.6B", "1.7B", "4B", "8B"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--keys", type=int, default=KEYS, help="of each sequence")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        dry()
        return 0
    if args.out is None:
        parser.error("--out is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    rows: list[dict[str, object]] = []
    kernels: list[dict[str, object]] = []
    begun = time.monotonic()
    with torch.inference_mode():
        with compile_only() as compiled:
            for model in args.models:
                layer = layer_of(MODELS[model], 2, "cuda", torch.bfloat16)
                for n in (n for n in args.batches if n <= FEW):
                    b = batch_of(n, args.keys, *MODELS[model][2:], "cuda", torch.bfloat16)
                    x = torch.zeros((n, MODELS[model][0]), device="cuda", dtype=torch.bfloat16)
                    all_layers(by_bi_ops, [layer], b, x, x)
                del layer
        print(f"[{time.monotonic() - begun:5.1f} s] {len(compiled.kernels)} kernels compiled", flush=True)
        for model in args.models:
            hidden, _, heads, kv_heads = MODELS[model]
            blocks = 1 + max(args.batches) * -(-args.keys // PAGE)
            layers = [layer_of(MODELS[model], blocks, "cuda", torch.bfloat16) for _ in range(LAYERS)]
            for n in args.batches:
                b = batch_of(n, args.keys, heads, kv_heads, "cuda", torch.bfloat16)
                x, residual = (torch.randn(n, hidden, device="cuda").bfloat16() for _ in range(2))
                if n > FEW:
                    by_bi_ops(layers[0], b, x, residual)
                    matmul.warmup()
                runs: dict[str, LayerFn] = {"ours": by_bi_ops, "waiting": partial(by_bi_ops, ahead=False)}
                try:
                    stock = by_vllm(b)
                    all_layers(stock, layers, b, x, residual)
                    runs["stock"] = stock
                except (ImportError, AttributeError, RuntimeError, TypeError) as e:  # a release that was not seen
                    print("no stock side:", repr(e)[:500])
                sides = {name: captured(run, layers, b, x, residual) for name, run in runs.items()}
                exact = all(holds(runs[name], sides[name], layers, b) for name in ("ours", "waiting"))
                us = medians(sides, 15)
                found = {name: kernels_of(side) for name, side in sides.items() if name != "waiting"}
                counts = {name: sum(float(str(k["calls"])) for k in each) for name, each in found.items()}
                rows.append(
                    {
                        "model": model,
                        "batch": n,
                        "keys": args.keys,
                        "ours_us": round(us["ours"], 2),
                        "waiting_us": round(us["waiting"], 2),
                        "stock_us": round(us["stock"], 2) if "stock" in us else "",
                        "speedup": round(us["stock"] / us["ours"], 3) if "stock" in us else "",
                        "ours_kernels": round(counts["ours"], 2),
                        "stock_kernels": round(counts["stock"], 2) if "stock" in counts else "",
                        "bits_equal": exact,
                    }
                    | about
                )
                for name, each in found.items():
                    kernels += [{"model": model, "batch": n, "side": name} | k | about for k in each]
                shown = {k: v for k, v in rows[-1].items() if k not in about}
                print(f"[{time.monotonic() - begun:5.1f} s]", shown, flush=True)
                for name, each in found.items():
                    print("   ", name, ", ".join(f"{k['kernel']} {k['us']}/{k['adds_us']}" for k in each), flush=True)
                write_csv(args.out / "decode_layer.csv", rows)
                write_csv(args.out / "decode_layer_kernels.csv", kernels)
                del sides, b
            del layers
            torch.cuda.empty_cache()
    ok = all(r["bits_equal"] for r in rows)
    print("bits", "hold" if ok else "DIFFER")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
