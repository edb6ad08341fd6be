"""The loop: deterministic, resumable, and stopped by a single bit. A table stands in for the model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, cast

import pytest
import torch
from rl_fakes import ORDERS, TABLE, TableConfig, TableEngine, TableModel, fresh_settings

from bi_ops import optim
from bi_ops.core.orders import OrderRecord
from bi_ops.models import packing
from bi_ops.rl import DifferenceFound, TrainConfig, checkpoint, runner
from bi_ops.rl.metrics import MetricsWriter, StepMetrics, read_metrics
from bi_ops.rl.microbatches import microbatches
from bi_ops.rl.tasks import Alphabet, Problem, make_task
from bi_ops.rl.trainer import Trainer

CONFIG = TrainConfig(steps=6, symbols=4, prompts_per_step=3, group_size=4, lr=0.1, save_every=2, **TABLE)


@pytest.fixture(autouse=True)
def _short_sequences_are_cut_apart(monkeypatch):
    """Or a batch of this size is one unit."""
    monkeypatch.setattr(packing, "UNIT_TOKENS", 1)


@pytest.fixture
def table():
    """The settings of the table engine; "broken_at" breaks it."""
    with fresh_settings() as settings:
        yield settings


def deterministic(folder):
    """The metrics that must not depend on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder / "metrics.jsonl")]


def test_the_models_gemms_are_verified_before_the_first_step(table, tmp_path, monkeypatch):
    warmed = []
    monkeypatch.setattr(TableModel, "warmup", lambda model: warmed.append("warmup"))
    runner.run(dataclasses.replace(CONFIG, steps=1), tmp_path / "run", on_step=lambda _: warmed.append("step"))
    assert warmed == ["warmup", "step"]


def test_two_runs_of_one_seed_end_in_the_same_bytes(table, tmp_path):
    a, b = (runner.run(CONFIG, tmp_path / name) for name in "ab")
    other = runner.run(dataclasses.replace(CONFIG, seed=1), tmp_path / "c")
    assert a.weights_sha256 == b.weights_sha256 != other.weights_sha256
    assert deterministic(tmp_path / "a") == deterministic(tmp_path / "b")
    assert a.tokens_checked == 6 * 3 * 4 * CONFIG.max_new_tokens
    assert a.tokens_different == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["weights_sha256"] == a.weights_sha256
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))


