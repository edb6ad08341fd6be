"""A pytest plugin of gpu_tests.py: which tests run, in which order, and on which GPU each process runs them.

The environment says so, for processes of pytest-xdist inherit it: BI_OPS_TESTS is a JSON file with the names in their
order, BI_OPS_TEST_GPUS the GPUs that processes take in turn, BI_OPS_TEST_LOCKS a folder of locks: a kernel that one
process compiles is not compiled by another meanwhile, which finds it in Triton's cache afterwards.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (gpus := os.environ.get("BI_OPS_TEST_GPUS")):
    numbers = gpus.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[int(worker.removeprefix("gw")) % len(numbers)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that are named, in their order."""
    names = json.loads(Path(os.environ["BI_OPS_TESTS"]).read_text(encoding="utf-8"))
    place = {name: i for i, name in enumerate(names)}
    items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])


def one_at_a_time(compile_: Callable[..., Any], locks: Path) -> Callable[..., Any]:
    """`triton.compile`, in one process at a time for each kernel, with its constants, signature and options."""

    @functools.wraps(compile_)
    def locked(src: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        if not hasattr(src, "hash"):  # a file of intermediate code
            return compile_(src, target=target, options=options, **others)
        text = f"{src.hash()} {target} {sorted((options or {}).items())}"
        with (locks / hashlib.sha256(text.encode()).hexdigest()).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return compile_(src, target=target, options=options, **others)

    return locked


def pytest_sessionstart() -> None:
    if locks := os.environ.get("BI_OPS_TEST_LOCKS"):
        import triton.compiler

        import bi_ops  # noqa: F401  (before triton)

        triton.compiler.compile = one_at_a_time(triton.compiler.compile, Path(locks))
