"""A rank that ends takes the others with it, by name; its remains are never read, and any layout goes on from there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
from test_fsdp import RUN, alone, goes_on, layout, saved  # noqa: F401 (a fixture)
from test_parallel import metrics

from bi_ops import parallel, rl
from bi_ops.core import runtime, tensor_files
from bi_ops.parallel import watch
from bi_ops.parallel.shards import ShardTree
from bi_ops.rl import checkpoint

#: Seconds in which the others must have ended. Over gloo they see it at once; the rest is a busy machine.
SECONDS = 30.0
#: Steps that are done, and saved, when a rank ends.
DONE = 2


def kill() -> None:
    """This process, as the kernel does it that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def replaced(module: Any, name: str, call: int, by: Callable[..., Any]) -> Iterator[None]:
    """The function `name`, whose `call`-th call, counted from 1, is that of `by`."""
    real, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return by(real, *args, **kwargs) if len(calls) == call else real(*args, **kwargs)

    with mock.patch.object(module, name, counted):
        yield


@contextmanager
def in_a_backward() -> Iterator[None]:
    """Between two gradients of the step behind `DONE`: two steps of two atoms of a rank, two layers and all else."""
    with replaced(ShardTree, "add", DONE * 2 * 3 + 2, lambda real, *args: kill()):
        yield


def half_written(real: Any, path: Path, tensors: Any, names: list[str]) -> None:
    real(path, tensors, list(names)[: len(names) // 2])
    kill()


def in_a_checkpoint() -> Any:
    """Among the rows of the optimizer's states."""
    return replaced(tensor_files, "write", 2 * DONE + 2, half_written)


def before_its_name() -> Any:
    """All rows are written, and the checkpoint has its name not yet."""
    return replaced(checkpoint, "write_json", DONE + 1, lambda real, *args: kill())


def no_space(real: Any, *args: Any) -> None:
    raise OSError("no space left on device")


def without_space() -> Any:
    return replaced(tensor_files, "write", 2 * DONE + 1, no_space)


def stops(folder: str, victim: int, fault: Callable[[], Any]) -> dict[str, Any]:
    """A run in which rank `victim` meets its fault: how it ended on this rank."""
    here = parallel.Ranks.of()
    os.dup2(os.open(f"{folder}.{here.rank}", os.O_CREAT | os.O_WRONLY), 2)
    began = time.monotonic()
    with fault() if here.rank == victim else mock.patch.object(time, "monotonic", time.monotonic):
        try:
            rl.run(layout(RUN.steps, fsdp=True), folder, resume=False, ranks=here)
        except (RuntimeError, OSError) as error:
            return {"type": type(error).__name__, "said": str(error), "seconds": time.monotonic() - began}
    return {"type": None}


@pytest.mark.parametrize(
    ("victim", "fault"),
    [(1, in_a_backward), (1, in_a_checkpoint), (0, before_its_name)],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_a_killed_rank_is_named_and_the_run_goes_on_in_another_layout(alone, tmp_path, victim, fault):  # noqa: F811
    folder = tmp_path / "run"
    found, codes = ranks.start(2, stops, str(folder), victim, fault)
    assert codes[victim] == -signal.SIGKILL
    other = found[1 - victim]
    if other is None:  # ended, for its GPU waits for what the killed one would have sent
        assert not runtime.INTERPRET
        assert codes[1 - victim] == watch.EXIT_CODE
        said = (tmp_path / f"run.{1 - victim}").read_text()
    else:
        assert other["type"] == "RankLost"
        assert other["seconds"] < SECONDS
        said = other["said"]
    assert f"rank {victim} of 2 was killed, or its machine is gone; this run is over. Resume it" in said
    latest = checkpoint.latest(folder / "checkpoints")
    assert latest is not None
    assert latest.name == f"step_{DONE:06d}"
    rl.run(layout(DONE + 1), folder, resume=True)
    ranks.run(2, goes_on, str(folder), layout(RUN.steps))
    assert metrics(folder) == metrics(alone)
    assert saved(folder) == saved(alone)  # no file is left that another run has not


def test_a_rank_that_fails_tells_the_others_why(tmp_path):
    found, codes = ranks.start(2, stops, str(tmp_path / "run"), 1, without_space)
    assert codes == [0, 0]
    assert found[1]["type"] == "OSError"
    assert found[0]["type"] == "RankLost"
    assert "rank 1 of 2 failed with OSError: train: cannot write into " in found[0]["said"]
    assert "no space left on device; make room there, then --resume goes on from " in found[0]["said"]


def waits_for_ever(folder: str, victim: int) -> None:
    """The others are in a collective that does not end when a rank does, as NCCL's."""
    here = parallel.Ranks.of()
    os.dup2(os.open(f"{folder}/{here.rank}", os.O_CREAT | os.O_WRONLY), 2)
    with parallel.watched(here, grace=0.5):
        if here.rank == victim:
            kill()
        time.sleep(600)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_cannot_be_called_back_is_ended(tmp_path, victim):
    _, codes = ranks.start(3, waits_for_ever, str(tmp_path), victim)
    for rank, code in enumerate(codes):
        said = (tmp_path / str(rank)).read_text()
        if rank == victim:
            assert code == -signal.SIGKILL
        else:
            assert code == 3
            assert f"rank {rank}: parallel: rank {victim} of 3 was killed, or its machine is gone" in said


def ends_well(folder: str) -> None:
    """One rank is through before the others."""
    here = parallel.Ranks.of()
    os.dup2(os.open(f"{folder}/{here.rank}", os.O_CREAT | os.O_WRONLY), 2)
    with parallel.watched(here, grace=0.5):
        time.sleep(0.5 * here.rank)


def test_ranks_that_are_through_at_other_times_say_nothing(tmp_path):
    _, codes = ranks.start(3, ends_well, str(tmp_path))
    assert codes == [0, 0, 0]
    assert "parallel" not in "".join(p.read_text() for p in tmp_path.iterdir())
