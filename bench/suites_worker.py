"""Some tests of one suite in a process of its own, on bi_ops: what suites.py starts. Writes the outcomes after each.

The file is {test: [outcome, message, seconds]}. A test passed only if it called bi_ops; outcomes beside pytest's are
"not on bi_ops", "not run" and, while it lasts, "running".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from suites_doors import ATTENTION, DOORS, calls

from bi_ops.core.files import write_json

NOT_RUN, RUNNING, ELSEWHERE = "not run", "running", "not on bi_ops"

#: Of vLLM's tests, what bi_ops does not compute, by the beginning of a test's name.
SKIPPED = {
    "test_rms_norm_static_fp8_quant": "fp8: bi_ops has no fp8 norm",
    "test_rms_norm_per_block_quant": "fp8: bi_ops has no fp8 norm",
    "test_online_fp8_moe": "fp8 experts of a checkpoint that is downloaded",
    "test_logprobs_without_batch_invariance": "runs vLLM without its batch-invariant mode, where bi_ops does nothing",
}

#: Parameters for which no other kernel is compiled, and head sizes in the order in which they are tested.
SAME_KERNELS = ("seqlen_q", "seqlen_k", "swap_sq_sk")
HEAD_SIZES = (128, 64, 96, 256, 32, 80, 160, 192)


class Outcome(NamedTuple):
    outcome: str
    message: str = ""
    seconds: float = 0.0


def short(nodeid: str) -> str:
    """A test's name without the folders of its file."""
    head, bracket, parameters = nodeid.partition("[")
    return head.rsplit("/", 1)[-1] + bracket + parameters


def why_skipped(name: str, params: dict[str, Any]) -> str:
    """Why a test of vLLM's is left out; empty where it runs."""
    for beginning, reason in SKIPPED.items():
        if name.startswith(beginning):
            return reason
    backend = params.get("backend")
    if backend is not None and backend not in ATTENTION:
        return f"attention is vLLM's {backend}; bi_ops' is {' and '.join(ATTENTION)}"
    return ""


def shard_of(items: list[pytest.Item], number: int, of: int) -> list[pytest.Item]:
    """Those of the tests that process `number` of so many runs: together what shares kernels, head size 128 first."""

    def group(item: pytest.Item) -> tuple[int, str]:
        params = _params(item)
        d = params.get("d")
        place = HEAD_SIZES.index(d) if d in HEAD_SIZES else len(HEAD_SIZES)
        return place, repr([(k, str(v)) for k, v in sorted(params.items()) if k not in SAME_KERNELS])

    groups = sorted({group(i) for i in items})
    mine = {g: n for n, g in enumerate(groups) if n % of == number}
    return sorted((i for i in items if group(i) in mine), key=lambda i: mine[group(i)])


def _params(item: pytest.Item) -> dict[str, Any]:
    spec = getattr(item, "callspec", None)
    return dict(spec.params) if spec is not None else {}


