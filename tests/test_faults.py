"""What goes wrong from outside is one line that names the cause and the way out, and a resumed run loses no bit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rl_fakes import TABLE, TableEngine, TableModel, fresh_settings
from test_rl_trainer import stepped_model

from bi_ops import cli
from bi_ops.core import files
from bi_ops.rl import TrainConfig, checkpoint, runner
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.sleep import SleepMode
from bi_ops.rollout.vllm_engine import VllmEngine

CONFIG = TrainConfig(steps=3, symbols=4, prompts_per_step=2, group_size=2, lr=0.1, save_every=1, **TABLE)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def table():
    with fresh_settings() as settings:
        yield settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The weights of a run that nothing disturbs."""
    return runner.run(CONFIG, tmp_path_factory.mktemp("whole") / "run").weights_sha256


@contextlib.contextmanager
def full_disk():
    """A real write fails, of any byte: no file may grow. Linux says "File too large", as it says "No space left"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def partial_files(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.endswith((".partial", ".tmp"))]


# --------------------------------------------------------------------------------------------------------------
# the disk


def test_a_disk_that_is_full_from_the_start(tmp_path):
    with full_disk(), pytest.raises(OSError, match=r"train: cannot write into .*run: File too large; .*output folder"):
        runner.run(CONFIG, tmp_path / "run")
    assert runner.run(CONFIG, tmp_path / "run").steps == 3


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_disk_that_fills_up_in_a_run(step, tmp_path, whole):
    with (
        contextlib.ExitStack() as disk,
        pytest.raises(OSError, match=r"train: cannot write into .*File too large") as e,
    ):
        runner.run(CONFIG, tmp_path / "run", on_step=lambda m: m.step == step and disk.enter_context(full_disk()))
    assert f"make room there, then --resume goes on from step_00000{step}" in str(e.value)
    assert partial_files(tmp_path / "run") == []
    assert runner.run(CONFIG, tmp_path / "run", resume=True).weights_sha256 == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("at", ["tensor_files.create", "tensor_files.write", "write_json", "write_atomically"])
def test_whatever_a_disk_says_while_a_checkpoint_is_written(code, at, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:

        def refuse(*args, **options):
            raise OSError(code, os.strerror(code), "somewhere")

        patch.setattr(f"bi_ops.rl.checkpoint.{at}", refuse)
        with pytest.raises(OSError, match=f"train: cannot write into .*: {os.strerror(code)}; .*from the beginning"):
            runner.run(CONFIG, tmp_path / "run")
    assert runner.run(CONFIG, tmp_path / "run", resume=True).weights_sha256 == whole


def test_a_read_only_folder(tmp_path, capsys, monkeypatch):
    output = tmp_path / "closed" / "run"
    if os.geteuid() == 0:  # whom no permission stops

        def refuse(self, *args, **options):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
    arguments = ["--steps", "1", "--config", str(tmp_path / "c.json")]
    (tmp_path / "c.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cli.main(["train", "--output", str(output), *arguments]) == 2
    err = capsys.readouterr().err
    assert f"error: train: cannot write into {output}: Permission denied; " in err
    assert "choose another output folder" in err
    assert err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_bit_that_flipped_on_the_disk_is_found(name, where, tmp_path):
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    data = bytearray((path / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    (path / name).write_bytes(data)
    model.table.data.fill_(5.0)
    with pytest.raises(ValueError, match=f"step_000001/{name} cannot be read .*damaged; write .* earlier checkpoint"):
        checkpoint.load(path, model, optimizer)
    assert bool((model.table == 5.0).all())


def test_a_digest_sees_every_part_of_a_file(tmp_path):
    file = tmp_path / "file"
    data = bytearray(range(100))
    file.write_bytes(data)
    digests = {files.sha256_of_parts(file, part_bytes) for part_bytes in (7, 50, 1 << 20)}
    assert len(digests) == 3
    assert files.sha256_of_parts(file, 1 << 20) == hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()
    for at in range(100):
        changed = bytearray(data)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert files.sha256_of_parts(file, 7) not in digests


def test_a_checkpoint_without_digests_is_read(tmp_path):
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"seed": 1})
    state = json.loads((path / "state.json").read_text())
    assert sorted(state.pop("sha256")) == ["model.safetensors", "optimizer.safetensors"]
    (path / "state.json").write_text(json.dumps(state))
    assert checkpoint.load(path, model, optimizer) == {"step": 1, "seed": 1}


@pytest.mark.parametrize("length", [0, 1, 7, 100, -1])
def test_a_truncated_checkpoint_is_not_resumed_and_an_earlier_one_is(length, tmp_path, whole):
    runner.run(CONFIG, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    file = checkpoints / "step_000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"step_000003/model.safetensors cannot be read .*damaged"):
        runner.run(CONFIG, tmp_path / "run", resume=True)
    (checkpoints / "latest").write_text("step_000002\n")  # the way out
    assert runner.run(CONFIG, tmp_path / "run", resume=True).weights_sha256 == whole


# --------------------------------------------------------------------------------------------------------------
# memory, and the engine


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        (TableEngine, "generate", r"in sampling \(CUDA out of memory\); go on with --resume and --offload states or"),
        (TableModel, "token_logprobs", r"in training \(CUDA out of memory\); .*--max-tokens-per-microbatch, --recomp"),
        (TableEngine, "update_weights", "in training"),
    ],
)
def test_memory_that_runs_out(where, name, message, tmp_path, whole, monkeypatch):
    def after_a_step(metrics):
        patch.setattr(where, name, out_of_memory)

    with (
        monkeypatch.context() as patch,
        pytest.raises(torch.OutOfMemoryError, match=f"train: step 2 ran out of memory {message}.*change no bit"),
    ):
        runner.run(CONFIG, tmp_path / "run", on_step=after_a_step)
    smaller = dataclasses.replace(CONFIG, max_tokens_per_microbatch=16, offload="states")
    assert runner.run(smaller, tmp_path / "run", resume=True).weights_sha256 == whole


class Died(Exception):
    """As vLLM's EngineDeadError, which is no RuntimeError."""


