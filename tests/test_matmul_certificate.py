"""Certificates as records: given once, kept, asked for again where they prove less than is asked now. No GPU needed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bi_ops.matmul import certificate

PRODUCT = certificate.Product(0, torch.bfloat16, torch.bfloat16, "m", 64, 32, False, True, False)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The comparisons made and the shapes admitted, with a GPU and a binding that stand in."""
    seen = SimpleNamespace(compared=0, admitted=[], broken=[], capturing=False)

    def differing(p):
        seen.compared += 1
        return seen.broken

    binding = SimpleNamespace(admit=lambda *shape: seen.admitted.append(shape), version=lambda: 1, COMPETING=5)
    seen.binding = binding
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(certificate, "differing", differing)
    monkeypatch.setattr(certificate.cublaslt, "extension", lambda: binding)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    restart(monkeypatch)
    return seen


def restart(monkeypatch):
    """What a new process knows."""
    monkeypatch.setattr(certificate, "_verdicts", {})
    monkeypatch.setattr(certificate, "_file", None)


@pytest.mark.parametrize("broken", [[], [8, 16]])
def test_a_verdict_is_found_once_and_kept(broken, asked, monkeypatch):
    asked.broken = broken
    for _ in range(2):
        assert certificate.holds(PRODUCT) is (not broken)
        restart(monkeypatch)
    assert asked.compared == 1
    assert len(asked.admitted) == (0 if broken else 2)
    [record] = certificate.stored().values()
    assert (record["holds"], record["differs_at"]) == (not broken, broken)


def test_a_certificate_of_another_sweep_or_compiler_is_none(asked, monkeypatch):
    assert certificate.holds(PRODUCT) is True
    restart(monkeypatch)
    monkeypatch.setattr(certificate, "SWEEP", (*certificate.SWEEP, 8192))
    assert certificate.holds(PRODUCT) is True
    assert asked.compared == 2
    restart(monkeypatch)
    monkeypatch.setattr(certificate.triton, "__version__", "0")
    assert certificate.holds(PRODUCT) is True
    assert asked.compared == 3
    restart(monkeypatch)
    asked.binding.COMPETING = 6
    assert certificate.holds(PRODUCT) is True
    assert asked.compared == 4


@pytest.mark.parametrize(("candidates", "holds"), [([0, 0], True), ([], False), ([0, 1], False), ([0] * 5 + [1], True)])
def test_every_candidate_that_may_run_is_compared(candidates, holds, monkeypatch):
    """Each is off by what the list says; the sixth never comes to run."""

    def run(a, b, out, bias, index, restricted):
        if index < len(candidates):
            out.copy_(a @ b + candidates[index])
        return index < len(candidates)

    a, b = torch.randn(3, 4), torch.randn(4, 5)
    monkeypatch.setattr(certificate.cublaslt, "extension", lambda: SimpleNamespace(run=run, COMPETING=5))
    assert certificate._all_equal(a @ b, a, b, None, True) is holds


def test_a_captured_graph_asks_nothing(asked):
    asked.capturing = True
    assert certificate.holds(PRODUCT) is None
    assert (asked.compared, certificate.stored()) == (0, {})


@pytest.mark.parametrize("content", ["", "[1]", "null", json.dumps({"a": 1, "b": {}, "c": {"holds": "yes"}})])
def test_a_file_that_holds_no_certificates_is_as_good_as_none(content, asked):
    certificate.path().parent.mkdir(parents=True)
    certificate.path().write_text(content)
    assert certificate.stored() == {}
    assert certificate.holds(PRODUCT) is True
    assert len(certificate.stored()) == 1
