"""The examples run as a stranger runs them, and print what their docstrings promise."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bi_ops import cli
from bi_ops.models.qwen3 import Qwen3Config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = sorted(p.stem for p in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """Runs an example by its name and arguments, and returns what it prints."""

    def call(name: str, *arguments: str) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return call


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(NAMES) >= 5
    assert [n for n in NAMES if f'run("{n}"' not in source] == []


@pytest.mark.parametrize("name", NAMES)
def test_bi_ops_is_imported_before_what_imports_triton(name):
    """It decides whether kernels are compiled; where it comes too late, the example ends with an error."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports]
    roots = [m.partition(".")[0] for m in modules]
    assert next(r for r in roots if r not in sys.stdlib_module_names) == "bi_ops"


def test_mode(run):
    out = run("mode")
    assert number(r"without the mode +(\d+) of 16 rows", out) > 0  # torch's own rows do depend on the batch
    assert "with the mode     0 of 16 rows" in out
    assert "gradients         6 of 6" in out


def test_transformers_layers(run):
    pytest.importorskip("transformers")
    out = run("transformers_layers")
    assert number(r"transformers +(\d+) of 1280 logits", out) > 0
    assert "with bi_ops   0 of 1280 logits" in out


def test_parity(run):
    lines = run("parity").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["alone", "together", "shuffled"]
    assert all("bitwise identical: 20 tokens checked, 0 different" in line for line in lines[:4])
    assert lines[4].startswith("control       20 of 20 differ")


def test_grpo_task(run, tmp_path):
    lines = run("grpo_task", "--steps", "2", "--save", str(tmp_path / "trained")).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2"]
    assert all(line.endswith("16 log-probabilities compared, 0 different") for line in lines)
    assert Qwen3Config.from_pretrained(tmp_path / "trained").num_hidden_layers == 1


def test_moe(run):
    rows, gradients, control = run("moe").splitlines()
    assert rows.startswith("rows       0 of 64 ")
    assert gradients.startswith("gradients  3 of 3 ")
    assert number(r"control    (\d) of 3", control) < 3


def test_verify_operator(run):
    lines = run("verify_operator").splitlines()
    assert all(line.endswith(" []") for line in lines[:3])
    assert all(line.endswith(" ok") for line in lines[3:5])
    assert re.fullmatch(r"sum_rows_by_occupancy +changes at row counts \[1, 3, 15\]", lines[5])


@pytest.mark.parametrize("name", ["transformers_layers", "parity", "grpo_task"])
def test_help_says_how_to_run_it(name, run, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        run(name, "--help")
    assert f"python examples/{name}.py" in capsys.readouterr().out


def test_an_example_runs_in_a_process_of_its_own():
    command = [sys.executable, str(EXAMPLES / "parity.py"), "--help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "python examples/parity.py" in done.stdout


def test_the_descriptions_of_the_example_are_verified(monkeypatch, capsys):
    """As the docstring of the example says: one holds in every property, the other one only fails by its batch."""
    monkeypatch.chdir(EXAMPLES)
    assert cli.main(["verify", "--op", "verify_operator:SUM", "--jobs", "1"]) == 0
    assert cli.main(["verify", "--op", "verify_operator:SUM_BY_OCCUPANCY", "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    assert "bitwise identical" in out
    assert "sum_rows_by_occupancy, batch size, float32" in err
    assert {line.split(", ")[1] for line in err.splitlines() if "sum_rows" in line} == {"batch size"}
