"""`bench/every.py`: what runs beside what, and what is left for a later call."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def every(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("record", "table_parts", "every"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("every")


def with_imports(path: Path) -> str:
    """A benchmark's source, and those of its neighbours that it imports."""
    text = path.read_text()
    names = re.findall(r"^from (\w+) import", text, re.MULTILINE)
    return text + "".join(other.read_text() for n in names if (other := path.with_name(f"{n}.py")).exists())


def test_every_job_is_a_benchmark_that_takes_what_it_is_given(every):
    assert len({job.name for job in every.JOBS}) == len(every.JOBS)
    for job in every.JOBS:
        source = with_imports(BENCH / job.command[0])
        options = [word for word in job.command if word.startswith("--")]
        for option in (*options, "--out", "--commit", *(["--seconds"] if job.limited else [])):
            assert f'"{option}"' in source, (job.name, option)


def test_jobs_that_time_something_run_alone_and_the_others_as_cores_allow(every):
    def running(job, *gpus):
        return every.Run(job, mock.Mock(), list(gpus))

    bits, more = every.Job("a", ("x.py",), 6, 1), every.Job("b", ("x.py",), 6, 1)
    timed, both = every.Job("c", ("x.py",), 2, 1, quiet=True), every.Job("d", ("x.py",), 2, 1, gpus=2, quiet=True)
    two = ["0", "1"]
    assert every.may_start(bits, [], ["0"], 4) == ["0"]  # alone, whatever it takes
    assert every.may_start(more, [running(bits, "0")], two, 12) == ["1"]
    assert every.may_start(more, [running(bits, "0")], two, 11) == []
    assert every.may_start(timed, [running(bits, "0")], two, 12) == []
    assert every.may_start(bits, [running(timed, "0")], two, 12) == []
    assert every.may_start(timed, [running(timed, "0")], two, 12) == ["1"]
    assert every.may_start(timed, [running(timed, "0")], ["0"], 12) == []
    assert every.may_start(both, [running(timed, "0")], two, 12) == []
    assert every.may_start(both, [], two, 12) == two
    assert every.may_start(both, [], ["0"], 12) == []


def test_what_has_ended_well_is_not_run_again(every, monkeypatch, tmp_path, capsys):
    for name, code in (("good", 0), ("bad", 3)):
        (tmp_path / f"{name}.py").write_text(f"import sys\nprint(sys.argv)\nsys.exit({code})\n")
    monkeypatch.setattr(every, "HERE", tmp_path)
    monkeypatch.setattr(every, "JOBS", tuple(every.Job(n, (f"{n}.py",), 1, 1) for n in ("good", "bad")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    out = tmp_path / "out"
    argv = ["every.py", "--out", str(out), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", argv)
    assert every.main() == 1
    ended = json.loads((out / "every.json").read_text())
    assert {name: e["status"] for name, e in ended.items()} == {"good": 0, "bad": 3}
    assert "--commit" in (out / "log" / "good.txt").read_text()
    capsys.readouterr()
    assert every.main() == 1
    assert "good" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv[:-1], "def", "--seconds", "0"])
    assert every.main() == 0
    assert "good: not begun; it needs 1 GPU" in capsys.readouterr().out
