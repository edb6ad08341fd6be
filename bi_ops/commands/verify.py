"""`bi-ops verify`: the contract, checked on this machine, with negative controls."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bi_ops.core.files import to_json, write_atomically

if TYPE_CHECKING:
    from bi_ops.verify.suite import Report

HELP = "check every operator against the contract, bit for bit"

DESCRIPTION = """\
Run every operator with whatever must not change its bits: other batches, positions, neighbours, padding, kernel
configs, backends, streams, CUDA graphs, torch.compile, micro-batches. Every run also checks operators that break each
rule on purpose; one that is not found means that the suite itself is broken. Without a GPU, kernels run in Triton's
interpreter.

--op and --subject point the same checks at other operators: yours, torch's, vLLM's, flash-attn's, Liger's."""

EPILOG = """\
examples:
  bi-ops verify                                            about a minute
  bi-ops verify --level full --html report.html            4 to 10 minutes on a GPU
  bi-ops verify --op rms_norm --property "batch size"
  bi-ops verify --op my_module:MY_OP                       your own: see examples/verify_operator.py
  bi-ops verify --record here.json                         digests of every operator's bits
  bi-ops verify --compare there.json                       against another machine's
  bi-ops verify --subject torch                            what torch's own operators do
  bi-ops verify --subject vllm --subject flash-attn        what the installed releases do

exit codes:
  0  every result has the same bits, every control was found     1  a check failed
  2  bad usage or bad input     3  the run failed     4  a control was not found: the suite shows nothing"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=("quick", "full"), default="quick", help="how much (quick)")
    parser.add_argument("--op", action="append", metavar="NAME", help="an operator, PACK:NAME, or MODULE:ATTRIBUTE")
    parser.add_argument(
        "--subject",
        action="append",
        choices=("bi_ops", "torch", "vllm", "flash-attn", "liger"),
        help="all operators of a library (bi_ops)",
    )
    parser.add_argument("--property", action="append", metavar="NAME", help="only this property")
    parser.add_argument("--jobs", type=int, default=None, help="processes (one for each core, at most 16 for each GPU)")
    parser.add_argument("--list", action="store_true", help="print the operators and properties, and run nothing")
    parser.add_argument("--html", metavar="FILE", help="write a report that a browser opens")
    parser.add_argument("--output", metavar="FILE", help="write what --json prints")
    parser.add_argument("--record", metavar="FILE", help="write digests of all bits, to be sent or compared")
    parser.add_argument("--compare", metavar="FILE", help="a record whose digests must be equal to this machine's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int, Report], None]]:
    """A bar on stderr; silent unless `shown` and stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bar = progress.add_task("starting", total=None)
        yield lambda what, done, total, _: progress.update(bar, description=what, completed=done, total=total)


def _specs(args: argparse.Namespace) -> list[str]:
    from bi_ops.verify import packs

    named = [packs.resolve(op) for op in args.op or ()]
    chosen = args.subject or ([] if named else ["bi_ops"])
    return named + [f"{pack}:{name}" for pack in chosen for name in packs.subjects(pack)]


def _save(path: str, text: str) -> None:
    write_atomically(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from bi_ops.verify import golden, report, suite
    from bi_ops.verify.contract import PROPERTIES

    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
    specs = _specs(args)
    own = all(spec.startswith("bi_ops:") for spec in specs)
    if args.list:
        print("\n".join(["operators:", *(f"  {s}" for s in specs), "properties:", *(f"  {p}" for p in PROPERTIES)]))
        return 0
    table = Path(args.compare) if args.compare else golden.committed() if own else None
    expected = None if table is None else golden.read(table)
    with (
        contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext(),
        _progress(not args.json) as tell,
    ):
        digests = "all" if args.record or args.compare else "checked" if expected else ""
        chosen = args.property or tuple(PROPERTIES)
        found = suite.verify(specs, args.level, chosen, args.jobs, tell, digests=digests)
    differ = list(found.undigested)
    if digests:
        mine = golden.record(found.digests)
        if expected and (args.compare or found.digests.keys() & expected["digests"].keys()):
            differ += golden.differences(mine, expected)
        if args.record:
            _save(args.record, to_json(mine, indent=2) + "\n")
    if not found.checks:
        raise ValueError("verify: none of these properties applies to these operators, so nothing was checked")
    data = report.as_dict(found) | {"compared_with": table and str(table), "digests_differ": differ}
    if args.output:
        _save(args.output, to_json(data, indent=2) + "\n")
    if args.html:
        _save(args.html, report.to_html(found))
    if args.json:
        print(to_json(data, indent=2))
    else:
        Console(highlight=False).print(report.table(found))
        for check in found.failed:
            where = f"{check.subject}, {check.property}, {check.dtype}, {check.values} values"
            print(f"bi-ops verify: {where}: {check.message}", file=sys.stderr)
        for control in found.missed:
            print(f"bi-ops verify: control not found: {control}", file=sys.stderr)
        for name, why in found.not_run.items():
            print(f"not run: {name}: {why}")
        if table:
            print(f"digests: {len(differ)} differences from {table}")
        for line in differ:
            print(f"bi-ops verify: digests differ: {line}", file=sys.stderr)
        print(report.verdict(found))
    return 4 if found.missed else 1 if found.failed or differ else 0
