"""What exactness costs a training step: bi_ops' Qwen3 beside transformers' in plain PyTorch. Writes step.csv.

    python bench/step.py --out bench/results/h100 [--models 0.6B 1.7B] [--tokens 8192] [--seqlen 2048]

A step is forward, log-probabilities of every next token, their mean, backward. Sides, all on the same tokens, in bf16:

    bi_ops            its model over fp32 master weights, weight gradients carried on in fp32, as `bi-ops train` does
    torch             transformers' Qwen3, bf16 weights, SDPA, eager
    torch, compiled   the same under torch.compile, and so the loss
    torch, autocast   the same over fp32 master weights, eager

torch's sides are not batch-invariant, and round weight gradients to bf16. Every side runs in a process of its own and
is timed by wall clock, the GPU waited for after each half of a step; medians. Making and handing over the buffers of
gradients counts; going through the objects of the model for garbage does not. Then the whole step is captured in a CUDA
graph and replayed: what it takes where the GPU never waits for Python. `--profile` writes step_profile.csv, the GPU
time by kernel. `--dry` runs it all on a tiny model on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import provenance, write_csv

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

SIDES = ("bi_ops", "torch", "torch, compiled", "torch, autocast")
SEED = 0
VOCABULARY = 151936
#: hidden, intermediate, layers, query heads, key heads; head_dim 128, tied embeddings.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "dry": (64, 128, 2, 4, 2),
}


def shape(model: str) -> dict[str, Any]:
    """A model's config.json."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[model]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32 if model == "dry" else 128,
        "vocab_size": 128 if model == "dry" else VOCABULARY,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
    }


#: Forward to the mean log-probability; what comes before and after a backward.
Step = tuple[Callable[[], torch.Tensor], Callable[[], None], Callable[[], None]]


def ours(model: str, ids: torch.Tensor) -> Step:
    from bi_ops.matmul import TOKEN_STEP, warmup
    from bi_ops.models.packing import pack
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    network = Qwen3ForCausalLM(Qwen3Config.from_dict(shape(model)))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(std=0.02)
    warmup(network)
    rows = ids.tolist()
    batch = pack([row[:1] for row in rows], [row[1:] for row in rows], network.device, align=TOKEN_STEP)

    def after() -> None:
        network.collect_main_grads()
        network.zero_grad(set_to_none=True)

    return lambda: network.token_logprobs(batch).mean(), network.allocate_main_grads, after


