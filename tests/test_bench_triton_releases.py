"""bench/triton_releases.py: which figure counts, and what is refused."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import triton_releases


def folder_of(path: Path) -> Path:
    (path / "triton").mkdir(parents=True)
    return path


def started(monkeypatch, release: Path, out: Path, names: dict[Path | None, str]) -> int:
    installed, other = [{"a": 4.0, "b": 8.0}, {"a": 5.0, "b": 6.0}], [{"a": 2.0, "b": 9.0}, {"a": 3.0, "b": 8.0}]
    figures = {None: installed, release: other}
    monkeypatch.setattr(triton_releases, "run", lambda folder, budget: (names[folder], figures[folder].pop(0)))
    command = ["triton_releases.py", "--releases", str(release), "--out", str(out), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", command)
    return triton_releases.main()


def test_the_better_run_counts_beside_the_installed_release(monkeypatch, tmp_path):
    release = folder_of(tmp_path / "other")
    assert started(monkeypatch, release, tmp_path / "out", {None: "3.6.0", release: "3.9.0"}) == 0
    with (tmp_path / "out" / "triton_releases.csv").open() as file:
        rows = {(r["triton"], r["cell"]): r for r in csv.DictReader(file)}
    assert {key: (r["us"], r["us_installed"], r["ratio"]) for key, r in rows.items()} == {
        ("3.6.0", "a"): ("4.0", "4.0", "1.0"),
        ("3.6.0", "b"): ("6.0", "6.0", "1.0"),
        ("3.9.0", "a"): ("2.0", "4.0", "2.0"),
        ("3.9.0", "b"): ("8.0", "6.0", "0.75"),
    }


def test_a_folder_without_another_release_is_refused(monkeypatch, tmp_path, capsys):
    same = folder_of(tmp_path / "same")
    with pytest.raises(SystemExit, match="must differ from the installed one"):
        started(monkeypatch, same, tmp_path, {None: "3.6.0", same: "3.6.0"})
    with pytest.raises(SystemExit):
        started(monkeypatch, tmp_path / "none", tmp_path, {})
    assert "has no triton: pip install --no-deps --target" in capsys.readouterr().err