class Recorder:
    """A pytest plugin that keeps each test's outcome, and whether it called bi_ops."""

    def __init__(self, path: Path, suite: str, keyword: str, shard: tuple[int, int]) -> None:
        self.path, self.suite, self.keyword, self.shard = path, suite, keyword, shard
        self.outcomes: dict[str, Outcome] = {}
        self._before, self._began, self._written = 0, 0.0, 0.0
        self._ended = False

    def end(self, *_: object) -> None:
        """At SIGTERM: a test shuts down the engine or server that it started, and has no outcome."""
        self._ended = True
        raise KeyboardInterrupt

    def write(self, now: bool = True) -> None:
        if now or time.monotonic() > self._written + 1:
            write_json(self.path, self.outcomes)
            self._written = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests of FlashAttention alone run on bi_ops' own attention too."""
        if self.suite == "vllm engines":
            for marker in metafunc.definition.iter_markers("parametrize"):
                if marker.args[0] == "backend" and list(marker.args[1]) == ["FLASH_ATTN"]:
                    marker.args[1].insert(0, "CUSTOM")

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list[pytest.Item] | None:
        """Leaves out by -k before tests are made: flash-attention's file has half a million, which take a minute."""
        word, known = self.keyword.lower(), f"{collector.nodeid} {name}".lower()
        out = self.suite == "flash-attention" and word.isidentifier() and name.startswith("test") and word not in known
        return [] if out else None

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.suite.startswith("vllm"):
            for item in items:
                if reason := why_skipped(item.name, _params(item)):
                    item.add_marker(pytest.mark.skip(reason=reason))
        if self.shard[1] > 1:
            items[:] = shard_of(items, *self.shard)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[short(report.nodeid)] = Outcome("failed", _last_line(report))
            self.write()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            marker = item.get_closest_marker("skip")
            reason = marker.kwargs.get("reason", "") if marker else ""
            self.outcomes[short(item.nodeid)] = Outcome("skipped" if marker else NOT_RUN, reason)
        self.write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._before, self._began = calls[0], time.monotonic()
        self.outcomes[short(nodeid)] = Outcome(RUNNING)
        self.write(now=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._ended and report.failed:
            return
        if report.when == "call" or report.outcome != "passed":
            outcome: str = report.outcome
            if outcome == "passed" and calls[0] == self._before:
                outcome = ELSEWHERE
            message = "" if report.passed else _last_line(report)
            self.outcomes[short(report.nodeid)] = Outcome(outcome, message, round(time.monotonic() - self._began, 3))

    def pytest_runtest_logfinish(self) -> None:
        self.write(now=False)

    def pytest_sessionfinish(self) -> None:
        self.write()


def _last_line(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:300]
    lines = str(report.longrepr).strip().splitlines() or ["no message"]
    raised = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (raised or lines)[-1][:300]


class VllmFixtures:
    """What vLLM's tests need of the conftests above them, which import far more."""

    @pytest.fixture
    def default_vllm_config(self) -> Iterator[None]:
        config = importlib.import_module("vllm.config")
        with config.set_current_vllm_config(config.VllmConfig()):
            yield


def run_script(path: Path, result: Path) -> None:
    """A script that prints a line with True or False for each check; those under the mode, which come last, count."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(path), run_name="__main__")
    print(out.getvalue())
    lines = [line for line in out.getvalue().partition("Batch-Invariant Mode")[2].splitlines() if "istic" in line]
    outcomes = {
        f"{path.name} {i}": Outcome("passed" if "True" in line and calls[0] else "failed", line[:200])
        for i, line in enumerate(lines)
    }
    write_json(result, outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(DOORS))
    parser.add_argument("tests", nargs="+", help="files, or tests as FILE::NAME[PARAMETERS]")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("-k", default="", dest="keyword")
    parser.add_argument("--list", action="store_true", help="run none; the skipped ones are told")
    parser.add_argument("--shard", default="0/1", help="number/of")
    args = parser.parse_args()
    path = Path(args.tests[0].partition("::")[0])
    calls[0] = 0
    DOORS[args.suite](path)
    importlib.invalidate_caches()
    if args.suite == "batch_invariant_ops":
        run_script(path, args.result)
        return
    number, _, of = args.shard.partition("/")
    recorder = Recorder(args.result, args.suite, args.keyword, (int(number), int(of)))
    signal.signal(signal.SIGTERM, recorder.end)
    # Neither vLLM's conftests, which import all of its tests, nor the ini file of the folder that this runs in.
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={path.parent}"]
    options += ["--noconftest"] if args.suite.startswith("vllm") else []
    options += ["--collect-only"] if args.list else []
    options += ["-k", args.keyword] if args.keyword else []
    fixtures = [VllmFixtures()] if args.suite.startswith("vllm") else []
    pytest.main([*args.tests, *options], plugins=[recorder, *fixtures])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine that was not shut down would be waited for


if __name__ == "__main__":
    main()
