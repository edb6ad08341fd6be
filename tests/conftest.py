"""Shared fixtures. Memory that a kernel forgets to write becomes NaN, so no test passes by luck."""

from __future__ import annotations

import importlib.util

import poisoned_memory
import pytest
import torch
from torch.utils._device import _device_constructors

import bi_ops  # noqa: F401  (before torch: decides how triton is imported)
from bi_ops.core import runtime

# `with torch.device(...)` keeps a list of the functions it redirects, made on first use: it has to hold torch's own.
_device_constructors()


if runtime.INTERPRET:
    import fast_interpreter
    import strict_masks

    fast_interpreter.install()
    strict_masks.install()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """`torch.empty` and its kin return NaN."""
    poisoned_memory.install(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_for_others():
    """What a test has freed goes back to the GPU: processes that run other tests there want it."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run on this machine."""
    return runtime.default_device()


def pytest_collection_modifyitems(config, items):
    # Markers, not keywords: those hold the names of folders too, and a clone may be called vllm.
    lacking = {"gpu": "needs a CUDA GPU", "vllm": "needs a CUDA GPU"} if runtime.INTERPRET else {}
    if not runtime.INTERPRET and importlib.util.find_spec("vllm") is None:
        lacking["vllm"] = "needs vLLM"
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
