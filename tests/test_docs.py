"""The words of the project are true: tables and plots are those of the results, samples run, commands parse."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bi_ops.cli import make_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/architecture.md")
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture
def report(monkeypatch):
    """bench/report.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("report")


def fences(language: str) -> list[tuple[str, str]]:
    """(what the comment above says, the code) of every sample in `language`."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return [(m["note"] or "", m["code"]) for m in FENCE.finditer(text) if m["language"] == language]


SAMPLES = fences("python")
COMMANDS = [line for _, code in fences("bash") for line in code.splitlines() if "bi-ops " in line.split("#")[0]]


def test_blocks_and_plots_are_made_from_the_committed_results(report):
    assert report.stale() == [], "run `python bench/report.py`"


def test_a_stale_block_is_noticed(report, tmp_path, monkeypatch):
    """Negative control: one changed figure in the README, and one in a plot's data."""
    text = report.README.read_text(encoding="utf-8")
    changed = re.sub(r"\| \d[\d,]* \|", "| 12,345 |", text, count=1)
    assert changed != text
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(report, "FIGURES", {"train.svg": report.FIGURES["train.svg"]})
    collect, draw = report.FIGURES["train.svg"]
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "train.svg").write_text(report.fingerprint({"rewards": []}, draw))
    assert report.stale() == ["README.md", "plots/train.svg"]
    (tmp_path / "plots" / "train.svg").write_text(report.fingerprint(collect(report.RESULTS), draw))
    assert report.stale() == ["README.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: nonsense -->\n<!-- end: nonsense -->", "no block is called 'nonsense'"),
        ("<!-- begin: parity -->\n", "has no end"),
    ],
)
def test_a_block_that_cannot_be_made_is_named(text, message, report):
    with pytest.raises(ValueError, match=message):
        report.render(text)


@pytest.mark.parametrize("i", range(len(SAMPLES)))
def test_python_samples_run(i):
    note, code = SAMPLES[i]
    assert note in ("runnable", "needs vllm"), "say above the sample whether it runs everywhere"
    compiled = compile(code, f"sample {i}", "exec")
    if note == "runnable":
        exec(compiled, {"__name__": "__main__"})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    command, *arguments = shlex.split(line, comments=True)
    assert command.endswith("bi-ops")
    make_parser().parse_args(arguments)


def test_links_lead_somewhere():
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_named_files_exist():
    """A path in backticks that looks like one of the project's is one."""
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for path in re.findall(r"`((?:bi_ops|bench|tests|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"
