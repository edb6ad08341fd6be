"""The examples run as a stranger runs them, and print what their docstrings promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bi_ops.models.qwen3 import Qwen3Config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    """What the example prints, in a process of its own: it has to import things in the right order itself."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    names = [p.stem for p in EXAMPLES.glob("*.py")]
    assert len(names) >= 5
    assert [n for n in names if f'run("{n}"' not in source] == []


def test_mode():
    out = run("mode")
    assert int(re.search(r"without the mode +(\d+) of 16 rows", out)[1]) > 0  # torch's own rows do depend on the batch
    assert "with the mode     0 of 16 rows" in out
    assert "gradients         6 of 6" in out


def test_transformers_layers():
    pytest.importorskip("transformers")
    out = run("transformers_layers")
    assert int(re.search(r"transformers +(\d+) of 1280 logits", out)[1]) > 0
    assert "with bi_ops   0 of 1280 logits" in out


def test_parity():
    lines = run("parity").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["alone", "together", "shuffled"]
    assert all("bitwise identical: 20 tokens checked, 0 different" in line for line in lines[:4])
    assert lines[4].startswith("control       20 of 20 differ")


def test_grpo_task(tmp_path):
    lines = run("grpo_task", "--steps", "2", "--save", str(tmp_path / "trained")).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2"]
    assert all(line.endswith("16 log-probabilities compared, 0 different") for line in lines)
    assert Qwen3Config.from_pretrained(tmp_path / "trained").num_hidden_layers == 1


def test_verify_operator():
    lines = run("verify_operator").splitlines()
    assert all(line.endswith(" []") for line in lines[:3])
    assert all(line.endswith(" ok") for line in lines[3:5])
    assert re.fullmatch(r"sum_rows_by_occupancy +changes at row counts \[1, 3, 15\]", lines[5])


@pytest.mark.parametrize("name", ["transformers_layers", "parity", "grpo_task"])
def test_help_says_how_to_run_it(name):
    assert f"python examples/{name}.py" in run(name, "--help")
