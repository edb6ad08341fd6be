"""`bi-ops audit`: which operators of a transformers checkpoint run outside the contract, and what is left to do."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bi_ops.core.files import to_json

if TYPE_CHECKING:
    import torch

    from bi_ops.mode import Audit

HELP = "which operators of a transformers model are outside the contract"

DESCRIPTION = """\
Run one forward and backward of a transformers checkpoint on random tokens, and list every operator that does not keep
the contract, with its line: of the model as it is, then with its layers converted by bi_ops.nn.convert. What is left
then is for the mode, bi_ops.batch_invariant_backward_mode, which serves it or refuses it."""

EPILOG = """\
examples:
  bi-ops audit ./Llama-3.2-1B
  bi-ops audit ./Llama-3.2-1B --tokens 64 --json

exit codes:
  0  layers converted, and under the mode, everything keeps the contract     1  the mode refuses some
  2  bad usage or bad input     3  the run failed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face checkpoint folder that transformers loads")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each of two sequences (16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def load_model(path: str) -> torch.nn.Module:
    from bi_ops.core import runtime
    from bi_ops.models.config_fields import read_config

    read_config(Path(path))  # no folder, or no config: bad input, before transformers is asked
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError("audit: transformers is not installed; pip install transformers") from error
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return model.to(runtime.default_device())


def _audited(model: torch.nn.Module, ids: torch.Tensor) -> Audit:
    import bi_ops

    with bi_ops.audit() as found:
        logits = model(input_ids=ids, use_cache=False).logits  # type: ignore[operator]
        logits.backward(logits.detach().clone().fill_(1.0))
    model.zero_grad()
    return found


def _refusal(model: torch.nn.Module, ids: torch.Tensor) -> str:
    """Why the mode refuses the model; empty if it does not."""
    import bi_ops

    try:
        with bi_ops.batch_invariant_backward_mode():
            logits = model(input_ids=ids, use_cache=False).logits  # type: ignore[operator]
            logits.backward(logits.detach().clone().fill_(1.0))
    except NotImplementedError as error:
        return str(error)
    return ""


def examine(path: str, tokens: int) -> dict[str, Any]:
    """as_it_is and converted: what was found of each; layers_left: those that `convert` leaves, and why; refusal: what
    the mode says of the converted model; empty if it serves all."""
    import torch

    from bi_ops.nn.convert import convert, listing, unconvertible

    model = load_model(path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (2, tokens), generator=generator)  # type: ignore[union-attr, arg-type]
    ids = ids.to(next(model.parameters()).device)
    before, left = _audited(model, ids), unconvertible(model)
    convert(model, allow=sorted({kind for _, kind, _ in left}))
    return {
        "as_it_is": before,
        "converted": _audited(model, ids),
        "layers_left": [line.strip() for line in listing(left)],
        "refusal": _refusal(model, ids),
    }


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; it must be at least 1")
    with contextlib.redirect_stdout(sys.stderr):
        found = examine(args.model, args.tokens)
    converted = found["converted"]
    code = 1 if found["refusal"] else 0
    if args.json:
        data = {k: [asdict(s) for s in found[k].strays] for k in ("as_it_is", "converted")}
        rest = {k: found[k] for k in ("layers_left", "refusal")}
        print(to_json({"model": args.model, **data, **rest}, indent=2))
        return code
    console = Console(highlight=False)
    for title, audit in (("as it is", found["as_it_is"]), ("after bi_ops.nn.convert", converted)):
        table = Table("operator", "pass", "calls", "under the mode", "line", title=f"{args.model}, {title}")
        for s in audit.strays:
            where = f"{Path(s.where).name}: {s.code}"
            part, then = "backward" if s.backward else "forward", "served" if s.served else "REFUSED"
            table.add_row(*map(escape, (s.operator, part, str(s.calls), then, where)))
        console.print(table)
    if found["layers_left"]:
        console.print("convert leaves these layers to the mode:")
        for line in found["layers_left"]:
            console.print(f"  {line}", soft_wrap=True, markup=False)
    counts = f"{len(found['as_it_is'].strays)} operators outside the contract, {len(converted.strays)} after convert"
    console.print(f"{counts}; the mode {'REFUSES the rest' if code else 'serves the rest'}", soft_wrap=True)
    if code:
        print(f"bi-ops audit: {found['refusal']}", file=sys.stderr)
    return code
