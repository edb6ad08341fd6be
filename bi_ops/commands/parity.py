"""`bi-ops parity`: generate, score again in other batches, count the bits that differ."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bi_ops.core.files import to_json

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.rollout.base import Completion, RolloutEngine, SamplingParams
    from bi_ops.verify.bisect import FirstDifference

HELP = "generate, re-score in other batches, compare the bits"

DESCRIPTION = """\
Sample from MODEL with a rollout engine, then compute the log-probability of every sampled token again with the
training model, in other batches: each sequence alone, all together, shuffled, and packed with distractors. Every
log-probability is compared bit for bit with the one the engine reported. With a temperature, top-k, top-p or min-p
both are those of the distribution that was sampled. Without them every token is drawn again, too, from training's
logits and its request's seed ("draws"): a rollout that is filtered unasked has equal log-probabilities, and other
tokens."""

EPILOG = """\
examples:
  bi-ops parity runs/demo/final                                  the embedded engine, here
  bi-ops parity ./Qwen3-0.6B --engine vllm --prompts 64 --new-tokens 256
  bi-ops parity ./Qwen3-0.6B --engine vllm --no-cuda-graphs      the same eagerly
  bi-ops parity ./Qwen3-0.6B --engine vllm --no-plugin           what stock vLLM does: the negative control
  bi-ops parity ./Model --engine vllm --attention vllm           with vLLM's FlashAttention 3
  bi-ops parity runs/demo/final --json > parity.json
  bi-ops parity ./before --against ./after --bisect              the first operator in which two checkpoints differ

exit codes:
  0  every log-probability is bitwise identical, and every token the one that its seed draws
  1  some differ, or they show nothing: NaN or infinite, or all of one value
  2  bad usage or bad input     3  the run failed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bi_ops.rollout import factory

    parser.add_argument("model", metavar="MODEL", help="a Hugging Face checkpoint folder")
    parser.add_argument("--engine", choices=factory.names(), default="embedded", help="what samples")
    parser.add_argument(
        "--attention",
        choices=("triton", "vllm"),
        help="who computes attention in both: bi_ops' kernels (any head size; the default), or FlashAttention 3",
    )
    parser.add_argument("--prompts", type=int, default=8, help="how many prompts (8)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to sample for each (8)")
    parser.add_argument("--max-prompt-tokens", type=int, help="prompts have 1 to this many tokens (256 if they fit)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from that many most likely tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely with this much (1: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="sample what has this part of the most likely's (0)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the prompts and the samples")
    parser.add_argument("--against", metavar="MODEL", help="score with this checkpoint instead")
    parser.add_argument(
        "--bisect", action="store_true", help="where a sequence differs, name the first operator that does"
    )
    parser.add_argument("--tp", type=int, default=1, help="vllm: GPUs that share the model; the plugin keeps every bit")
    parser.add_argument(
        "--rollout-devices", type=int, nargs="+", metavar="GPU", help="vllm: GPUs of its own, as many as --tp"
    )
    parser.add_argument(
        "--enable-expert-parallel", action="store_true", help="vllm, with --tp: GPUs have whole experts of a mixture"
    )
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="vllm: eager mode")
    parser.add_argument("--no-plugin", dest="plugin", action="store_false", help="vllm: without bi_ops' plugin")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON list, one object per composition; NaN and infinity, as a delta may be, are null",
    )


