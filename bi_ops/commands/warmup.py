"""`bi-ops warmup`: compile a model's training step and verify its GEMMs before the first step needs them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

HELP = "compile a model's training step ahead of time"

DESCRIPTION = """\
Compile all kernels of a model's training step in parallel, compile the cuBLASLt binding where no installed one fits,
and verify which of the model's GEMMs it may compute. `bi-ops train` does so before its first step, but for the binding;
without it GEMMs run in Triton: the same bits, more slowly. Results are kept per GPU, driver and versions; weights are
not read."""

EPILOG = """\
examples:
  bi-ops warmup ./Qwen3-1.7B
  bi-ops warmup ./Qwen3-1.7B --kernel-cache /shared/bi_ops-kernels

exit codes:
  0  warm     2  bad usage or bad input     3  a kernel does not compile, or the binding cannot be compiled"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face checkpoint folder; config.json is enough")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads that compile (default: one per core, 8 at most)")
    parser.add_argument(
        "--kernel-cache", metavar="DIR", help="where kernels are kept, such as a folder that a cluster shares"
    )
    parser.add_argument("--no-build", action="store_true", help="do not compile cuBLASLt's binding where it is missing")


def _small(fields: dict[str, Any]) -> CausalLM:
    """A model of these sizes with two layers, which have all kernels; whole where its config lists its layers."""
    from bi_ops.models import make_model

    try:
        return make_model(fields | {"num_hidden_layers": min(2, int(fields.get("num_hidden_layers", 2)))})
    except ValueError:
        return make_model(fields)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bi_ops.core import compile_ahead, runtime
    from bi_ops.models import load_config
    from bi_ops.models.config_fields import read_config
    from bi_ops.models.warmup import warmup_step

    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"warmup: --jobs is {args.jobs}; it must be at least 1")
    fields: dict[str, Any] = dict(read_config(args.model))
    load_config(args.model)  # or an unknown model is named only where there is a GPU
    console = Console(highlight=False, soft_wrap=True)
    if runtime.INTERPRET:
        console.print("no GPU: kernels run in Triton's interpreter, and nothing is to be compiled")
        return 0
    if args.kernel_cache:
        compile_ahead.use_cache(args.kernel_cache)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        found = warmup_step(_small(fields), args.jobs, show, build=not args.no_build)
    console.print(f"kernels   {found.kernels} in {found.seconds:.1f} s, for {compile_ahead.where()}")
    gemms = found.gemms
    refused = f", {len(gemms.refused)} refused, which Triton computes" if gemms.refused else ""
    console.print(f"GEMMs     {gemms.reason or f'{gemms.verified} verified{refused}'}")
    return 0
