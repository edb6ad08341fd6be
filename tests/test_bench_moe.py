"""Benchmarks of whole mixtures of experts, on tiny ones without vLLM or a GPU."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.models import make_model, packing

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def whole(bench):
    return bench("moe_whole")


def as_vllm(model: torch.nn.Module, padding: int) -> SimpleNamespace:
    """Something with vLLM's names for the parameters, and a vocabulary that is padded."""
    found = []
    for name, p in model.named_parameters():
        for own, theirs in (("gate_up_proj.weight", "w13_weight"), ("down_proj.weight", "w2_weight")):
            name = name.replace(f".experts.{own}", f".experts.routed_experts.{theirs}")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            p = torch.nn.Parameter(torch.cat([p.detach(), p.new_zeros(padding, p.shape[1])]))
        found.append((name, p))
    return SimpleNamespace(named_parameters=lambda: iter(found))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_that_scores_has_the_engines_memory(whole, tied):
    config = whole.expert_shape("dry-moe") | {"tie_word_embeddings": tied}
    own = make_model(config, param_dtype=torch.bfloat16)
    whole.draw_weights(own)
    engine_model = as_vllm(own, padding=3)
    model = whole.sharing(config, engine_model)
    of_engine = {p.data_ptr() for _, p in engine_model.named_parameters()}
    assert {p.data_ptr() for p in model.parameters()} == of_engine
    wanted = own.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.get_buffer("cos_sin"), own.get_buffer("cos_sin"))


def test_weights_are_drawn_alike_in_every_process_and_none_is_constant(whole):
    one, two = (make_model(whole.expert_shape("dry-moe")) for _ in range(2))
    for model in (one, two):
        whole.draw_weights(model)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        assert 0 < float((a.detach().float() - centre).abs().mean()) < 0.2, name


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU runs the benchmark itself")
def test_what_the_engine_samples_has_the_bits_of_training_until_one_weight_has_others(whole):
    args = argparse.Namespace(model="dry-moe", layers=1, dry=True, sequences=3, new_tokens=3, prompt=20)
    rows = list(whole.one(args, plugin=True))
    assert [(r["side"], r["composition"]) for r in rows] == [
        ("plugin", "together"),
        ("plugin", "shuffled"),
        ("one bit", "together"),
    ]
    assert [r["tokens_checked"] for r in rows] == [9, 9, 9]
    assert [r["tokens_different"] > 0 for r in rows] == [False, False, True]
    assert all(map(whole.right, rows))


def test_a_row_is_right_only_where_it_shows_something(whole):
    row = {"tokens_different": 0, "control": False, "inconclusive": ""}
    assert whole.right(row)
    wrong = ({"tokens_different": 1}, {"control": True}, {"inconclusive": "constant logits"})
    assert not any(whole.right(row | change) for change in wrong)


@pytest.fixture
def step(bench):
    return bench("step")


def test_rows_of_mixtures_have_files_of_their_own(step, tmp_path):
    args = argparse.Namespace(out=tmp_path, seconds=1.0, commit="c")
    table = step.Table(args)
    numbers = dict.fromkeys(
        ("forward_ms", "captured_ms", "first_step_s", "clip_ms", "optimizer_ms", "peak_bytes", "update_ms")
    )
    numbers |= {"tokens": 8, "seqlen": 8, "offload": "none", "step_ms": 1.0, "tokens_per_s": 8, "update_peak_bytes": 0}
    numbers |= {"gemm": "", "bits": ""}
    for model, kernels in (("0.6B", [{"kernel": "k"}]), ("30B-A3B", []), ("30B-A3B", [{"kernel": "k"}])):
        table._add({"model": model, "side": "bi_ops", **numbers, "kernels": kernels})
    lines = {path.name: len(path.read_text().splitlines()) - 1 for path in tmp_path.iterdir()}
    assert lines == {"step.csv": 1, "step_profile.csv": 1, "moe_step.csv": 2, "moe_step_profile.csv": 1}
    # Another process with the same folder, or a later one: it replaces what it has measured again.
    table = step.Table(args)
    for model, ms in (("1.7B", 2.0), ("0.6B", 3.0)):
        table._add({"model": model, "side": "bi_ops", **numbers, "step_ms": ms, "kernels": []})
    with (tmp_path / "step.csv").open(newline="") as file:
        assert [(r["model"], r["step_ms"]) for r in csv.DictReader(file)] == [("1.7B", "2.0"), ("0.6B", "3.0")]


def test_transformers_computes_the_same_mixture_with_grouped_gemms(step, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    rows = [torch.arange(9).to(runtime.default_device())]
    made = step.theirs("dry-moe", rows, 1, "torch")
    value = made.forward()
    value.backward()
    ours = make_model(step.config_of("dry-moe", 1))
    assert sum(p.numel() for p in made.parameters) == sum(p.numel() for p in ours.parameters())
    assert -7 < float(value.detach()) < -3  # ln 128 is 4.9
    assert all(p.grad is not None for p in made.parameters)
    kept = transformers.Qwen3MoeForCausalLM.get_correct_experts_implementation
    monkeypatch.setattr(
        transformers.Qwen3MoeForCausalLM,
        "get_correct_experts_implementation",
        lambda self, requested: kept(self, "eager"),
    )
    with pytest.raises(RuntimeError, match="computes experts with 'eager'"):
        step.theirs("dry-moe", rows, 1, "torch")


def test_a_step_of_a_mixture_is_cut_into_the_units_of_training(step, monkeypatch):
    batches = []
    pack = packing.pack

    def recorded(*args: Any, **options: Any) -> packing.PackedBatch:
        batches.append(pack(*args, **options))
        return batches[-1]

    monkeypatch.setattr(packing, "pack", recorded)
    rows = [torch.arange(n).to(runtime.default_device()) for n in (5, 7, 3, 9)]
    step.ours("dry-moe", rows, 1, "selective", verify=False)
    assert batches[0].cu_units.tolist() == [0, 32]  # 24 tokens, and not 16 for each of four sequences


@pytest.mark.parametrize(("last", "status"), [(0.4, 0), (0.15, 1)])
def test_a_mixture_that_learns_and_agrees_is_written_apart(bench, tmp_path, monkeypatch, last, status):
    train = bench("train")

    def run(options: list[str], folder: Path, gpu: int, kill_after: int | None) -> dict[str, Any]:
        assert options[options.index("--preset") + 1] == "h100-moe"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        summary = {"weights_sha256": "a", "tokens_different": 0, "tokens_checked": 9, "reward_first": 0.1}
        return summary | {"reward_last": last, "metrics": []} | ({"killed_after": kill_after} if kill_after else {})

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--preset", "h100-moe", "--commit", "c"])
    assert train.main() == status
    runs = json.loads((tmp_path / "moe_train.json").read_text())["runs"]
    assert [run.get("killed_after") for run in runs] == [None, 12]


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bytes(bench, tmp_path, monkeypatch):
    train = bench("train")
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    options = ["--preset", "demo-moe", "--steps", "3", "--save-every", "1"]
    whole, killed = (train.train(options, tmp_path / name, 0, after) for name, after in (("a", None), ("b", 1)))
    assert 1 <= killed["killed_after"] < 3
    assert whole["weights_sha256"] == killed["weights_sha256"]
    assert [row["step"] for row in killed["metrics"]] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="ended with"):
        train.train(["--preset", "demo-moe", "--steps", "0"], tmp_path / "c", 0, 5)
