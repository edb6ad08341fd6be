"""Pictures in the documentation that bi_ops draws itself, from bench/results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bi_ops  # noqa: F401  # isort: skip  (before triton)
from table_parts import load

from bi_ops.verify import report, suite

#: The run of `bench/verify.py` that is shown: one in which something failed.
VERIFY = "cpu/verify_torch_2.14.1.json"


def verify(results: Path) -> str:
    """The heat map of a report, as the page of `bi-ops verify --html` has it."""
    record = load(results, VERIFY)
    checks = []
    for subject, properties in record["operators"].items():
        for name, count in properties.items():
            told = record["failures"].get(subject, {}).get(name, "")
            failed = int(told.split()[0]) if told else 0  # "2 failed; ..."
            compared = record["compared"][subject][name]
            for i in range(count):
                message = told if i < failed else ""
                checks.append(suite.Check(subject, name, "", (0, 0), "", compared if i == 0 else 0, message, 0.0))
    return report.heat_map(suite.Report(record["level"], checks)) + "\n"


#: File name to what is in it.
PICTURES: dict[str, Callable[[Path], str]] = {"verify.svg": verify}
