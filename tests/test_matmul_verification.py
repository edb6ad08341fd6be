"""The bitwise verification cache: compared once, kept, compared again where less was compared. No GPU needed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.matmul import backends, verification, warmup
from bi_ops.matmul.warmup import shapes_of

SHAPE = verification.GemmShape(0, torch.bfloat16, torch.bfloat16, "m", 64, 32, False, True, False)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The comparisons made and the shapes allowed, with a GPU and a binding that stand in."""
    seen = SimpleNamespace(compared=0, allowed=[], broken=[], capturing=False)

    def differing(p):
        seen.compared += 1
        return seen.broken

    binding = SimpleNamespace(allow=lambda *shape: seen.allowed.append(shape), version=lambda: 1, CANDIDATES=5)
    seen.binding = binding
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verification, "differing", differing)
    monkeypatch.setattr(verification.cublaslt, "extension", lambda: binding)
    monkeypatch.setattr(verification.cublaslt, "loaded", lambda: binding)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    verification.forget()
    yield seen
    verification.forget()


def test_without_a_binding_a_call_builds_none_and_the_shape_waits(asked, monkeypatch):
    assert verification.verify(SHAPE) is True
    verification.forget()
    monkeypatch.setattr(verification.cublaslt, "loaded", lambda: None)
    monkeypatch.setattr(verification.cublaslt, "extension", pytest.fail)
    assert verification.is_verified(SHAPE) is False  # Triton serves, though the file knows the shape
    assert verification.wanted() == [SHAPE]


@pytest.mark.parametrize("broken", [[], [8, 16]])
def test_a_verdict_is_found_once_and_kept(broken, asked, monkeypatch):
    asked.broken = broken
    for _ in range(2):
        assert verification.verify(SHAPE) is (not broken)
        verification.forget()
    assert asked.compared == 1
    assert len(asked.allowed) == (0 if broken else 2)
    [record] = verification.stored().values()
    assert (record["verified"], record["differs_at"]) == (not broken, broken)


def test_a_result_of_another_sweep_or_compiler_is_none(asked, monkeypatch):
    assert verification.verify(SHAPE) is True
    verification.forget()
    monkeypatch.setattr(verification, "SWEEP", (*verification.SWEEP, 8192))
    assert verification.verify(SHAPE) is True
    assert asked.compared == 2
    verification.forget()
    monkeypatch.setattr(verification.triton, "__version__", "0")
    assert verification.verify(SHAPE) is True
    assert asked.compared == 3
    verification.forget()
    asked.binding.CANDIDATES = 6
    assert verification.verify(SHAPE) is True
    assert asked.compared == 4


@pytest.mark.parametrize(("candidates", "equal"), [([0, 0], True), ([], False), ([0, 1], False), ([0] * 5 + [1], True)])
def test_every_candidate_that_may_run_is_compared(candidates, equal, monkeypatch):
    """Each is off by what the list says; the sixth never comes to run."""

    def run(a, b, out, bias, index, restricted):
        if index < len(candidates):
            out.copy_(a @ b + candidates[index])
        return index < len(candidates)

    a, b = torch.randn(3, 4), torch.randn(4, 5)
    monkeypatch.setattr(verification.cublaslt, "extension", lambda: SimpleNamespace(run=run, CANDIDATES=5))
    assert verification._all_equal(a @ b, a, b, None, True) is equal


def test_a_call_compares_nothing_until_it_is_asked_to(asked):
    assert verification.is_verified(SHAPE) is False
    assert (asked.compared, verification.stored(), verification.wanted()) == (0, {}, [SHAPE])
    assert verification.verify(SHAPE) is True
    assert verification.wanted() == []
    for _ in range(2):
        assert verification.is_verified(SHAPE) is True
        verification.forget()  # the file is enough
    assert asked.compared == 1


def test_a_captured_graph_compares_nothing(asked):
    asked.capturing = True
    assert verification.is_verified(SHAPE) is False
    with pytest.raises(RuntimeError, match="call warmup before"):
        verification.verify(SHAPE)
    assert (asked.compared, verification.stored()) == (0, {})


def test_a_warmup_verifies_what_has_run_so_far(asked, monkeypatch):
    monkeypatch.setattr(type(backends.get("cublaslt")), "available", lambda self: Support(True))
    refused = SHAPE._replace(n=128)
    for shape in (SHAPE, refused, SHAPE):
        verification.is_verified(shape)
    told = []

    def progress(done, total, key):
        told.append((done, total))
        asked.broken = [8] if done == 1 else []

    found = warmup(progress=progress)
    assert (found.verified, found.refused, found.reason) == (1, (refused.key(),), "")
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert (verification.is_verified(SHAPE), verification.is_verified(refused)) == (True, False)
    assert warmup().verified == 0  # nothing is left


def test_a_shape_that_waits_for_a_warmup_is_looked_up_once(asked, monkeypatch):
    """Until then the question is asked in every call, and reading the file costs the host more than a small GEMM."""
    looked_up = []
    find = verification._record

    def record(shape):
        looked_up.append(shape)
        return find(shape)

    monkeypatch.setattr(verification, "_record", record)
    assert [verification.is_verified(SHAPE) for _ in range(3)] == [False] * 3
    assert looked_up == [SHAPE]
    assert verification.verify(SHAPE) is True
    assert verification.is_verified(SHAPE) is True


@pytest.mark.parametrize(
    ("stored", "asked_for", "computed"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),  # a model in fp16 computes in fp16
    ],
)
def test_a_models_shapes_are_those_that_it_runs(stored, asked_for, computed):
    weight = SimpleNamespace(ndim=2, is_cuda=True, shape=(64, 32), dtype=stored, requires_grad=True)
    weight.get_device = lambda: 0
    bias = SimpleNamespace(ndim=1)
    forward, dx, dw = shapes_of(cast(Any, SimpleNamespace(parameters=lambda: [weight, bias])), asked_for)
    assert forward == SHAPE._replace(dtype=computed, out_dtype=computed)
    assert forward.is_linear()
    assert (dx.dtype, dx.out_dtype, dx.n, dx.other) == (computed, computed, 32, 64)
    assert (dw.dtype, dw.out_dtype, dw.batch_axis, dw.n, dw.other) == (computed, stored, "k", 32, 64)


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_a_warmup_without_cublaslt_says_why():
    assert "no GPU" in warmup().reason
    with pytest.raises(TypeError, match="float32"):
        warmup(dtype=torch.float32)


@pytest.mark.parametrize("content", ["", "[1]", "null", json.dumps({"a": 1, "b": {}, "c": {"verified": "yes"}})])
def test_a_file_without_results_is_as_good_as_none(content, asked):
    verification.path().parent.mkdir(parents=True)
    verification.path().write_text(content)
    assert verification.stored() == {}
    assert verification.verify(SHAPE) is True
    assert len(verification.stored()) == 1
