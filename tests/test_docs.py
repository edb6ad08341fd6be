"""The documentation is true: tables and plots are those of the results, samples run, commands parse, links lead on."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from bi_ops.cli import make_parser
from bi_ops.core import runtime

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
README_LINES = 200
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture
def report(monkeypatch):
    """bench/report.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("report")


def write_rows(path, rows: list[dict[str, object]], versions: dict[str, str]) -> None:
    """A result file of `rows`, all of them measured in one place."""
    record = {"device": "GPU", "versions": versions, "commit": "abc", "date": "2026-01-02T03:04:05+00:00"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*rows[0], *record])))
        writer.writeheader()
        writer.writerows(record | row for row in rows)


def cells(block: str) -> list[list[str]]:
    """The cells of a block's tables, line by line, without the rulers."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")]
    return [line for line in lines if not line[0].startswith("---")]


def fences(language: str) -> list[tuple[str, str]]:
    """(what the comment above says, the code) of every sample in `language`."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return [(m["note"] or "", m["code"]) for m in FENCE.finditer(text) if m["language"] == language]


SAMPLES = fences("python")
COMMANDS = [line for _, code in fences("bash") for line in code.splitlines() if "bi-ops " in line.split("#")[0]]


def test_the_readme_is_a_front_door():
    """One table and one figure of results; the rest is in docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert text.count("<!-- begin: ") == text.count("![") == 1


def test_every_result_is_shown(report):
    text = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    assert [name for name in report.BLOCKS if f"<!-- begin: {name} -->" not in text] == []
    text += (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    assert [name for name in (*report.FIGURES, *report.PICTURES) if f"](plots/{name})" not in text] == []


def test_blocks_and_plots_are_made_from_the_committed_results(report):
    assert report.stale() == [], "run `python bench/report.py`"


def test_a_stale_block_is_noticed(report, tmp_path, monkeypatch):
    """Negative control: one changed figure in each page, and one in a plot's data."""
    pages = []
    for page in report.PAGES[:2]:
        text = page.read_text(encoding="utf-8")
        changed = re.sub(r"(<!-- begin: .*?)\b1\.02x", r"\g<1>9.99x", text, count=1, flags=re.DOTALL)
        assert changed != text
        pages.append(tmp_path / page.name)
        pages[-1].write_text(changed, encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", tuple(pages))
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(report, "FIGURES", {"train.svg": report.FIGURES["train.svg"]})
    monkeypatch.setattr(report, "PICTURES", {"verify.svg": lambda results: "other"})
    collect, draw = report.FIGURES["train.svg"]
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "train.svg").write_text(report.fingerprint({"rewards": []}, draw))
    (tmp_path / "plots" / "verify.svg").write_text("drawn")
    assert report.stale() == ["README.md", "results.md", "plots/train.svg", "plots/verify.svg"]
    (tmp_path / "plots" / "train.svg").write_text(report.fingerprint(collect(report.RESULTS), draw))
    assert report.stale() == ["README.md", "results.md", "plots/verify.svg"]


def test_results_with_older_names_stay_readable(report, tmp_path):
    """Columns and compositions that were renamed: an old file and a new one make the same table."""
    gemm = {"pass": "fwd", "model": "0.6B", "m": 1, "n": 8, "k": 8, "cublas_us": 3.0, "vllm_us": 9.0, "ours_us": 2.0}
    exact = {"bits_equal_vllm": True, "m_invariant": True}
    scores = {"model": "0.6B", "plugin": True, "cuda_graphs": True, "prompts": 2, "new_tokens": 4, "max_delta": 0.0}
    counts = {"tokens_checked": 8, "tokens_different": 0}
    where = {"device": "GPU", "versions": {"torch": "2.11.0"}, "commit": "abc", "date": "2026-01-02T03:04:05+00:00"}
    made = {}
    for age, names, composition in (
        ("old", {"product": "qkv", "provider": "triton", "roof_us": 1.0}, "strangers"),
        ("new", {"gemm": "qkv", "backend": "triton", "roofline_us": 1.0}, "distractors"),
    ):
        results = tmp_path / age
        write_rows(results / "h100/products.csv", [{**gemm, **names, **exact}], {"torch": "2.11.0"})
        record = [{**scores, **counts, **where, "composition": composition}]
        if age == "new":  # tokens drawn again: no log-probabilities, so no part of the block
            record.append(record[0] | {"composition": "draws", "max_delta": None})
        (results / "h100/parity.json").write_text(json.dumps(record), encoding="utf-8")
        made[age] = [report.BLOCKS["gemm"](results), report.BLOCKS["parity"](results)]
        data, _ = report.FIGURES["gemm.svg"]
        made[age].append(data(results))
    assert made["old"] == made["new"]
    assert "50%" in made["new"][0]
    assert "compositions: distractors." in made["new"][1]


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