def random_prompts(count: int, longest: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of 1 to `longest` random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@contextlib.contextmanager
def _progress(shown: bool, prompts: int, compositions: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr over generation and the compositions; yields what is told (work, sequences done in it).

    Silent unless `shown` and stderr is a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bar = progress.add_task("generating", total=prompts * (1 + compositions))
        finished, current = 0, ""

        def tell(work: str, done: int) -> None:
            nonlocal finished, current
            if work != current:
                finished, current = finished + (prompts if current else 0), work
            progress.update(bar, description=work, completed=finished + done)

        yield tell


def sampling(args: argparse.Namespace) -> SamplingParams:
    """How every prompt is sampled, but for its seed. Raises ValueError for what no token can be sampled with."""
    from bi_ops.rollout.base import SamplingParams

    return SamplingParams(args.new_tokens, args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the engine is started with, besides the model and its attention."""
    from bi_ops.logprob import Distribution

    options: dict[str, Any] = {}
    if args.engine == "vllm":
        options = {"plugin": args.plugin, "cuda_graphs": args.cuda_graphs}
        options |= {} if args.tp == 1 else {"tensor_parallel_size": args.tp}
        options |= {"device_ids": args.rollout_devices} if args.rollout_devices else {}
        options |= {"enable_expert_parallel": True} if args.enable_expert_parallel else {}
    if sampling(args).distribution != Distribution():
        options["logprobs_mode"] = "processed_logprobs"
    return options


def _sample(
    args: argparse.Namespace, path: Path
) -> tuple[CausalLM, list[Completion], list[SamplingParams], RolloutEngine, dict[str, object]]:
    """The training model, the completions, how they were sampled, the engine, and it in words.

    The engine is closed, so that it leaves room for scoring.
    """
    from bi_ops.models import load_config, load_model
    from bi_ops.rl.seeds import SAMPLE, derive_seed
    from bi_ops.rollout import factory

    vocab_size = load_config(path).vocab_size
    model = load_model(path) if factory.lookup(args.engine).needs_model else None
    engine = factory.make_engine(args.engine, path, model, attention=args.attention, **engine_options(args))
    try:
        longest = args.max_prompt_tokens or max(1, min(engine.max_model_len - args.new_tokens, 512) // 2)
        prompts = random_prompts(args.prompts, longest, vocab_size, args.seed)
        seeds = [derive_seed(args.seed, SAMPLE, i) for i in range(args.prompts)]
        params = [dataclasses.replace(sampling(args), seed=seed) for seed in seeds]
        completions = engine.generate(prompts, params)
        described = dict(engine.describe())
    finally:
        engine.close()
    trained = load_model(args.against or path) if model is None or args.against else model
    return trained, completions, params, engine, described


def first_operator(
    args: argparse.Namespace, path: Path, model: CausalLM, completions: list[Completion], at: int
) -> FirstDifference | None:
    """The first operator in which the two sides differ on sequence `at`, which is sampled again by itself."""
    from bi_ops.models import load_model
    from bi_ops.rl.seeds import SAMPLE, derive_seed
    from bi_ops.rollout import factory
    from bi_ops.verify.bisect import bisect

    options = engine_options(args) | ({"cuda_graphs": False} if args.engine == "vllm" else {})
    own = load_model(path) if factory.lookup(args.engine).needs_model else None
    engine = factory.make_engine(args.engine, path, own, attention=args.attention, **options)
    try:
        params = dataclasses.replace(sampling(args), seed=derive_seed(args.seed, SAMPLE, at))
        return bisect(engine, model, list(completions[at].prompt), params)
    finally:
        engine.close()


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from bi_ops.models.config_fields import read_config
    from bi_ops.verify.compositions import COMPOSITIONS, rescore
    from bi_ops.verify.draws import redrawn

    for name in ("prompts", "new_tokens", "max_prompt_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.engine != "vllm" and not (args.cuda_graphs and args.plugin):
        raise ValueError("--no-cuda-graphs and --no-plugin change what vLLM does; add --engine vllm")
    if args.engine != "vllm" and args.tp != 1:
        raise ValueError(f"--tp {args.tp} spreads vLLM over GPUs; add --engine vllm")
    if args.engine != "vllm" and args.rollout_devices:
        raise ValueError("--rollout-devices names vLLM's GPUs; add --engine vllm")
    if args.bisect and args.rollout_devices:
        raise ValueError("--bisect records operators in this process; leave --rollout-devices out")
    if args.bisect and args.tp != 1:
        raise ValueError("--bisect records operators of a whole model; leave --tp out")
    sampling(args)
    path = Path(args.model)
    read_config(path)  # before anything is started
    if args.against:
        read_config(Path(args.against))

    # vLLM logs to stdout, where a JSON document must stand alone.
    with (
        contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext(),
        _progress(not args.json, args.prompts, len(COMPOSITIONS)) as tell,
    ):
        tell("generating", 0)
        model, completions, params, engine, described = _sample(args, path)
        if engine.orders is not None:  # None: the negative control
            model.adopt(engine.orders)
        reports = rescore(
            model,
            completions,
            orders=engine.orders,
            seed=args.seed,
            progress=lambda name, done, _: tell(name, done),
        )
        draws = None if args.against else redrawn(model, engine, completions, params)
        operator = None
        different = next((r.first_difference for r in reports.values() if r.first_difference is not None), None)
        if args.bisect and different is not None:
            tell("bisecting", 0)
            operator = first_operator(args, path, model, completions, different.sequence)
    shown = all(r.identical and not r.inconclusive for r in reports.values())
    shown = shown and (draws is None or not draws.tokens_different)

    if args.json:
        rows = [
            {
                "model": str(path),
                **described,
                "composition": name,
                "identical": r.identical,
                "inconclusive": r.inconclusive,
                "tokens_checked": r.tokens_checked,
                "tokens_different": r.tokens_different,
                "max_delta": r.max_delta,
                "mean_delta": r.mean_delta,
                "first_difference": None if r.first_difference is None else dataclasses.asdict(r.first_difference),
                **(
                    {"first_operator": None if operator is None else dataclasses.asdict(operator)}
                    if args.bisect
                    else {}
                ),
            }
            for name, r in reports.items()
        ]
        if draws is not None:
            drawn = {"composition": "draws", "identical": not draws.tokens_different, "inconclusive": ""}
            drawn |= {"max_delta": None, "mean_delta": None, **dataclasses.asdict(draws)}
            rows.append({"model": str(path), **described, **drawn})
        print(to_json(rows, indent=2))
        return 0 if shown else 1

    table = Table(title=f"{path}, {args.engine} engine, {args.prompts} prompts x {args.new_tokens} tokens")
    for column in ("composition", "tokens checked", "different", "max delta", "mean delta"):
        table.add_column(column, justify="left" if column == "composition" else "right")
    for name, r in reports.items():
        numbers = (str(r.tokens_checked), str(r.tokens_different), f"{r.max_delta:.3e}", f"{r.mean_delta:.3e}")
        table.add_row(name, *numbers, style=None if r.identical and not r.inconclusive else "red")
    if draws is not None:
        numbers = (str(draws.tokens_checked), str(draws.tokens_different), "", "")
        table.add_row("draws", *numbers, style="red" if draws.tokens_different else None)
    Console().print(table)
    for name, r in reports.items():
        if r.first_difference is not None:
            print(f"bi-ops parity: {name}: first difference: {r.first_difference}", file=sys.stderr)
    if args.bisect and different is not None:
        alone = f"sequence {different.sequence} by itself is equal in every operator: the difference is the batch's"
        print(f"bi-ops parity: {alone if operator is None else operator}", file=sys.stderr)
    if draws is not None and draws.tokens_different:
        print(f"bi-ops parity: draws: {draws}", file=sys.stderr)
        print("OTHER TOKENS than their seeds draw")
    worst = min(reports.values(), key=lambda r: (r.identical, not r.inconclusive))
    print(worst.verdict)
    return 0 if shown else 1