class DyingLLM:
    def __init__(self, error: Exception) -> None:
        self.error, self.shut_down = error, 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))

    def generate(self, *args, **options):
        raise self.error

    def shutdown(self) -> None:
        self.shut_down += 1
        raise self.error


@pytest.fixture
def dying(monkeypatch):
    """An engine over an LLM that raises; vLLM itself is not needed."""
    from bi_ops.rollout import vllm_engine

    monkeypatch.setattr(vllm_engine, "vllm_params", lambda i, params: params)
    monkeypatch.setattr(vllm_engine, "forget_graph_pool", lambda: None)

    def make(error: Exception) -> tuple[Any, DyingLLM]:
        made: Any = VllmEngine.__new__(VllmEngine)
        llm = made._llm = DyingLLM(error)
        made._memory = SleepMode(llm, enabled=False)
        made._vocab_size, made.max_model_len, made.logprobs_mode = 16, 64, "raw_logprobs"
        return made, llm

    return make


@pytest.mark.parametrize("error", [Died("EngineCore encountered an issue."), RuntimeError("CUDA error")])
def test_an_engine_of_vllm_that_dies_says_so_and_is_closed(error, dying):
    engine, llm = dying(error)
    expected = rf"generate: vLLM's engine died \({type(error).__name__}: {error}\); close it .*--resume"
    with pytest.raises(RuntimeError, match=expected):
        engine.generate([[1]], SamplingParams(1))
    with pytest.raises(RuntimeError, match=f"VllmEngine: the engine died .*{error}.*make a new one"):
        engine.generate([[1]], SamplingParams(1))
    engine.close()  # raises nothing of its own
    assert llm.shut_down == 1
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([[1]], SamplingParams(1))


def test_an_engine_that_lives_says_why_it_cannot_be_closed(dying):
    engine, _ = dying(Died("in use"))
    with pytest.raises(Died, match="in use"):
        engine.close()


def test_memory_that_runs_out_inside_vllm_keeps_its_kind(dying):
    engine, _ = dying(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[1]], SamplingParams(1))


def test_a_run_whose_engine_dies_is_resumed(tmp_path, whole, capsys, monkeypatch):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG.to_dict()))
    arguments = ["train", "--output", str(tmp_path / "run"), "--config", str(tmp_path / "c.json")]
    generate = TableEngine.generate

    def die(self, prompts, params):
        if self.calls == 1:
            raise RuntimeError("generate: vLLM's engine died (Died)")
        return generate(self, prompts, params)

    with monkeypatch.context() as patch:
        patch.setattr(TableEngine, "generate", die)
        assert cli.main(arguments) == 3
    assert "bi-ops train: error: generate: vLLM's engine died (Died)\n" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert whole in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------
# two runs in one folder

HOLD = """
import sys
from pathlib import Path
from bi_ops.core.files import locked
with locked("train", Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(folder: Path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{HOLD}", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_in_a_folder_is_refused_and_a_kill_lets_go_of_it(tmp_path, whole):
    runner.run(dataclasses.replace(CONFIG, steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with another_process(tmp_path / "run") as process:
        message = rf"train: .*run is in use by another run \(process {process.pid}\); let it end, or choose another"
        with pytest.raises(FileExistsError, match=message):
            runner.run(CONFIG, tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "config.json").read_bytes() == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert runner.run(CONFIG, tmp_path / "run", resume=True).weights_sha256 == whole


def test_a_run_holds_its_folder_from_its_start_to_its_end(tmp_path):
    refused = []

    def again(metrics):
        for resume in (False, True):
            with pytest.raises(FileExistsError) as error:
                runner.run(CONFIG, tmp_path / "run", resume=resume)
            refused.append(str(error.value))

    runner.run(dataclasses.replace(CONFIG, steps=1), tmp_path / "run", on_step=again)
    assert "already holds another run" in refused[0]
    assert "is in use by another run" in refused[1]
    assert runner.run(CONFIG, tmp_path / "run", resume=True).steps == 3


def test_two_runs_that_start_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    with (
        another_process(tmp_path / "run"),
        pytest.raises(FileExistsError, match="is in use by another run"),
    ):
        runner.run(CONFIG, tmp_path / "run")
    assert runner.run(CONFIG, tmp_path / "run").steps == 3


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .*let no other run use it"), files.locked("t", tmp_path):
        pass
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with files.locked("t", tmp_path):
            pass
