"""Runs `bi-ops verify` over a library's operators and keeps the outcome as a small file.

    python bench/verify.py --out bench/results/h200                      # bi_ops: verify.json
    python bench/verify.py --out bench/results/h200 --subject torch      # verify_torch_2.11.0.json
    python bench/verify.py --out bench/results/h200 --subject vllm       # verify_vllm_0.26.0.json
    python bench/verify.py --out bench/results/h200 --golden bi_ops/verify/golden

The file is written anew after each operator, so a run that is cut short leaves what it found. --golden FOLDER also
records a digest of every operator's bits as FOLDER/<architecture>-<torch>-<triton>.json, or compares with it.
Exit status: that of `bi-ops verify`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from record import find_commit

import bi_ops  # noqa: F401  # isort: skip  (before triton)
from bi_ops.core.files import to_json, write_json
from bi_ops.verify import golden, packs, report, suite

LEFT_OUT = ("results", "control_results")


def summary(found: suite.Report, commit: str) -> dict[str, Any]:
    """What `bi-ops verify --json` says, without a line for each check.

    operators: by name and property, the checks; compared: likewise, the pairs of results. failures: likewise, how many
    failed, and the first. slowest: the units of work that took longest, in seconds.
    """
    whole = {k: v for k, v in report.as_dict(found).items() if k not in LEFT_OUT}
    operators: dict[str, Counter[str]] = {}
    compared: dict[str, Counter[str]] = {}
    failed: dict[str, dict[str, list[str]]] = {}
    slowest: Counter[str] = Counter()
    for check in found.checks:
        operators.setdefault(check.subject, Counter())[check.property] += 1
        compared.setdefault(check.subject, Counter())[check.property] += check.comparisons
        slowest[f"{check.subject} {check.dtype} {check.size[0]}"] += round(check.seconds)
        if not check.ok():
            where = f"{check.dtype} {check.size[0]}, {check.values} values"
            failed.setdefault(check.subject, {}).setdefault(check.property, []).append(f"{where}: {check.message}")
    failures = {s: {p: f"{len(all_)} failed; {all_[0]}" for p, all_ in of.items()} for s, of in failed.items()}
    missed = [f"{c.property}: {c.subject}: {c.message}" for c in found.missed]
    more = {"slowest": dict(slowest.most_common(8)), "failures": failures, "controls_missed": missed}
    by_operator = {"operators": operators, "compared": compared}
    return {**whole, "commit": commit, **more, "digests": len(found.digests), **by_operator}


def file_name(subject: str, versions: dict[str, Any]) -> str:
    """verify.json for bi_ops; else with the library and its release."""
    if subject == "bi_ops":
        return "verify.json"
    package = {"liger": "liger-kernel"}.get(subject, subject)
    return f"verify_{subject}_{str(versions.get(package)).split('+')[0]}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the file is written to")
    parser.add_argument("--subject", choices=sorted(packs.PACKS), default="bi_ops")
    parser.add_argument("--level", choices=("quick", "full"), default="full")
    parser.add_argument("--property", action="append", help="only this property")
    parser.add_argument("--op", action="append", help="only this operator of the library")
    parser.add_argument("--jobs", type=int, help="processes (one for each core, at most 16 for each GPU)")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many; what is left is named in not_run")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="of digests")
    parser.add_argument("--html", type=Path, help="the report, as one page")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    commit, specs = (
        find_commit(args.commit),
        [f"{args.subject}:{name}" for name in args.op or packs.subjects(args.subject)],
    )
    properties, digests = args.property or tuple(suite.PROPERTIES), "all" if args.golden else ""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / file_name(args.subject, report.versions())

    def save(what: str, done: int, total: int, found: suite.Report) -> None:
        write_json(path, summary(found, commit) | {"units": total, "units_done": done})
        print(f"{found.seconds:6.1f} s  {done} of {total}  {what}: {len(found.failed)} failed so far", flush=True)

    found = suite.verify(specs, args.level, properties, args.jobs, save, digests=digests, seconds=args.seconds)
    differ = list(found.undigested)
    if digests:
        mine, table = golden.record(found.digests), golden.path(args.golden)
        if table.exists():
            differ += golden.differences(mine, golden.read(table))
        else:
            args.golden.mkdir(parents=True, exist_ok=True)
            table.write_text(to_json(mine, indent=1) + "\n", encoding="utf-8")
    if args.html:
        args.html.write_text(report.to_html(found), encoding="utf-8")
    for line in (*(f"{c.subject}, {c.property}, {c.dtype}, {c.size}: {c.message}" for c in found.failed), *differ):
        print(line)
    print(report.verdict(found), f"{len(found.digests)} digests, {len(differ)} differences", sep="; ")
    return 4 if found.missed else 1 if found.failed or differ else 0


if __name__ == "__main__":
    sys.exit(main())
