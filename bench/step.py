"""What exactness costs a training step: bi_ops' Qwen3 beside transformers' in plain PyTorch. Writes step.csv.

    python bench/step.py --out bench/results/h100 [--models 0.6B 1.7B] [--tokens 8192 32768] [--seqlen 2048 | rl]

A step is forward, log-probabilities of every next token, their mean, backward. Sides, all on the same tokens, in bf16:

    bi_ops            its model over fp32 master weights, weight gradients carried on in fp32, as `bi-ops train` does
    bi_ops, none      the same with nothing recomputed, and ...
    bi_ops, layer     ... with whole layers recomputed; the first recomputes norms, rotation and silu-and-mul
    torch             transformers' Qwen3, bf16 weights, SDPA, eager
    torch, compiled   the same under torch.compile, and so the loss
    torch, autocast   the same over fp32 master weights, eager
    torch, checkpoint as torch, compiled, with torch's activation checkpointing of every layer
    liger             transformers with Liger's fused kernels, fused linear cross-entropy included

torch's sides are not batch-invariant, and round weight gradients to bf16. Every side runs in a process of its own and
is timed by wall clock, the GPU waited for after each half of a step; medians. Making and handing over the buffers of
gradients counts; going through the objects of the model for garbage does not. Then the whole step is captured in a CUDA
graph and replayed: what it takes where the GPU never waits for Python. `--update` adds clip and AdamW, `--offload`
keeps AdamW's states in host memory. `--profile` writes step_profile.csv, the GPU time by kernel. `--dry` runs it all on
a tiny model on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from record import provenance, write_csv

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

SIDES = ("bi_ops", "torch", "torch, compiled", "torch, autocast")
RECOMPUTE = {"bi_ops": "selective", "bi_ops, none": "none", "bi_ops, layer": "layer"}
OTHER_SIDES = ("bi_ops, none", "bi_ops, layer", "torch, checkpoint", "liger")
#: Clip and AdamW of the sides: betas and weight decay are torch's.
LR, MAX_NORM = 1e-6, 1.0
SEED = 0
VOCABULARY = 151936
#: hidden, intermediate, layers, query heads, key heads; head_dim 128, tied embeddings but for 8B.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "dry": (64, 128, 2, 4, 2),
}


def shape(model: str, layers: int | None = None) -> dict[str, Any]:
    """A model's config.json; layers: fewer than it has, where memory ends."""
    hidden, intermediate, every, heads, kv_heads = SHAPES[model]
    layers = layers or every
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
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": model != "8B",
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
    }


class Step(NamedTuple):
    """forward to the mean log-probability; what comes before and after a backward; clip and optimizer; the weights.

    warm: what training calls before the first step.
    """

    forward: Callable[[], torch.Tensor]
    before: Callable[[], None]
    after: Callable[[], None]
    update: Callable[[], None]
    parameters: list[torch.nn.Parameter]
    warm: Callable[[], None] = lambda: None


