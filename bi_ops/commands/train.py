"""`bi-ops train`: GRPO with a bitwise check in every step."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from rich.console import Console

    from bi_ops.parallel import Ranks
    from bi_ops.rl import StepMetrics, TrainConfig

HELP = "GRPO with a bitwise check in every step"

DESCRIPTION = """\
Train a language model with GRPO on a task generated on the spot. Every step compares every log-probability that the
rollout engine reported with the one training computes, bit for bit; a difference stops the run and names the token.

Without --model, a tiny model with random weights is written to OUTPUT/model first. Settings come from --preset, then
--config (a JSON file, such as an earlier run's config.json; with --resume the run's own), then the options here, the
later over the earlier. What none of them sets is as in --preset demo, and stands in brackets."""

EPILOG = """\
examples:
  bi-ops train --output runs/first                        the defaults: a tiny model, the embedded engine
  bi-ops train --preset h100 --output runs/h100           vLLM, on one H100
  bi-ops train --model ./Qwen3-0.6B --engine vllm --task sort --max-new-tokens 8 --output runs/sort
  bi-ops train --preset h100 --rollout-devices 1 --output runs/two     vLLM on the second GPU
  bi-ops train --output runs/first --steps 60 --resume    go on where the run stopped
  torchrun --nproc-per-node 4 -m bi_ops train --atoms 4 --tp-rollout 2 --preset h100 --output runs/4
  torchrun --nproc-per-node 4 -m bi_ops train --model ./Qwen3-0.6B --segments 4 --tp 4 --output runs/tp

exit codes:
  0  trained     1  a log-probability differed (OUTPUT/difference.json says where)
  2  bad usage or bad input     3  the run failed     130  interrupted; go on with --resume