def test_every_step_records_everything(table, tmp_path):
    runner.run(CONFIG, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    names = {"reward_mean", "reward_std", "tokens_checked", "tokens_different", "max_delta", "mean_delta", "loss"}
    names |= {"step", "grad_norm", "kl", "clip_fraction", "response_length", "seconds"}
    assert all(set(r) == names for r in records)


def test_the_task_is_learned(table, tmp_path):
    summary = runner.run(dataclasses.replace(CONFIG, steps=30, lr=0.2), tmp_path / "run")
    assert summary.reward_last >= 2 * summary.reward_first


@pytest.mark.parametrize("dies_after", [1, 2, 3, 5])
def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(table, tmp_path, dies_after):
    whole = runner.run(CONFIG, tmp_path / "whole")

    def die(metrics):
        if metrics.step == dies_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(CONFIG, tmp_path / "cut", on_step=die)
    resumed = runner.run(CONFIG, tmp_path / "cut", resume=True)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert deterministic(tmp_path / "cut") == deterministic(tmp_path / "whole")


def test_a_resumed_run_keeps_the_initial_model_as_its_reference(table, tmp_path):
    config = dataclasses.replace(CONFIG, steps=4, kl=0.5)
    whole = runner.run(config, tmp_path / "whole")
    runner.run(dataclasses.replace(config, steps=2), tmp_path / "cut")
    assert runner.run(config, tmp_path / "cut", resume=True).weights_sha256 == whole.weights_sha256
    assert runner.run(dataclasses.replace(config, kl=0.0), tmp_path / "free").weights_sha256 != whole.weights_sha256


def test_resuming_a_finished_run_with_more_steps_goes_on(table, tmp_path):
    whole = runner.run(CONFIG, tmp_path / "whole")
    runner.run(dataclasses.replace(CONFIG, steps=4), tmp_path / "short")
    assert runner.run(CONFIG, tmp_path / "short", resume=True).weights_sha256 == whole.weights_sha256


def test_a_flipped_bit_stops_the_run_before_it_learns_and_is_named(table, tmp_path):
    table["broken_at"] = (2, 7, 1)
    with pytest.raises(DifferenceFound, match=r"step 3: .* 1 different, .*sequence 7, completion position 1"):
        runner.run(CONFIG, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "difference.json").read_text())
    assert (record["step"], record["sequence"], record["position"], record["tokens_different"]) == (3, 7, 1, 1)
    assert record["completion"][1] == record["token"]
    assert record["rollout"] != record["training"]
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("packs", [None, 20])
def test_a_nan_is_a_difference_at_a_token_and_not_a_loss(table, tmp_path, monkeypatch, packs):
    table["broken_at"] = (1, 7, 1)
    monkeypatch.setattr(TableEngine, "breaks_to_nan", True)
    config = dataclasses.replace(CONFIG, max_tokens_per_microbatch=packs)
    with pytest.raises(DifferenceFound, match=r"step 2: .* 1 different, .*sequence 7, completion position 1"):
        runner.run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "difference.json").read_text(), parse_constant=pytest.fail)
    assert (record["sequence"], record["position"]) == (7, 1)
    assert (record["rollout"], record["max_delta"], record["mean_delta"]) == (None, None, None)
    assert record["training"] < 0
    seen: list[Any] = []
    warned = dataclasses.replace(config, on_difference="warn")
    with pytest.raises(FloatingPointError, match="the loss is nan"):  # nothing can be learned from it
        runner.run(warned, tmp_path / "warned", on_difference=seen.append)
    assert [d.report.first_difference.sequence for d in seen] == [7]


def test_the_same_nan_on_both_sides_is_a_loss(table, tmp_path, monkeypatch):
    monkeypatch.setattr(TableModel, "logprobs", lambda self, ids: self.table[ids] * float("nan"))
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: torch.zeros(1, dtype=torch.int64))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        runner.run(CONFIG, tmp_path / "run")


def test_training_adopts_the_orders_that_sample(monkeypatch):
    adopted = []
    monkeypatch.setattr(TableModel, "adopt", lambda self, record: adopted.append((self, record)))
    t = trainer(CONFIG)
    assert [m for m, _ in adopted] == [t.model, t.reference]
    assert all(record is ORDERS for _, record in adopted)


def test_an_engine_in_other_orders_or_in_none_is_refused(monkeypatch):
    monkeypatch.setattr(TableEngine, "orders", dataclasses.replace(ORDERS, arch="sm_90"))
    with pytest.raises(RuntimeError, match="architecture sm_90 and table"):
        trainer(CONFIG)
    monkeypatch.setattr(TableEngine, "orders", None)
    with pytest.raises(ValueError, match="the table engine states no orders"):
        trainer(CONFIG)


def test_a_run_records_its_orders_and_is_not_resumed_in_others(table, tmp_path, monkeypatch):
    runner.run(dataclasses.replace(CONFIG, steps=2), tmp_path / "run")
    written = {"rollout": ORDERS.as_dict(), "training": ORDERS.as_dict()}
    assert json.loads((tmp_path / "run" / "orders.json").read_text()) == written
    saved = tmp_path / "run" / "checkpoints" / "step_000002" / "state.json"
    assert json.loads(saved.read_text())["orders"] == written
    other = OrderRecord(ORDERS.arch, {"lookup": {"kind": "Column"}})
    with monkeypatch.context() as m:
        m.setattr(TableModel, "orders", lambda self, training=False: other)
        with pytest.raises(ValueError, match=r"orders.json was computed in other orders .*lookup: .*Row.*Column"):
            runner.run(CONFIG, tmp_path / "run", resume=True)
        (tmp_path / "run" / "orders.json").unlink()  # the checkpoint says it too
        with pytest.raises(ValueError, match="step_000002 was computed in other orders"):
            runner.run(CONFIG, tmp_path / "run", resume=True)
    (tmp_path / "run" / "orders.json").unlink()
    assert runner.run(CONFIG, tmp_path / "run", resume=True).steps == 6