def test_the_block_of_flash_attention_4_says_what_holds_and_what_was_not_asked(report, tmp_path):
    def case(kind, head_dim, batch, ours, default, deterministic, reruns, invariant):
        return {
            **{"pass": kind, "seqlen": 4096 // batch, "batch": batch, "packed": False, "head_dim": head_dim},
            **{"ours_tflops": ours, "fa4_tflops": default, "fa4_deterministic_tflops": deterministic},
            **{"fa4_reruns_equal": reruns, "fa4_batch_invariant": invariant},
        }

    rows = [
        case("bwd", 64, 4, 200.0, 100.4, 50.0, True, True),
        case("fwd", 64, 4, 300.0, 400.0, "", "", ""),
        case("bwd", 128, 4, 250.0, "", 100.0, True, False),  # a batch that changes bits, and a baseline that failed
        case("bwd", 128, 1, 100.0, 125.0, 80.0, True, True),  # one sequence: nothing is said of batches
    ]
    write_rows(tmp_path / "h100/flash_attention_4.csv", rows, {"torch": "2.11.0+cu130", "flash-attn-4": "4.0.0b36"})
    block = report.BLOCKS["flash_attention_4"](tmp_path)
    assert cells(block)[1:4] == [
        ["forward", "4 x 1,024", "300", "400", "-", "-", "-", "-", "-", "-"],
        ["backward", "4 x 1,024", "200", "100", "50", "250", "-", "100", "yes", "NO"],
        ["backward", "1 x 4,096", "-", "-", "-", "100", "125", "80", "yes", "-"],
    ]
    assert ["backward", "128", "FlashAttention 4, deterministic", "1.77x", "1.25x at 4,096"] in cells(block)
    assert "GPU; torch 2.11.0 flash-attn-4 4.0.0b36; commit abc; 2026-01-02;" in block


@pytest.mark.parametrize("missing", ["bi_ops", "torch, compiled", "torch, autocast"])
def test_a_training_step_is_told_without_a_side_that_failed(missing, report, tmp_path):
    ms = {"torch, autocast": 400.0, "torch, compiled": 210.0, "bi_ops": 200.0}
    sides = [(model, side) for model in ("1.7B", "0.6B") for side in ms if (model, side) != ("1.7B", missing)]
    rows = [
        {
            **{"model": model, "tokens": 8192, "seqlen": 2048, "side": side, "forward_ms": 1.25, "backward_ms": 2.5},
            **{"step_ms": ms[side], "tokens_per_s": 40960, "peak_bytes": 2**31},
            "captured_ms": "" if side == "torch, autocast" else ms[side] - 20,
        }
        for model, side in sides
    ]
    write_rows(tmp_path / "h100/step.csv", rows, {"torch": "2.11.0"})
    told = cells(report.BLOCKS["step"](tmp_path))[1:]
    assert [row[0] for row in told] == ["0.6B"] * 3 + ["1.7B"] * 2
    assert told[0][2].startswith("bi_ops")
    assert told[0][-3:] == ["180.0", "40,960", "2.0"]


def test_the_headline_has_the_fastest_step_of_one_run(report, tmp_path):
    """Of captured and eager ones, and not of another commit; a model without one is left out."""
    assert report.BLOCKS["headline"](tmp_path) == "Not measured yet.\n"
    sides = {"bi_ops, graphs": (100.0, ""), "torch, compiled": (130.0, 120.0), "torch, cudnn": (125.0, 121.0)}
    rows = [
        {"model": model, "tokens": 8192, "side": side, "step_ms": ms, "captured_ms": captured, "commit": "abc"}
        for model in ("8B", "1.7B")
        for side, (ms, captured) in sides.items()
        if (model, side) != ("8B", "torch, compiled")
    ]
    rows.append(rows[0] | {"side": "torch, compiled", "step_ms": 50.0, "commit": "another"})
    rows.append(rows[0] | {"model": "4B"})
    rows.append(rows[0] | {"model": "1.7B", "tokens": 16384, "side": "torch, compiled", "step_ms": 10.0})
    write_rows(tmp_path / "h200/step.csv", rows, {"torch": "2.11.0"})
    told = cells(report.BLOCKS["headline"](tmp_path))[1:]
    assert [(row[0], row[2], row[3]) for row in told] == [("a training step of Qwen3-1.7B, 8B", "H200", "1.20x, 1.21x")]


@pytest.mark.parametrize("i", range(len(SAMPLES)))
def test_python_samples_run(i):
    note, code = SAMPLES[i]
    assert note in ("runnable", "needs vllm"), "say above the sample whether it runs everywhere"
    compiled = compile(code, f"sample {i}", "exec")
    if note == "runnable":
        with torch.device(runtime.default_device()):  # the README's samples leave the device to the reader
            exec(compiled, {"__name__": "__main__"})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    command, *arguments = shlex.split(line, comments=True)
    assert command.endswith("bi-ops")
    make_parser().parse_args(arguments)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """A path in backticks that looks like one of the project's is one."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for path in re.findall(r"`((?:bi_ops|bench|tests|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [Path(p).name for p in PAGES if p.startswith("docs/")]
    assert sorted(re.findall(r": ([\w-]+\.md)$", config, re.MULTILINE)) == pages
