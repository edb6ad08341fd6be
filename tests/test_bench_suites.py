"""bench/suites.py: tests of others see bi_ops behind the names that they import. Stand-ins for theirs run here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import suites_worker

BENCH = Path(suites_worker.__file__).parent

FLASH = """
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.padding import half
from bi_ops.core import runtime

DEVICE = runtime.default_device()

def made(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)

def test_deterministic():
    q, k, v = made(2, 5, 4, 16), made(2, 7, 2, 16), made(2, 7, 2, 16)
    out = flash_attn_func(q, k, v, 0.0, causal=True, window_size=(-1, -1), deterministic=True)
    assert out.shape == q.shape
    first, again = (torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert half(2) == 1

def test_without_bi_ops():
    pass

def test_that_fails():
    assert flash_attn_func(made(1, 2, 1, 16), made(1, 2, 1, 16), made(1, 2, 1, 16)) is None
"""

MODE = """
import torch
from batch_invariant_ops import set_batch_invariant_mode
from bi_ops.core import runtime

a = torch.linspace(-100, 100, 32 * 48, device=runtime.default_device()).reshape(32, 48)
for name, enabled in (("Standard PyTorch", False), ("Batch-Invariant Mode", True)):
    print(f"{name}:")
    with set_batch_invariant_mode(enabled):
        b = a.t()
        print("Batch Deterministic:", enabled and torch.equal(torch.mm(a[:1], b), torch.mm(a, b)[:1]))
"""


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "suites.py"), *map(str, args), "--release", "here"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | environment)


def test_flash_attentions_tests_call_bi_ops(tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "padding.py").write_text("def half(n):\n    return n // 2\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_flash_attn.py").write_text(FLASH)
    done = run("flash-attention", tmp_path / "tests" / "test_flash_attn.py", "--out", tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    found = json.loads((tmp_path / "suites.json").read_text())["flash-attention"]
    assert (found["passed"], found["not on bi_ops"], found["failed"]) == (1, 1, 1), done.stdout[-2000:]
    assert list(found["failures"]) == ["test_flash_attn.py::test_that_fails"]
    assert found["release"] == "here"


VLLM = """
import pytest
import torch
from utils import ROWS
from vllm import _custom_ops
from vllm.model_executor.layers.batch_invariant import log_softmax, rms_norm_batch_invariant
from vllm.model_executor.layers.layernorm import theirs
from bi_ops.core import runtime

x = torch.randn(ROWS, 32, device=runtime.default_device())

def test_norms(default_vllm_config):
    assert theirs is None
    out, weight = torch.empty_like(x), torch.ones(32, device=x.device)
    _custom_ops.rms_norm(out, x, weight, 1e-6)
    assert torch.equal(out, rms_norm_batch_invariant(x, weight, eps=1e-6))
    _custom_ops.fused_add_rms_norm(a := x.clone(), b := x.clone(), weight, 1e-6)
    assert torch.equal(b, x + x)

def test_log_softmax():
    assert log_softmax(x, dim=-1).exp().sum(-1).allclose(torch.ones(ROWS, device=x.device))
    with pytest.raises(NotImplementedError):
        log_softmax(x, dim=0)
"""


UTILS = """
import os
import vllm.config  # as theirs, which fails unless vllm.config came first
ROWS = 3
BACKENDS = ["FLASH_ATTN", "TRITON_ATTN"]
TEST_MODEL = os.environ.get("VLLM_TEST_MODEL", "none")
"""

ENGINES = """
import time
import pytest
import torch
from utils import BACKENDS, TEST_MODEL
from vllm import LLM
from bi_ops.core import runtime

x = torch.ones(2, 32, dtype=torch.bfloat16, device=runtime.default_device())

@pytest.mark.parametrize("backend", BACKENDS)
def test_engine(backend):
    llm = LLM(TEST_MODEL, gpu_memory_utilization=0.9)
    assert llm.memory == 0.1
    llm.compute(x)

@pytest.mark.parametrize("backend", ["FLASH_ATTN"])
def test_decode(backend):
    LLM(TEST_MODEL).compute(x)

def test_that_calls_nothing():
    LLM(TEST_MODEL)

def test_that_hangs():
    time.sleep(600)

def test_that_ends_its_process():
    import os
    os._exit(3)

def test_logprobs_without_batch_invariance_should_fail():
    assert False
"""

LLM = """
from bi_ops import matmul

class LLM:
    def __init__(self, model, gpu_memory_utilization=0.9, kv_cache_memory_bytes=None):
        assert (__import__("pathlib").Path(model) / "tokenizer.json").exists()
        self.memory = gpu_memory_utilization

    def compute(self, x):
        return matmul.inference_linear(x, x)
"""


@pytest.fixture
def vllm(tmp_path) -> Path:
    """A package that has the names alone stands in for vLLM; the folder of its tests."""
    layers = tmp_path / "vllm" / "model_executor" / "layers"
    layers.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(LLM)
    (tmp_path / "vllm" / "_custom_ops.py").write_text("")
    (tmp_path / "vllm" / "config.py").write_text(
        "import contextlib\nVllmConfig = object\nset_current_vllm_config = contextlib.nullcontext\n"
    )
    (layers / "batch_invariant.py").write_text("rms_norm_batch_invariant = log_softmax = None\n")
    (layers / "layernorm.py").write_text("from .batch_invariant import rms_norm_batch_invariant as theirs\n")
    (tmp_path / "vllm-0.26.0.dist-info").mkdir()
    (tmp_path / "vllm-0.26.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    tests = tmp_path / "determinism"
    tests.mkdir()
    (tests / "utils.py").write_text(UTILS)
    (tests / "test_rms_norm_batch_invariant.py").write_text(VLLM)
    (tests / "test_nvfp4_batch_invariant.py").write_text("assert False\n")
    return tests


@pytest.mark.slow
def test_vllms_tests_of_operators_call_bi_ops(vllm, tmp_path):
    done = run("vllm", vllm, "--out", tmp_path, PYTHONPATH=f"{BENCH.parent}:{tmp_path}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "suites.json").read_text())["vllm here"]
    assert (found["passed"], found["skipped"]) == (2, 1)
    assert found["reasons"] == {"test_nvfp4_batch_invariant.py": "NVFP4, which needs sm_100"}


@pytest.mark.slow
def test_each_of_vllms_engines_has_a_process_and_a_time(vllm, tmp_path):
    pytest.importorskip("transformers")
    (vllm / "test_rms_norm_batch_invariant.py").unlink()
    (vllm / "test_batch_invariance.py").write_text(ENGINES)
    path = f"{BENCH.parent}:{tmp_path}"
    options = ("--out", tmp_path, "--work", tmp_path / "work", "--jobs", 2, "--timeout", 60)
    done = run("vllm", vllm, *options, PYTHONPATH=path)
    assert done.returncode == 1
    found = json.loads((tmp_path / "suites.json").read_text())["vllm here"]
    of = {name.partition("::")[2]: next(iter(counts)) for name, counts in found["tests"].items()}
    assert of == {
        "": "skipped",
        "test_engine[CUSTOM]": "passed",
        "test_engine[FLASH_ATTN]": "passed",
        "test_engine[TRITON_ATTN]": "skipped",
        "test_decode[CUSTOM]": "passed",
        "test_decode[FLASH_ATTN]": "passed",
        "test_that_calls_nothing": "not on bi_ops",
        "test_that_hangs": "failed",
        "test_that_ends_its_process": "failed",
        "test_logprobs_without_batch_invariance_should_fail": "skipped",
    }, done.stdout[-2000:] + done.stderr[-2000:]
    file = "test_batch_invariance.py::"
    assert found["failures"][f"{file}test_that_hangs"].startswith("not done after 60 s")
    assert "ended with 3" in found["failures"][f"{file}test_that_ends_its_process"]
    assert "TRITON_ATTN" in found["reasons"][f"{file}test_engine[TRITON_ATTN]"]
    assert found["seconds"][f"{file}test_engine[CUSTOM]"] > 0
    # Another run of some adds to what is there, and time that is over leaves tests not run.
    again = run("vllm", vllm, *options, "-k", "calls_nothing or decode", "--limit", 5, PYTHONPATH=path)
    assert again.returncode == 1
    now = json.loads((tmp_path / "suites.json").read_text())["vllm here"]
    assert {**now, "date": ""} == {**found, "date": ""}


@pytest.mark.slow
def test_a_script_runs_under_the_mode(tmp_path):
    (tmp_path / "test_batch_invariance.py").write_text(MODE)
    done = run("batch_invariant_ops", tmp_path / "test_batch_invariance.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "suites.json").read_text())["batch_invariant_ops"]
    assert found["passed"] == 1


def test_processes_share_the_tests_by_the_kernels_that_these_compile():
    def test(d, seqlen, causal):
        return types.SimpleNamespace(
            callspec=types.SimpleNamespace(params={"d": d, "seqlen_q": seqlen, "causal": causal})
        )

    items: list[Any] = [test(*p) for p in itertools.product((32, 64, 128), (1, 3, 127), (False, True))]
    shards: list[list[Any]] = [list(suites_worker.shard_of(items, i, 4)) for i in range(4)]
    assert sorted(map(id, itertools.chain(*shards))) == sorted(map(id, items))
    kernels = [[(i.callspec.params["d"], i.callspec.params["causal"]) for i in shard] for shard in shards]
    assert [len(dict.fromkeys(each)) for each in kernels] == [2, 2, 1, 1]
    assert sum(len(set(each)) for each in kernels) == 6  # no kernel in two processes
    assert kernels[0] == [(128, False)] * 3 + [(32, False)] * 3


def test_a_checkout_that_is_not_there_is_named(tmp_path):
    done = run("vllm", tmp_path / "nothing", "--out", tmp_path)
    assert done.returncode == 2
    assert "check out the repository of vllm" in done.stderr