def theirs(model: str, ids: torch.Tensor, compiled: bool, autocast: bool) -> Step:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(**shape(model), attn_implementation="sdpa")
    device = runtime.default_device()
    with torch.device(device):
        network = Qwen3ForCausalLM(config)
    network = network.to(device, torch.float32 if autocast else torch.bfloat16)
    network.config.use_cache = False

    def value(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # The mean of the next tokens' log-probabilities, in fp32, without a copy of the logits kept for the backward.
        return -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    call, mean = (torch.compile(network), torch.compile(value)) if compiled else (network, value)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return mean(call(input_ids=ids).logits, ids)

    return forward, lambda: None, lambda: network.zero_grad(set_to_none=True)


def wait() -> float:
    """The time once the GPU has nothing left to do."""
    if not runtime.INTERPRET:
        torch.cuda.synchronize()
    return time.perf_counter()


def replayed(made: Step, steps: int, value: torch.Tensor) -> float | None:
    """Median milliseconds of a step from a CUDA graph; None, and why on stderr, if it cannot be captured.

    Raises:
        RuntimeError: it has another value than `value`, the step's own.
    """
    forward, before, after = made
    torch.cuda.empty_cache()  # a graph has memory of its own, as much as a step takes
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            before()
            loss = forward()
            loss.backward()
            after()
    except RuntimeError as e:
        print(f"not captured: {str(e).splitlines()[0]}", file=sys.stderr)
        return None
    times = []
    for _ in range(steps + 1):
        start = wait()
        graph.replay()
        times.append(wait() - start)
    if not torch.equal(loss, value):
        raise RuntimeError(f"a captured step has the value {loss.item()} and not {value.item()}")
    return 1e3 * statistics.median(times[1:])


def kernels(made: Step) -> list[dict[str, object]]:
    """GPU time of every kernel of a step, the longest first, and of all together."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    forward, before, after = made
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        before()
        forward().backward()
        after()
        wait()
    found = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and e.device_time_total]
    rows = [(e.key[:90], e.count, e.device_time_total) for e in sorted(found, key=lambda e: -e.device_time_total)]
    rows.insert(0, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    return [{"kernel": name, "launches": n, "gpu_ms": round(us / 1e3, 3)} for name, n, us in rows]


def measure(side: str, model: str, tokens: int, seqlen: int, steps: int, profiled: bool) -> dict[str, Any]:
    """Median milliseconds of forward, backward and both, after two steps that warm up; kernels: if `profiled`."""
    torch.manual_seed(SEED)
    ids = torch.randint(shape(model)["vocab_size"], (tokens // seqlen, seqlen)).to(runtime.default_device())
    made = ours(model, ids) if side == "bi_ops" else theirs(model, ids, "compiled" in side, "autocast" in side)
    forward, before, after = made
    times: list[tuple[float, float]] = []
    for i in range(steps + 2):
        start = wait()
        before()
        loss = forward()
        middle = wait()
        loss.backward()
        after()
        end = wait()
        if i == 1 and not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
            gc.freeze()  # or the time of a step depends on how many objects there are to look at
        if i > 1:
            times.append((middle - start, end - middle))
    forward_ms, backward_ms, step_ms = (
        1e3 * statistics.median(f(t) for t in times) for f in (lambda t: t[0], lambda t: t[1], sum)
    )
    peak = None if runtime.INTERPRET else torch.cuda.max_memory_allocated()
    loss = loss.detach()
    captured_ms = None if runtime.INTERPRET else replayed(made, steps, loss)
    return {
        "model": model,
        "tokens": tokens,
        "seqlen": seqlen,
        "side": side,
        "forward_ms": round(forward_ms, 2),
        "backward_ms": round(backward_ms, 2),
        "step_ms": round(step_ms, 2),
        "captured_ms": captured_ms and round(captured_ms, 2),
        "tokens_per_s": round(tokens / step_ms * 1e3),
        "peak_bytes": peak,
        "value": round(loss.item(), 5),
        "kernels": kernels(made) if profiled else [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that step.csv is written to")
    parser.add_argument("--models", nargs="+", choices=[m for m in SHAPES if m != "dry"], default=["0.6B", "1.7B"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--seqlen", type=int, default=2048, help="of each sequence")
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--profile", action="store_true", help="write step_profile.csv too: GPU time by kernel")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    if args.dry:
        args.models, args.tokens, args.seqlen, args.steps = ["dry"], 32, 16, 1
    if args.one:
        side, model = args.one
        print(json.dumps(measure(side, model, args.tokens, args.seqlen, args.steps, args.profile)))
        return 0
    rows, profiles, failed = [], [], False
    record = provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag, given in (("--dry", args.dry), ("--profile", args.profile)) if given]
    for model in args.models:
        for side in args.sides:
            sizes = ["--tokens", str(args.tokens), "--seqlen", str(args.seqlen), "--steps", str(args.steps)]
            command = [sys.executable, __file__, "--out", str(args.out), *sizes, *flags]
            done = subprocess.run([*command, "--one", side, model], capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]  # killed, it says nothing
                print(f"{model} {side}: {why[-1]}", file=sys.stderr)
                failed = True
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            for line in done.stderr.splitlines():
                if line.startswith("not captured"):
                    print(f"{model} {side}: {line}", file=sys.stderr)
            profiles += [{"model": model, "side": side} | kernel | record for kernel in row.pop("kernels")]
            rows.append(row | record)
            write_csv(args.out / "step.csv", rows)
            if profiles:
                write_csv(args.out / "step_profile.csv", profiles)
            print(
                f"{model:5} {side:16} {row['step_ms']:9.1f} ms = forward {row['forward_ms']:.1f} + backward "
                f"{row['backward_ms']:.1f}; from a CUDA graph {row['captured_ms']}; {row['tokens_per_s']:,} tokens/s",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
