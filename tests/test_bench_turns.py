"""bench/turns.py: processes get ready together, and each goes on when it is its turn."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
BODY = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from turns import wait_for_turn; "


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("turns")


def command(body: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", BODY + body, str(BENCH), *map(str, arguments)]


def test_processes_get_ready_together_and_go_on_one_by_one(turns, tmp_path):
    body = "print('before'); wait_for_turn(); pathlib.Path(sys.argv[2]).touch(); print('after')"
    files = [tmp_path / name for name in ("a", "b")]
    both = [turns.Turn(command(body, file)) for file in files]
    for turn in both:
        turn.wait_ready(60)
        assert turn.printed == ["before"]
    assert not any(file.exists() for file in files)
    for i, turn in enumerate(both):
        assert turn.take(60) == 0
        assert turn.printed == ["before", "after"]
        assert [file.exists() for file in files] == [True, i == 1]


def test_a_process_that_ends_before_its_turn_says_why(turns):
    turn = turns.Turn(command("sys.exit('no memory')"))
    turn.wait_ready(60)
    assert turn.take(60) == 1
    assert turn.errors == ["no memory"]


def test_a_turn_that_takes_too_long_is_ended(turns):
    turn = turns.Turn(command("wait_for_turn(); import time; time.sleep(600)"))
    turn.wait_ready(60)
    assert turn.take(0.2) is None
    assert turn._process.returncode == -signal.SIGKILL
