"""The determinism tests of others, run on bi_ops from where you have them. Adds to suites.json after every test.

    python bench/suites.py vllm VLLM/tests/v1/determinism --out bench/results/h200 [-k "rms_norm or matmul"]
    python bench/suites.py flash-attention FLASH/tests/test_flash_attn.py --out bench/results/h200 -k deterministic
    python bench/suites.py batch_invariant_ops FOLDER/test_batch_invariance.py --out bench/results/h200

What these tests import is replaced by bi_ops: vLLM's batch-invariant kernels and its norms, the package flash_attn, the
module batch_invariant_ops (`suites_doors`). A test counts as passed only if it called bi_ops.

vLLM's tests that start an engine run with the plugin, each in a process of its own, on a checkpoint that is made here.
They name an attention backend, and bi_ops' own is put among those; a test with another's attention is skipped and says
so, as are those of kernels that bi_ops has not. Processes share the GPUs, for nothing is timed. What --limit leaves is
in the file as not run. Tests that ran before, of the same release at the same commit, stay in the file. Exit status 1
if a test failed, or none passed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine_processes import each, environment, visible_gpus
from record import offer_plugin, provenance
from suites_worker import NOT_RUN, RUNNING, Outcome
from table_parts import load

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core import runtime
from bi_ops.core.files import write_json

FILE = "suites.json"
WORKER = Path(__file__).with_name("suites_worker.py")
SUITES = ("vllm", "flash-attention", "batch_invariant_ops")

#: vLLM's files of tests: of operators that bi_ops has, and of engines.
OPERATORS = ("test_rms_norm_batch", "test_matmul_batch", "test_log_softmax", "test_softmax", "test_common_ops")
ENGINES = ("test_batch_invariance.py", "test_online_batch_invariance.py")
#: Why the other files are left out, by the beginning of their names.
ELSEWHERE = {
    "test_cutlass": "fp8 and NVFP4 kernels of CUTLASS; bi_ops has none",
    "test_nvfp4": "NVFP4, which needs sm_100",
    "test_mx": "MX formats, on ROCm",
    "test_xpu": "Intel XPU",
    "test_lora": "LoRA, which the plugin refuses",
    "test_batch_invariance_vlm": "a vision model's checkpoint",
}
LEAST_S = 20  # a process that has less time left is not started

#: The checkpoint for engines: decoder layers of Qwen3-1.7B's shapes.
MODEL = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
TINY = MODEL | {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512},
}


def write_checkpoint(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Random weights, and a tokenizer of a token per byte.

    The likeliest token is a letter or a digit, so that text gives its tokens back, for vLLM's tests of 0.26 go through
    text. Every other id has the logit 0 and a name.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<|endoftext|>"]
    names += [f"<unused_{i}>" for i in range(len(names), sizes["vocab_size"])]
    letters = torch.tensor([i for i, c in enumerate(alphabet) if c.isascii() and c.isalnum()])
    network = Qwen3ForCausalLM(Qwen3Config(**sizes), torch.bfloat16)
    network.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that forgets its weight
                p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p.device, p.dtype))
        network.model.norm.weight.mul_(4)  # logits whose softmax is not flat
        head = network.lm_head.weight
        kept = head[letters.to(head.device)].clone()
        head.zero_()
        head[letters.to(head.device)] = kept
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------------
# what came of the tests


def release(suite: str, path: Path) -> str:
    """vLLM's tests go with the release that is installed; else the commit of the checkout that holds `path`."""
    if suite == "vllm":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version("vllm")
    command = ["git", "-C", str(path if path.is_dir() else path.parent), "describe", "--always", "--tags"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def summary(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """tests: how many of each outcome, by function, or by test where it starts an engine. failures and reasons: what
    failed, or why it was skipped, first of each. seconds: of tests that start an engine."""
    found: dict[str, dict[str, Any]] = {"failures": {}, "reasons": {}, "seconds": {}, "tests": {}}
    for name, (outcome, message, seconds) in outcomes.items():
        engine = name.startswith(ENGINES)
        key = name if engine else name.partition("[")[0]
        counts = found["tests"].setdefault(key, {})
        counts[outcome] = counts.get(outcome, 0) + 1
        if message and outcome != "passed":
            found["failures" if outcome == "failed" else "reasons"].setdefault(key, message)
        if engine and seconds:
            found["seconds"][name] = seconds
    return found


def totals(tests: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    kinds = sorted({kind for counts in tests.values() for kind in counts})
    return {kind: sum(counts.get(kind, 0) for counts in tests.values()) for kind in kinds}


class Record:
    """What is known of a suite, and its place in suites.json, of which other processes may write other suites."""

    def __init__(self, out: Path, key: str, head: dict[str, Any]) -> None:
        self._out, self._key, self._head = out, key, head
        self._lock, self._last = threading.Lock(), 0.0
        earlier = (load(out, FILE) or {}).get(key, {})
        same = all(earlier.get(name) == head[name] for name in ("device", "versions", "commit", "release"))
        self._earlier = earlier if same else {}
        self.outcomes: dict[str, Outcome] = {}

    def add(self, outcomes: Mapping[str, Outcome], now: bool = True) -> None:
        with self._lock:
            self.outcomes.update(outcomes)
            if now or time.monotonic() > self._last + 1:
                self._write()
                self._last = time.monotonic()

    def _write(self) -> None:
        found = {part: {**self._earlier.get(part, {})} for part in ("failures", "reasons", "seconds", "tests")}
        for part, new in summary(self.outcomes).items():
            for key in summary(self.outcomes)["tests"]:
                found[part].pop(key, None)
            found[part] |= new
        with open(self._out / f".{FILE}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            whole = load(self._out, FILE) or {}
            write_json(self._out / FILE, {**whole, self._key: {**self._head, **totals(found["tests"]), **found}})


# --------------------------------------------------------------------------------------------------------------
# running them


@dataclasses.dataclass(frozen=True)
class Job:
    """A process of suites_worker.py. doors: its suite. arguments: its tests and options. test: the only one, if one."""

    name: str
    doors: str
    arguments: tuple[str, ...]
    test: str = ""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Runner:
    """Runs jobs; one of a single test may take `timeout` seconds, all may until `limit` seconds from now."""

    def __init__(self, record: Record, work: Path, timeout: float, limit: float) -> None:
        self.record, self.work, self.timeout = record, work, timeout
        self.end = time.monotonic() + limit
        self.plugin = offer_plugin(work / "plugin")

    def run(self, job: Job, gpu: str, listing: bool = False) -> dict[str, Outcome]:
        """The outcomes of a job's tests, which the record has; with `listing` the names of its tests, not run."""
        left = self.end - time.monotonic()
        patience = min(self.timeout, left) if job.test else left
        if patience < LEAST_S:
            return {}
        safe = "".join(c if c.isalnum() else "_" for c in job.name)[:120]
        result, log = self.work / f"{safe}.json", self.work / f"{safe}.log"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(WORKER), job.doors, *job.arguments, f"--result={result}"]
        env = environment({"CUDA_VISIBLE_DEVICES": gpu, **job.env}, job.doors == "vllm engines", self.plugin)
        began, stopped = time.monotonic(), ""
        with log.open("w") as file:
            whole = [*command, *(["--list"] if listing else [])]
            process = subprocess.Popen(whole, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    if not listing:
                        self.record.add(read(result), now=False)
                    if time.monotonic() - began > patience and not stopped:
                        stopped = f"not done after {patience:.0f} s"
                        end(process)
            finally:
                end(process)
        found = read(result)
        seconds = round(time.monotonic() - began, 3)
        why = stopped or f"its process ended with {process.returncode}: {last_line(log)}"
        if not result.exists():  # it died before it had collected its tests
            found = {job.test or job.name: Outcome(RUNNING)}
        for name, (outcome, message, _) in found.items():
            if job.test and outcome != "skipped":  # its time with the start of its process
                over = outcome != "passed" if stopped else outcome in (RUNNING, NOT_RUN)
                found[name] = Outcome("failed", why, seconds) if over else Outcome(outcome, message, seconds)
            elif outcome == RUNNING:
                found[name] = Outcome(NOT_RUN if stopped else "failed", why)
        if not listing:
            self.record.add(found)
            if job.test:
                print(f"{job.test}: {' '.join(map(str, found[job.test]))}"[:300], flush=True)
        return found


def read(result: Path) -> dict[str, Outcome]:
    if not result.exists():
        return {}
    return {name: Outcome(*outcome) for name, outcome in json.loads(result.read_text()).items()}


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if "Error" in line] or lines or ["no output"])[-1].strip()[-250:]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: it is asked first, so that it shuts an engine down, then killed."""
    for how, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if how == signal.SIGTERM and process.poll() is not None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run_vllm(runner: Runner, path: Path, keyword: str, jobs: int) -> None:
    files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    operators = [f for f in files if f.name.startswith(OPERATORS)]
    engines = [f for f in files if f.name in ENGINES]
    for file in files if not keyword else []:
        if file not in (*operators, *engines):
            reason = next(
                (r for b, r in ELSEWHERE.items() if file.name.startswith(b)), "neither bi_ops' nor an engine's"
            )
            runner.record.add({file.name: Outcome("skipped", reason)})
    given = ("-k", keyword) if keyword else ()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = Job("operators", "vllm", (*map(str, operators), *given))
        beside = [pool.submit(runner.run, job, visible_gpus()[-1])] if operators else []
        if engines:
            run_engines(runner, engines, given, jobs)
        for future in beside:
            future.result()


def run_engines(runner: Runner, files: list[Path], given: tuple[str, ...], jobs: int) -> None:
    checkpoint = runner.work / "checkpoint"
    if not (checkpoint / "tokenizer_config.json").exists():
        write_checkpoint(checkpoint, TINY if runtime.INTERPRET else MODEL)
    env = {"VLLM_TEST_MODEL": str(checkpoint), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    listed = Job("engines", "vllm engines", (*map(str, files), *given), env=env)
    found = runner.run(listed, visible_gpus()[0], listing=True)
    runner.record.add(found)
    folders = {f.name: f for f in files}
    each_job = {
        name: Job(
            name, "vllm engines", (str(folders[name.partition("::")[0]]) + "::" + name.partition("::")[2],), name, env
        )
        for name, (outcome, _, _) in found.items()
        if outcome == NOT_RUN
    }
    each(in_order(each_job), lambda name, gpu: void(runner.run(each_job[name], gpu)), jobs, "engines")


def in_order(names: Iterable[str]) -> list[str]:
    """bi_ops' own attention first, and of tests that differ in a parameter which it has not, the others last."""
    names = list(names)
    return sorted(names, key=lambda n: ("CUSTOM" not in n, "8-16" in n, "vllm_c" in n, names.index(n)))


def void(_: object) -> None:
    """For functions of which nothing is wanted."""


def run_shards(runner: Runner, path: Path, keyword: str, jobs: int) -> None:
    given = ("-k", keyword) if keyword else ()
    shards = {
        f"shard {i}": Job(f"shard {i}", "flash-attention", (str(path), *given, f"--shard={i}/{jobs}"))
        for i in range(jobs)
    }
    each(shards, lambda name, gpu: void(runner.run(shards[name], gpu)), jobs, "flash-attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("path", type=Path, help="a file or folder of tests, in a checkout of theirs")
    parser.add_argument("--out", type=Path, required=True, help="folder that suites.json is in")
    parser.add_argument("-k", default="", dest="keyword", help="as pytest's")
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time on all GPUs together (6)")
    parser.add_argument("--timeout", type=float, default=200, help="seconds for a test that starts an engine (200)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for all (1800)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoint and the logs; kept")
    parser.add_argument("--release", help="of their checkout, where it is no git repository")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if not args.path.exists():
        parser.error(f"{args.path} does not exist: check out the repository of {args.suite}")
    args.out.mkdir(parents=True, exist_ok=True)
    theirs = args.release or release(args.suite, args.path)
    key = f"vllm {theirs}" if args.suite == "vllm" else args.suite
    work = args.work or Path(tempfile.gettempdir()) / f"bi_ops_suites_{key.replace(' ', '_')}"
    work.mkdir(parents=True, exist_ok=True)
    record = Record(args.out, key, {**provenance(args.commit), "release": theirs})
    path = args.path.resolve()
    if args.suite == "vllm":
        run_vllm(Runner(record, work, args.timeout, args.limit), path, args.keyword, args.jobs)
    else:
        runner = Runner(record, work, args.limit, args.limit)
        if args.suite == "flash-attention":
            run_shards(runner, path, args.keyword, args.jobs)
        else:
            runner.run(Job(path.name, "batch_invariant_ops", (str(path),)), visible_gpus()[0])
    found = totals(summary(record.outcomes)["tests"])
    print(f"{key}: {found}; logs in {work}")
    for name, why in summary(record.outcomes)["failures"].items():
        print(f"failed: {name}: {why}")
    return 0 if found.get("passed") and "failed" not in found else 1


if __name__ == "__main__":
    sys.exit(main())