def lengths_of(tokens: int, seqlen: int | None) -> list[int]:
    """Equal sequences; seqlen None: those of an RL step, many short and a few of the longest, 16 to 1."""
    if seqlen is not None:
        return [seqlen] * (tokens // seqlen)
    longest = max(tokens // 8, 16)
    lengths: list[int] = []
    generator = torch.Generator().manual_seed(SEED)
    while (left := tokens - sum(lengths)) > 0:
        share = 0.0625 + 0.9375 * float(torch.rand((), generator=generator)) ** 3
        lengths.append(min(max(int(longest * share), 2), left))
    if lengths[-1] < 2:
        lengths[-2:] = [sum(lengths[-2:])]
    return lengths


def ours(
    model: str,
    rows: list[torch.Tensor],
    layers: int | None,
    recompute: str,
    verify: bool = True,
    offload: str = "none",
) -> Step:
    from bi_ops import optim
    from bi_ops.matmul import TOKEN_STEP, warmup
    from bi_ops.models.packing import pack
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    network = Qwen3ForCausalLM(Qwen3Config.from_dict(shape(model, layers)), recompute=recompute)  # type: ignore[arg-type]
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(std=0.02)
    if verify:
        warmup(network)
    ids = [row.tolist() for row in rows]
    batch = pack([row[:1] for row in ids], [row[1:] for row in ids], network.device, align=TOKEN_STEP)
    parameters = list(network.parameters())
    optimizer: list[optim.AdamW] = []  # its states are there from the first update on
    if offload != "none":
        optimizer.append(optim.OffloadedAdamW(parameters, lr=LR, masters=offload == "masters"))

    def after() -> None:
        network.collect_main_grads()

    def update() -> None:
        if not optimizer:
            optimizer.append(optim.AdamW(parameters, lr=LR))
        norm = optim.global_norm([p.grad for p in parameters if p.grad is not None])
        optimizer[0].step(grad_scale=optim.clip_scale(norm, MAX_NORM))

    return Step(
        lambda: network.token_logprobs(batch).mean(),
        network.allocate_main_grads,
        after,
        update,
        parameters,
        network.warmup,
    )


def theirs(model: str, rows: list[torch.Tensor], layers: int | None, side: str) -> Step:
    """Sequences of unequal lengths are packed by transformers' position ids where attention takes them, else padded."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(**shape(model, layers), attn_implementation="sdpa")
    device = runtime.default_device()
    autocast, liger = "autocast" in side, side == "liger"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=True)
    with torch.device(device):
        network = Qwen3ForCausalLM(config)
    network = network.to(device, torch.float32 if autocast else torch.bfloat16)
    network.config.use_cache = False
    if "checkpoint" in side:
        network.train()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    targets = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=-100) for row in rows])

    def value(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The mean of the next tokens' log-probabilities, in fp32, without a copy of the logits kept for the backward.
        return -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())

    compiled = side in ("torch, compiled", "torch, checkpoint")
    call, mean = (torch.compile(network), torch.compile(value)) if compiled else (network, value)
    parameters = list(network.parameters())
    optimizer: list[torch.optim.AdamW] = []

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if liger:
                return -call(input_ids=ids, labels=targets).loss
            return mean(call(input_ids=ids).logits, targets)

    def update() -> None:
        if not optimizer:
            optimizer.append(torch.optim.AdamW(parameters, lr=LR, fused=device.type == "cuda"))
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer[0].step()

    return Step(forward, lambda: None, lambda: None, update, parameters)


def wait() -> float:
    """The time once the GPU has nothing left to do."""
    if not runtime.INTERPRET:
        torch.cuda.synchronize()
    return time.perf_counter()


def clear(made: Step) -> None:
    for p in made.parameters:
        p.grad = None


def replayed(made: Step, steps: int, value: torch.Tensor) -> float | None:
    """Median milliseconds of a step from a CUDA graph; None, and why on stderr, if it cannot be captured.

    Raises:
        RuntimeError: it has another value than `value`, the step's own.
    """
    torch.cuda.empty_cache()  # a graph has memory of its own, as much as a step takes
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            made.before()
            loss = made.forward()
            loss.backward()
            made.after()
            clear(made)
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

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        made.before()
        made.forward().backward()
        made.after()
        clear(made)
        wait()
    found = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and e.device_time_total]
    rows = [(e.key[:90], e.count, e.device_time_total) for e in sorted(found, key=lambda e: -e.device_time_total)]
    rows.insert(0, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    return [{"kernel": name, "launches": n, "gpu_ms": round(us / 1e3, 3)} for name, n, us in rows]


def digest(made: Step, loss: torch.Tensor) -> str:
    """Of the bits of the value and of every weight's fp32 gradient: equal where recomputation changes none."""
    found = hashlib.sha256(loss.detach().float().cpu().numpy().tobytes())
    for p in made.parameters:
        assert p.grad is not None
        for part in p.grad.flatten().view(torch.int32).split(1 << 24):
            place = torch.arange(1, len(part) + 1, device=part.device)  # or a permutation would go unseen
            found.update(str(int((part * place).sum())).encode())
    return found.hexdigest()[:16]


def measure(side: str, model: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of forward, backward, both, and the update, after one or two steps that warm up."""
    torch.manual_seed(SEED)
    seqlen = None if args.seqlen == "rl" else min(int(args.seqlen), tokens)
    vocabulary = shape(model)["vocab_size"]
    rows = [torch.randint(vocabulary, (n,)).to(runtime.default_device()) for n in lengths_of(tokens, seqlen)]
    own = side in RECOMPUTE
    if own:
        made = ours(model, rows, args.layers, RECOMPUTE[side], offload=args.offload)
    else:
        made = theirs(model, rows, args.layers, side)
    times: list[tuple[float, float]] = []
    bits = ""
    warm = min(args.steps, 2)
    for i in range(args.steps + warm):
        start = wait()
        made.before()
        loss = made.forward()
        middle = wait()
        loss.backward()
        made.after()
        end = wait()
        if i == 0 and own:
            bits = digest(made, loss)
        clear(made)
        if i == warm - 1 and not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
            gc.freeze()  # or the time of a step depends on how many objects there are to look at
        if i >= warm:
            times.append((middle - start, end - middle))
    forward_ms, backward_ms, step_ms = (
        1e3 * statistics.median(f(t) for t in times) for f in (lambda t: t[0], lambda t: t[1], sum)
    )
    peak = None if runtime.INTERPRET else torch.cuda.max_memory_allocated()
    loss = loss.detach()
    graph = not runtime.INTERPRET and args.graphs
    captured_ms = replayed(made, args.steps, loss) if graph else None
    profiled = kernels(made) if args.profile else []
    update_ms, update_peak = updated(made, args.steps) if args.update else (None, None)
    return {
        "model": model,
        "layers": args.layers or SHAPES[model][2],
        "tokens": tokens,
        "seqlen": args.seqlen,
        "side": side,
        "recompute": RECOMPUTE.get(side, "layer" if "checkpoint" in side else "none"),
        "offload": args.offload if own else "none",
        "forward_ms": round(forward_ms, 2),
        "backward_ms": round(backward_ms, 2),
        "step_ms": round(step_ms, 2),
        "captured_ms": captured_ms and round(captured_ms, 2),
        "update_ms": update_ms and round(update_ms, 2),
        "tokens_per_s": round(tokens / step_ms * 1e3),
        "peak_bytes": peak,
        "update_peak_bytes": update_peak,
        "value": round(loss.item(), 5),
        "bits": bits,
        "kernels": profiled,
    }


def updated(made: Step, steps: int) -> tuple[float, int | None]:
    """(median milliseconds of clip and AdamW, peak bytes of a step with the states in memory)."""
    times = []
    for i in range(steps + 1):
        made.before()
        made.forward().backward()
        made.after()
        if i == 0 and not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
        start = wait()
        made.update()
        times.append(wait() - start)
        clear(made)
    peak = None if runtime.INTERPRET else torch.cuda.max_memory_allocated()
    return 1e3 * statistics.median(times[1:]), peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that step.csv is written to")
    parser.add_argument("--models", nargs="+", choices=[m for m in SHAPES if m != "dry"], default=["0.6B", "1.7B"])
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, *OTHER_SIDES), default=SIDES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="of a step; each is a row")
    parser.add_argument("--seqlen", default="2048", help="of each sequence; rl: lengths as an RL step has them")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="leave out the captured step")
    parser.add_argument("--update", action="store_true", help="time clip and AdamW too, and the peak with its states")
    parser.add_argument(
        "--offload",
        choices=("none", "states", "masters"),
        default="none",
        help="what bi_ops' sides keep in host memory: AdamW's states, or the fp32 master weights too",
    )
    parser.add_argument("--profile", action="store_true", help="write step_profile.csv too: GPU time by kernel")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    if args.dry:
        args.models, args.tokens, args.steps = ["dry"], [32], 1
        args.seqlen = args.seqlen if args.seqlen == "rl" else "16"
    if args.one:
        side, model = args.one
        print(json.dumps(measure(side, model, args.tokens[0], args)))
        return 0
    rows, profiles, failed = [], [], False
    record = provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = {"--dry": args.dry, "--profile": args.profile, "--no-graphs": not args.graphs, "--update": args.update}
    flags = [flag for flag, given in wanted.items() if given]
    flags += ["--offload", args.offload]
    flags += ["--layers", str(args.layers)] if args.layers else []
    for model, tokens in itertools.product(args.models, args.tokens):
        for side in args.sides:
            sizes = ["--tokens", str(tokens), "--seqlen", str(args.seqlen), "--steps", str(args.steps)]
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
                f"{model:5} {tokens:6} {side:16} {row['step_ms']:9.1f} ms = forward {row['forward_ms']:.1f} + backward "
                f"{row['backward_ms']:.1f}; from a CUDA graph {row['captured_ms']}; {row['tokens_per_s']:,} tokens/s; "
                f"update {row['update_ms']} ms; {(row['peak_bytes'] or 0) / 2**30:.1f} GiB, with AdamW "
                f"{(row['update_peak_bytes'] or 0) / 2**30:.1f}; bits {row['bits']}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