def test_a_difference_in_a_micro_batch_names_the_sequence_of_the_step(table, tmp_path):
    table["broken_at"] = (0, 9, 0)
    with pytest.raises(DifferenceFound, match="sequence 9, completion position 0"):
        runner.run(dataclasses.replace(CONFIG, max_tokens_per_microbatch=20), tmp_path / "run")
    warned = dataclasses.replace(CONFIG, max_tokens_per_microbatch=20, on_difference="warn")
    summary = runner.run(warned, tmp_path / "warned")
    assert (summary.tokens_checked, summary.tokens_different) == (6 * 3 * 4 * CONFIG.max_new_tokens, 1)
    assert 0 < summary.max_delta < 1e-5


def test_on_difference_warn_goes_on_and_records_it(table, tmp_path):
    table["broken_at"] = (2, 7, 1)
    seen: list[Any] = []
    config = dataclasses.replace(CONFIG, on_difference="warn")
    summary = runner.run(config, tmp_path / "run", on_difference=seen.append)
    assert summary.tokens_different == 1
    assert len(seen) == 1
    assert [r["tokens_different"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 0, 1, 0, 0, 0]


def test_a_folder_with_another_run_is_refused(table, tmp_path):
    runner.run(CONFIG, tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds another run"):
        runner.run(CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match=r"lr was 0.1, now 0.2; seed was 0, now 5"):
        runner.run(dataclasses.replace(CONFIG, lr=0.2, seed=5), tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        runner.run(CONFIG, tmp_path / "nothing", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"):
        runner.run(CONFIG, tmp_path / "full")


def trainer(config, task: Any = None, broken_at=None):
    model: Any = TableModel()
    engine: Any = TableEngine(model, broken_at)
    reference: Any = TableModel().requires_grad_(False)
    task = task or make_task("repeat", Alphabet.integers(12, 4), config.max_new_tokens)
    return Trainer(config, model, engine, task, reference)


def test_a_nan_reward_is_named():
    class Broken:
        name = "broken"

        def sample(self, rng):
            return Problem((1,), 2, lambda completion: float("nan"))

    with pytest.raises(FloatingPointError, match="reward nan of prompt 0, sample 0"):
        trainer(CONFIG, Broken()).step(1)


def test_kl_needs_a_reference_and_grows_from_zero():
    config, model, none = dataclasses.replace(CONFIG, kl=0.1), cast(Any, TableModel()), cast(Any, None)
    with pytest.raises(ValueError, match="needs a reference"):
        Trainer(config, model, none, none)
    t = trainer(config)
    first, second = t.step(1), t.step(2)
    assert first.kl == 0 < second.kl


def test_more_updates_per_rollout_leave_the_ratio_at_one():
    once = trainer(dataclasses.replace(CONFIG, lr=1.0, max_grad_norm=100.0)).step(1)
    often = trainer(dataclasses.replace(CONFIG, lr=1.0, max_grad_norm=100.0, updates_per_rollout=4)).step(1)
    assert once.clip_fraction == 0 < often.clip_fraction
    assert often.tokens_different == 0


def test_microbatches_add_up_to_the_batch():
    assert list(microbatches([3, 3, 9, 1], 6)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(microbatches([3, 3], None)) == [slice(0, 2)]
    assert list(microbatches([3, 3, 9, 1, 1], 7, 6)) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    whole, cut = trainer(CONFIG), trainer(dataclasses.replace(CONFIG, max_tokens_per_microbatch=20))
    a, b = whole.step(1), cut.step(1)
    assert (a.tokens_checked, a.tokens_different) == (b.tokens_checked, b.tokens_different)
    assert a.loss == pytest.approx(b.loss, abs=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


def test_the_update_is_clipped_adamw_of_torch():
    """`max_grad_norm` is far below the norm here; AdamW alone would not show a scale, so SGD's share is looked at."""
    config = dataclasses.replace(CONFIG, max_grad_norm=0.01, weight_decay=0.1)
    t = trainer(config)
    before = t.model.table.detach().clone()
    norm = t.step(1).grad_norm
    assert norm > 0.02
    g = t.model.table.grad
    assert float(g.norm()) == pytest.approx(norm, rel=1e-5)  # the scale is in AdamW's pass: gradients stay as they are
    theirs = torch.nn.Parameter(before)
    theirs.grad = g * (0.01 / (norm + 1e-6))
    reference = torch.optim.AdamW([theirs], lr=config.lr, betas=config.betas, weight_decay=0.1, foreach=False)
    reference.step()
    torch.testing.assert_close(t.model.table.detach(), theirs.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(t.optimizer.state[t.model.table]["exp_avg"], reference.state[theirs]["exp_avg"])


def test_a_norm_that_is_not_finite_stops_the_run_before_it_learns(monkeypatch):
    t = trainer(CONFIG)
    before = t.model.table.detach().clone()
    t.model.table.register_hook(lambda g: g * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient norm"):
        t.step(1)
    assert torch.equal(t.model.table, before)


def test_the_host_waits_once_a_pass(monkeypatch):
    """However many micro-batches there are, and whatever the loss."""
    config = dataclasses.replace(CONFIG, max_tokens_per_microbatch=1, kl=0.1)
    t = trainer(config)
    completions = t.engine.generate([p.prompt for p in t.problems(1)], t.sampling(1, t.problems(1)))
    waits = []
    for name in ("cpu", "item", "__bool__", "__float__", "__int__", "tolist"):
        real = getattr(torch.Tensor, name)

        def counted(x, *rest, name=name, real=real):
            waits.append((name, x.shape))
            return real(x, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    t.backward(completions, torch.ones(len(completions)))
    waits = [(name, shape) for name, shape in waits if name != "tolist"]  # of what is on the CPU by then
    assert len([w for w in waits if w[0] == "cpu"]) == 1
    assert len(waits) == 1


# --------------------------------------------------------------------------------------------------------------
# checkpoints


def stepped_model():
    model = TableModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.table.square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_gives_back_weights_and_moments(tmp_path):
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"seed": 1})
    assert checkpoint.latest(tmp_path) == path
    fresh = TableModel(seed=9)
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    assert checkpoint.load(path, fresh, other) == {"step": 3, "seed": 1}
    assert torch.equal(fresh.table, model.table)
    for key, value in optimizer.state[model.table].items():
        assert torch.equal(other.state[fresh.table][key], value), key


@pytest.mark.parametrize("make", [torch.optim.AdamW, optim.AdamW])
def test_a_checkpoint_of_either_optimizer_goes_on_in_ours(tmp_path, make):
    """Runs of earlier releases hold the state of torch's."""
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 3, model, optimizer, {})
    fresh = TableModel(seed=9)
    other = optim.AdamW(fresh.parameters(), lr=0.1)
    checkpoint.load(path, fresh, other)
    for m, o in ((model, optimizer), (fresh, other)):
        m.zero_grad()
        m.table.square().sum().backward()
        o.step()
    torch.testing.assert_close(fresh.table, model.table, rtol=1e-5, atol=1e-7)
    assert other.state[fresh.table]["step"] == 2


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    model, optimizer = stepped_model()
    before = checkpoint.save(tmp_path, 1, model, optimizer, {})
    for moment in ("tensor_files.create", "tensor_files.write", "write_json", "write_atomically"):

        def crash(*args, **kwargs):
            raise OSError("no space left on device")

        with monkeypatch.context() as m:
            m.setattr(f"bi_ops.rl.checkpoint.{moment}", crash)
            with pytest.raises(OSError, match="no space"):
                checkpoint.save(tmp_path, 2, model, optimizer, {})
        assert checkpoint.latest(tmp_path) == before
        checkpoint.load(before, model, optimizer)
    assert checkpoint.latest(tmp_path) == before
    assert checkpoint.save(tmp_path, 2, model, optimizer, {}) == checkpoint.latest(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "step_000002", "latest"}


def test_a_checkpoint_that_does_not_fit_lists_what_does_not(tmp_path):
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(ValueError, match=r"table is \[12, 12\], the model has \[5, 5\]"):
        checkpoint.load(path, TableModel(TableConfig.from_dict({"vocab_size": 5})), optimizer)
    other = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="missing weight; extra table"):
        checkpoint.load(path, other, torch.optim.AdamW(other.parameters()))
    (tmp_path / "latest").write_text("step_000009\n")
    with pytest.raises(ValueError, match="names step_000009"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, name):
    model, optimizer = stepped_model()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    (path / name).write_bytes((path / name).read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"step_000001/{name} cannot be read .*earlier checkpoint into .*/latest"):
        checkpoint.load(path, model, optimizer)


# --------------------------------------------------------------------------------------------------------------
# settings


def test_a_config_survives_json(tmp_path):
    config = TrainConfig(lr=1e-3, betas=(0.8, 0.9), max_tokens_per_microbatch=100, kl=0.1)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.from_file(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"min_p": 2.0}, "min_p is 2.0; it must be between"),
        ({"top_p": 0.9, "kl": 0.1}, "kl is 0.1; it must be 0 with top_k"),
        ({"group_size": 1}, "group_size is 1; it must be at least 2"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"task": "chess"}, "one of repeat"),
        ({"engine": "sglang"}, "engine is 'sglang'; it must be embedded or vllm"),
        ({"clip": 1.5}, "clip is 1.5"),
        ({"attention": "flash"}, "attention is 'flash'; it must be triton, vllm or null"),
        ({"kl": float("nan")}, "kl is nan"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
        ({"betas": [0.9]}, r"betas is \(0.9,\)"),
        ({"recompute": "all"}, "recompute is 'all'; it must be selective, layer, none"),
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0"),
        ({"learning_rate": 1}, "unknown settings learning_rate"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "3"}, "steps is '3', str; it must be a whole number"),
        ({"steps": 2.5}, "steps is 2.5, float; it must be a whole number"),
        ({"seed": True}, "seed is True, bool"),
        ({"max_tokens_per_microbatch": "9"}, "max_tokens_per_microbatch is '9', str; .* a whole number or null"),
        ({"lr": "fast"}, "lr is 'fast', str; it must be a number"),
        ({"betas": 0.9}, "betas is 0.9, float; it must be a list of numbers"),
        ({"betas": ["a", 1]}, "it must be a list of numbers"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1, int; it must be true or false"),
        ({"task": None}, "task is None, NoneType; it must be a string"),
        ({"engine": ["vllm"]}, "engine is .*, list; it must be a string"),
        ({"model": 3}, "model is 3, int; it must be a string or null"),
        ({"architecture": "qwen3"}, "architecture is 'qwen3', str; it must be an object"),
    ],
)
def test_settings_of_another_type_are_named(settings, message):
    with pytest.raises(TypeError, match=f"train: .*{message}"):
        TrainConfig.from_dict(settings)


def test_metrics_are_strict_json(tmp_path):
    values: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(StepMetrics)), 1.0)
    metrics = StepMetrics(**(values | {"step": 1, "max_delta": float("inf"), "mean_delta": float("nan")}))
    writer = MetricsWriter(tmp_path)
    writer.write(metrics)
    writer.close()
    MetricsWriter(tmp_path, after_step=1).close()  # resuming writes the records anew
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["max_delta"], record["mean_delta"], record["loss"]) == (None, None, 1.0)


def test_a_metrics_file_cut_by_a_crash_is_read_up_to_the_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
