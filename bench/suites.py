"""The determinism tests of others, run on bi_ops' operators from where you have them. Adds to suites.json.

    python bench/suites.py vllm VLLM/tests/v1/determinism --out bench/results/h200 [-k "rms_norm or matmul"]
    python bench/suites.py flash-attention FLASH/tests/test_flash_attn.py --out bench/results/h200 -k deterministic
    python bench/suites.py batch_invariant_ops FOLDER/test_batch_invariance.py --out bench/results/h200

What these tests import is replaced by bi_ops: vLLM's batch-invariant kernels and its norms, the package flash_attn, the
module batch_invariant_ops. A test counts as passed only if it called bi_ops. Of vLLM's, those that start an engine need
checkpoints and are left out, unless -k names them. Exit status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from record import provenance
from table_parts import load

import bi_ops  # isort: skip  (before triton)
import torch

from bi_ops import attention, logprob, matmul, norm
from bi_ops.core.files import write_json

Tensor = torch.Tensor
FILE = "suites.json"

#: Files of vLLM's that test operators which bi_ops has.
OPERATORS = ("test_rms_norm_batch", "test_matmul_batch", "test_log_softmax", "test_softmax", "test_common_ops")

calls = [0]


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    return call


# --------------------------------------------------------------------------------------------------------------
# doors: bi_ops behind the names that the tests import


def _last(x: Tensor, dim: int) -> None:
    if dim not in (-1, x.ndim - 1):
        raise NotImplementedError(f"bi_ops' softmax is over the last dimension, not {dim} of {list(x.shape)}")


def _log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    _last(x, dim)
    return logprob.log_softmax(x)


def _softmax(x: Tensor, dim: int = -1, *_: Any) -> Tensor:
    _last(x, dim)
    return logprob.softmax(x)


def _rms_norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    out.copy_(norm.rms_norm(x, weight, eps))


def _add_rms_norm_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    for t, new in zip((x, residual), norm.add_rms_norm(x, residual, weight, eps), strict=True):
        t.copy_(new)


def vllm_doors(tests: Path) -> None:
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    sys.path.insert(0, str(tests if tests.is_dir() else tests.parent))  # they import the `utils` beside them
    from vllm import _custom_ops

    from bi_ops.core.vllm import batch_invariant_module

    module = batch_invariant_module()
    doors: dict[str, Callable[..., Any]] = {
        "rms_norm_batch_invariant": norm.rms_norm,
        "matmul_batch_invariant": matmul.matmul,
        "mm_batch_invariant": matmul.mm,
        "linear_batch_invariant": matmul.linear,
        "log_softmax": _log_softmax,
        "softmax": _softmax,
        "softmax_batch_invariant": _softmax,
    }
    for name, function in doors.items():
        if hasattr(module, name):
            setattr(module, name, counted(function))
    _custom_ops.rms_norm = counted(_rms_norm_into)
    _custom_ops.fused_add_rms_norm = counted(_add_rms_norm_in_place)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_: Any, **options: Any
):
    """flash_attn_varlen_func, without dropout and ALiBi; every backward is deterministic."""
    window = tuple(int(n) for n in options.get("window_size", (-1, -1)))
    left, right = (window[0], window[1])
    return attention.flash_attention(
        *(q, k, v, cu_q),
        cu_seqlens_k=cu_k,
        max_seqlen=max_q,
        max_seqlen_k=max_k,
        causal=options.get("causal", False),
        softmax_scale=options.get("softmax_scale"),
        window_size=(left, right),
        softcap=options.get("softcap", 0.0),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
    """flash_attn_func: [B, S, H, D]."""
    starts = [torch.arange(len(t) + 1, dtype=torch.int32, device=t.device) * t.shape[1] for t in (q, k)]
    packed = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    out = _varlen(packed[0], packed[1], packed[2], starts[0], starts[1], q.shape[1], k.shape[1], **options)
    return out.view(*q.shape[:3], v.shape[3])


def _refused(*_: Any, **__: Any) -> None:
    raise NotImplementedError("bi_ops has no such door")


def flash_attention_doors(tests: Path) -> None:
    """The package, with what is plain Python of it from the folder beside the tests."""
    names = ["", *("kvpacked_", "qkvpacked_", "varlen_", "varlen_kvpacked_", "varlen_qkvpacked_")]
    functions: dict[str, Callable[..., Any]] = {f"flash_attn_{n}func": _refused for n in names}
    functions |= {"flash_attn_func": counted(_dense), "flash_attn_varlen_func": counted(_varlen)}
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__path__ = [str(parent / "flash_attn") for parent in tests.resolve().parents]
    for name, function in {**functions, "flash_attn_with_kvcache": _refused, "_get_block_size_n": _refused}.items():
        setattr(package, name, function)
        setattr(interface, name, function)
    interface.USE_TRITON_ROCM = False  # type: ignore[attr-defined]
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def batch_invariant_ops_doors(_: Path) -> None:
    @contextlib.contextmanager
    def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
        calls[0] += enabled
        with bi_ops.batch_invariant_backward_mode() if enabled else contextlib.nullcontext():
            yield

    module = ModuleType("batch_invariant_ops")
    module.set_batch_invariant_mode = set_batch_invariant_mode  # type: ignore[attr-defined]
    sys.modules["batch_invariant_ops"] = module


DOORS = {
    "vllm": vllm_doors,
    "flash-attention": flash_attention_doors,
    "batch_invariant_ops": batch_invariant_ops_doors,
}


# --------------------------------------------------------------------------------------------------------------
# running them


class Recorder:
    """A pytest plugin that keeps each test's outcome, and whether it called bi_ops."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}
        self._before = 0

    def pytest_runtest_setup(self) -> None:
        self._before = calls[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome: str = report.outcome
            if outcome == "passed" and calls[0] == self._before:
                outcome = "not on bi_ops"
            message = "" if report.passed else str(report.longrepr).strip().splitlines()[-1][:200]
            self.outcomes[report.nodeid.rsplit("/", 1)[-1]] = (outcome, message)


class VllmConfig:
    """The one fixture that vLLM's operator tests need of its conftest, which imports far more than operators."""

    @pytest.fixture
    def default_vllm_config(self) -> Iterator[None]:
        config = importlib.import_module("vllm.config")
        with config.set_current_vllm_config(config.VllmConfig()):
            yield


def run_pytest(paths: list[str], keyword: str, *options: str) -> Mapping[str, tuple[str, str]]:
    recorder = Recorder()
    options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", *options, *(["-k", keyword] if keyword else []))
    pytest.main([*paths, *options], plugins=[recorder, VllmConfig()])
    return recorder.outcomes


def run_script(path: Path) -> Mapping[str, tuple[str, str]]:
    """A script that prints a line with True or False for each check; those under the mode, which come last, count."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(path), run_name="__main__")
    print(out.getvalue())
    lines = [line for line in out.getvalue().partition("Batch-Invariant Mode")[2].splitlines() if "istic" in line]
    return {
        f"{path.name} {i}": ("passed" if "True" in line and calls[0] else "failed", line[:200])
        for i, line in enumerate(lines)
    }


def release(path: Path) -> str:
    """The commit of the checkout that holds `path`."""
    command = ["git", "-C", str(path if path.is_dir() else path.parent), "describe", "--always", "--tags"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def summary(outcomes: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """How many of each outcome, in all and by function; what failed first in each."""
    by_test: dict[str, dict[str, int]] = {}
    failures: dict[str, str] = {}
    for name, (outcome, message) in outcomes.items():
        function = name.partition("[")[0]
        counts = by_test.setdefault(function, {})
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome == "failed":
            failures.setdefault(function, message)
    kinds = [o for o, _ in outcomes.values()]
    return {**{k: kinds.count(k) for k in sorted(set(kinds))}, "failures": failures, "tests": by_test}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(DOORS))
    parser.add_argument("path", type=Path, help="a file or folder of tests, in a checkout of theirs")
    parser.add_argument("--out", type=Path, required=True, help="folder that suites.json is in")
    parser.add_argument("-k", default="", dest="keyword", help="as pytest's")
    parser.add_argument("--release", help="of their checkout, where it is no git repository")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if not args.path.exists():
        parser.error(f"{args.path} does not exist: check out the repository of {args.suite}")
    args.out.mkdir(parents=True, exist_ok=True)
    calls[0] = 0
    DOORS[args.suite](args.path)
    importlib.invalidate_caches()
    if args.suite == "batch_invariant_ops":
        outcomes = run_script(args.path)
    else:
        some = [str(args.path)]
        if args.suite == "vllm" and args.path.is_dir() and not args.keyword:
            some = sorted(str(p) for p in itertools.chain(*(args.path.glob(f"{n}*.py") for n in OPERATORS)))
        outcomes = run_pytest(some, args.keyword, *(["--noconftest"] if args.suite == "vllm" else []))
    found = {**provenance(args.commit), "release": args.release or release(args.path), **summary(outcomes)}
    write_json(args.out / FILE, {**(load(args.out, FILE) or {}), args.suite: found})
    print({k: v for k, v in found.items() if k != "tests"})
    return 0 if outcomes and "failed" not in found else 1


if __name__ == "__main__":
    sys.exit(main())
