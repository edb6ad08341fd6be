"""`bi-ops orders`: the reduction orders of an engine with a model, as a record that two sides can compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bi_ops.core.files import to_json
from bi_ops.core.orders import OrderRecord

HELP = "the reduction orders of an engine, and their digest"

DESCRIPTION = """\
Print the reduction orders in which an engine with MODEL samples on this machine, and their digest, without starting
it. Equal digests mean equal bits, so a server and what trains on its samples can be compared beforehand: `vllm serve`
with the plugin logs the same digest."""

EPILOG = """\
examples:
  bi-ops orders runs/demo/final
  bi-ops orders ./Qwen3-0.6B --engine vllm --json > server.json      where vLLM runs
  bi-ops orders ./Qwen3-0.6B --engine vllm --compare server.json     where training runs
  bi-ops orders runs/demo/final --compare runs/demo/orders.json      against an earlier run's

exit codes:
  0  printed; with --compare: equal     1  the orders differ
  2  bad usage or bad input     3  they cannot be computed here"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bi_ops.rollout import factory

    parser.add_argument("model", metavar="MODEL", help="a Hugging Face checkpoint folder")
    parser.add_argument("--engine", choices=factory.names(), default="embedded", help="what samples")
    parser.add_argument("--attention", choices=("triton", "vllm"), help="who computes attention")
    parser.add_argument("--compare", metavar="FILE", help="a record, or a run's orders.json, that must be equal")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def read_record(path: str | Path) -> OrderRecord:
    """The record in a file of `bi-ops orders --json`, or the rollouts' in a run's orders.json.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds no record.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"orders: {path} is not JSON: {e}") from e
    if isinstance(values, dict) and "rollout" in values:
        values = values["rollout"]
    return OrderRecord.from_dict(values)


def run(args: argparse.Namespace) -> int:
    from bi_ops.rollout import factory

    record = factory.lookup(args.engine).orders(args.model, args.attention)
    differences = [] if args.compare is None else record.differences(read_record(args.compare))
    if args.json:
        print(to_json(record.as_dict(), indent=2))
    else:
        print(f"architecture  {record.arch}")
        for name, order in record.orders.items():
            print(f"{name:<12}  {short(order)}")
        print(f"digest        {record.digest}")
    for difference in differences:
        print(f"bi-ops orders: differs: {difference}", file=sys.stderr)
    return 1 if differences else 0


def short(order: Any) -> str:
    """An order in one line: its kind and its fields."""
    values = ", ".join(f"{name}={value}" for name, value in order.items() if name != "kind")
    return f"{order['kind']}({values})" if values else str(order["kind"])
