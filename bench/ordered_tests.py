"""A pytest plugin of gpu_tests.py: which tests run, in which order, and on which GPU each process runs them.

The environment says so, for processes of pytest-xdist inherit it: BI_OPS_TESTS is a JSON file with the names in their
order, BI_OPS_TEST_GPUS the GPUs that processes take in turn.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (gpus := os.environ.get("BI_OPS_TEST_GPUS")):
    numbers = gpus.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[int(worker.removeprefix("gw")) % len(numbers)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that are named, in their order."""
    names = json.loads(Path(os.environ["BI_OPS_TESTS"]).read_text(encoding="utf-8"))
    place = {name: i for i, name in enumerate(names)}
    items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])
