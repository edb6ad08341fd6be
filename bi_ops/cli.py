"""The `bi-ops` command: parse, dispatch, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import bi_ops
from bi_ops.commands import audit, doctor, orders, parity, train, verify, warmup

DESCRIPTION = """\
Batch-invariant kernels for PyTorch: rollout and training log-probabilities equal, bit for bit."""

EPILOG = """\
start with:
  bi-ops doctor                          what runs on this machine
  bi-ops warmup MODEL                    compile its training step ahead of time, once per machine
  bi-ops train --preset demo --output runs/demo
  bi-ops parity runs/demo/final          count the differing bits
  bi-ops verify                          every operator against the contract
  bi-ops orders runs/demo/final          the reduction orders, and their digest

`bi-ops COMMAND --help` explains a command, with examples and its exit codes."""

#: Bad input: what the user can put right. Everything else is a failed run.
_BAD_INPUT = (ValueError, OSError)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bi-ops", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"bi-ops {bi_ops.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (train, parity, verify, audit, orders, warmup, doctor):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see each command's --help)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == []:  # what argparse of Python 3.11 makes of `--name=--`
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"bi-ops {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if args.debug:
            raise
        message = " ".join(str(e).split()) or type(e).__name__
        if not isinstance(e, (*_BAD_INPUT, RuntimeError, ArithmeticError)):
            message = f"{type(e).__name__}: {message}; --debug shows where"
        print(f"bi-ops {args.command}: error: {message}", file=sys.stderr)
        return 2 if isinstance(e, _BAD_INPUT) else 3


if __name__ == "__main__":
    sys.exit(main())