OUTPUT holds config.json, orders.json (the reduction orders), metrics.jsonl, tensorboard/, checkpoints/, summary.json,
and final/ (Hugging Face format). Two runs of the same settings on one machine end in the same bytes.
All JSON is strict: a number that is NaN or infinite, as a delta may be, is null."""

#: Options whose names and types are those of TrainConfig's fields.
_PLAIN: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "GRPO steps"),
    ("prompts_per_step", int, "different prompts in a step"),
    ("group_size", int, "completions of each prompt; advantages are taken within a group"),
    ("updates_per_rollout", int, "optimizer steps on each rollout"),
    ("max_new_tokens", int, "the longest answer, in tokens"),
    ("symbols", int, "how many different symbols the task uses"),
    ("lr", float, "AdamW's learning rate"),
    ("clip", float, "the importance ratio counts between 1 - CLIP and 1 + CLIP"),
    ("kl", float, "coefficient of the KL to the initial model"),
    ("max_grad_norm", float, "gradients are scaled down to this norm"),
    ("temperature", float, "of sampling; log-probabilities are those of the distribution that was sampled"),
    ("top_k", int, "sample from that many most likely tokens, 0 for all"),
    ("top_p", float, "sample from the most likely tokens that have this much of the probability"),
    ("min_p", float, "sample tokens that have this part of the most likely one's probability"),
    ("seed", int, "fixes the weights, the problems and the samples"),
    ("save_every", int, "steps between checkpoints, 0 for none"),
    ("max_tokens_per_microbatch", int, "cut the training pass into packs of at most this many tokens"),
    ("atoms", int, "parts of each batch whose gradients are added by a tree; the most data-parallel ranks"),
    ("segments", int, "pieces of sums over features, added by a tree; the most ranks that can share the model"),
    ("gpu_memory_utilization", float, "vllm: the part of the GPU's memory that vLLM takes; the trainer needs the rest"),
    ("kv_cache_memory_bytes", int, "vllm: the KV cache's size, where other processes use the GPU too"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bi_ops.models.base import Recompute
    from bi_ops.rl.config import Offload, TrainConfig
    from bi_ops.rl.presets import PRESETS
    from bi_ops.rl.tasks import TASKS
    from bi_ops.rollout import factory

    given: dict[str, Any] = {"default": argparse.SUPPRESS}  # so that only what was typed overrides a preset or a file
    parser.add_argument("--output", required=True, metavar="DIR", help="the run's folder; must be new, or --resume")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT's latest checkpoint")
    parser.add_argument(
        "--kernel-cache", metavar="DIR", help="where compiled kernels are kept, such as a folder that a cluster shares"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from")
    parser.add_argument("--config", metavar="FILE", help="a JSON file of settings")
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face checkpoint folder", **given)
    parser.add_argument("--engine", choices=factory.names(), help="what samples (embedded)", **given)
    parser.add_argument(
        "--attention",
        choices=("triton", "vllm"),
        help="who computes attention in rollout and training: bi_ops' kernels (any head size; the default), or "
        "FlashAttention 3",
        **given,
    )
    parser.add_argument("--task", choices=sorted(TASKS), help="what is learned (repeat)", **given)
    parser.add_argument(
        "--recompute",
        choices=get_args(Recompute),
        help="what the backward computes again to save memory: norms, rotation and silu-and-mul (the default), whole "
        "layers, or nothing; changes no bit",
        **given,
    )
    parser.add_argument(
        "--offload",
        choices=get_args(Offload),
        help="what waits in host memory between updates: nothing (the default), AdamW's states, or these and the fp32 "
        "master weights; changes no bit",
        **given,
    )
    parser.add_argument("--mean", choices=("token", "sequence"), help="what counts alike in the loss (token)", **given)
    parser.add_argument(
        "--on-difference", choices=("stop", "warn"), help="what a differing log-probability does (stop)", **given
    )
    parser.add_argument(
        "--tp-rollout",
        dest="tensor_parallel_size",
        type=int,
        help="vllm: GPUs that share the model that samples; changes no bit",
        **given,
    )
    parser.add_argument(
        "--rollout-devices",
        dest="device_ids",
        type=int,
        nargs="+",
        metavar="GPU",
        help="vllm: GPUs of its own, as many as --tp-rollout; weights go there by NCCL; changes no bit",
        **given,
    )
    parser.add_argument(
        "--tp",
        type=int,
        help="neighbouring ranks that share the model in training, a divisor of --segments; changes no bit",
        **given,
    )
    parser.add_argument(
        "--peer-memory",
        action=argparse.BooleanOptionalAction,
        help="several ranks of one host write into the other GPUs' memory and need no collectives (default: where the "
        "GPUs reach each other); changes no bit",
        **given,
    )
    parser.add_argument(
        "--ep",
        type=int,
        help="neighbouring ranks that share the experts of a mixture in training; changes no bit",
        **given,
    )
    parser.add_argument(
        "--dp", type=int, metavar="N", help="data-parallel ranks; torchrun must start as many, times --tp"
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="each data-parallel rank keeps a shard of weights, gradients and AdamW's states; changes no bit",
        **given,
    )
    parser.add_argument(
        "--no-reshard-after-forward",
        dest="reshard_after_forward",
        action="store_false",
        help="with --fsdp: gather weights once a step and keep them whole, 2 bytes a parameter; changes no bit",
        **given,
    )
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="vllm: eager mode", **given)
    parser.add_argument(
        "--step-graphs",
        action="store_true",
        help="run training's micro-batches from CUDA graphs; changes no bit",
        **given,
    )
    parser.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="vllm, with --tp-rollout: GPUs have whole experts, not a slice of each; changes no bit",
        **given,
    )
    parser.add_argument(
        "--sleep", action="store_true", help="vllm: its weights and KV cache leave the GPU while training runs", **given
    )
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for name, kind, text in _PLAIN:
        shown = text if defaults[name] is None else f"{text} ({defaults[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=shown, **given)


def make_config(args: argparse.Namespace) -> TrainConfig:
    """Preset, then file (on resume the run's own), then what was typed."""
    from bi_ops.rl import PRESETS, TrainConfig
    from bi_ops.rl.config import read_settings
    from bi_ops.rl.runner import CONFIG

    settings: dict[str, Any] = {}
    if args.preset:
        settings |= PRESETS[args.preset].to_dict()
    own = Path(args.output) / CONFIG
    if args.config:
        settings |= read_settings(args.config)
    elif args.resume and not args.preset and own.exists():
        settings |= read_settings(own)
    typed = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    try:
        return TrainConfig.from_dict(settings | typed)
    except TypeError as e:  # of the file: bad input, where a TypeError from anywhere else is a failed run
        raise ValueError(str(e)) from e


def _line(m: StepMetrics, steps: int) -> str:
    parity = "identical" if m.tokens_different == 0 else f"{m.tokens_different} DIFFERENT"
    return (
        f"step {m.step:>{len(str(steps))}}/{steps}  reward {m.reward_mean:.3f}  "
        f"parity {m.tokens_checked} tokens {parity}  gradient {m.grad_norm:.3f}  {m.seconds:.1f} s"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from bi_ops import parallel, rl

    config = make_config(args)
    ranks = parallel.Ranks.of_torchrun()
    if ranks.size % config.tp or args.dp not in (None, ranks.size // config.tp):
        wanted, times = (args.dp or 1) * config.tp, f" --tp {config.tp}" if config.tp > 1 else ""
        asked = (f" --dp {args.dp}" if args.dp else "") + times
        raise ValueError(
            f"train:{asked}, but {ranks.size} processes were started; use torchrun --nproc-per-node {wanted} "
            "-m bi_ops train ..."
        )
    data = dataclasses.replace(ranks, rank=ranks.rank // config.tp, size=ranks.size // config.tp)
    parallel.check_ranks(parallel.order(config.atoms), data, config.fsdp)  # before a model is made
    if args.kernel_cache:
        from bi_ops.core import compile_ahead

        compile_ahead.use_cache(args.kernel_cache)
    console = Console(highlight=False, soft_wrap=True)
    try:
        summary = _run_with_progress(config, args, console, ranks)
    except rl.DifferenceFound as difference:
        print(f"bi-ops train: {difference}", file=sys.stderr)
        print(f"bi-ops train: the report is in {Path(args.output) / 'difference.json'}", file=sys.stderr)
        return 1
    if ranks.rank > 0:
        return 0
    first, last = f"{summary.reward_first:.3f}", f"{summary.reward_last:.3f}"
    console.print(f"reward        {first} (first five steps) -> {last} (last five)")
    console.print(f"parity        {summary.tokens_checked} tokens checked, {summary.tokens_different} different")
    console.print(f"weights       sha256 {summary.weights_sha256}")
    console.print("              (every such run on this machine ends in it; another CPU or GPU may end in another)")
    console.print(f"metrics       {Path(args.output) / 'metrics.jsonl'}")
    console.print(f"checkpoint    {Path(args.output) / 'final'}")
    return 0


def _run_with_progress(config: TrainConfig, args: argparse.Namespace, console: Console, ranks: Ranks) -> Any:
    """`rl.run` under a progress bar on a terminal, with one line per step elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bi_ops import rl

    def warn(difference: rl.DifferenceFound) -> None:
        console.print(f"warning: {difference}")

    if not console.is_terminal or ranks.size > 1:

        def show(m: StepMetrics) -> None:
            print(_line(m, config.steps), flush=True)

        return rl.run(config, args.output, resume=args.resume, on_step=show, on_difference=warn, ranks=ranks)

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]}"),
        TextColumn("parity {task.fields[parity]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=config.steps, reward="-", parity="-")
        checked = different = 0

        def advance(m: StepMetrics) -> None:
            nonlocal checked, different
            checked, different = checked + m.tokens_checked, different + m.tokens_different
            parity = f"{checked} tokens, " + ("identical" if different == 0 else f"[red]{different} different[/red]")
            progress.update(bar, completed=m.step, reward=f"{m.reward_mean:.3f}", parity=parity)

        return rl.run(config, args.output, resume=args.resume, on_step=advance, on_difference=warn)
