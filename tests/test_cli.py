"""The command line: what it prints, where errors go, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar, cast

import pytest
import torch
from rl_fakes import TABLE, TableEngine, fresh_settings
from tiny import tiny_model

from bi_ops import cli, matmul
from bi_ops.core import arch, backends, runtime
from bi_ops.models import load_model
from bi_ops.rl import PRESETS, TrainConfig
from bi_ops.rollout import embedded
from bi_ops.verify.compositions import COMPOSITIONS


@pytest.fixture
def table(tmp_path):
    """Options that train the table model, and the settings of its engine; "broken_at" breaks it."""
    config = tmp_path / "table.json"
    config.write_text(json.dumps(TABLE | {"symbols": 4}))
    with fresh_settings() as settings:
        settings["options"] = ("--config", config)
        yield settings


def call(capsys, *argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command, argparse's exits included."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as e:
        code = cast(int, e.code)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", [(), ("train",), ("parity",), ("orders",), ("doctor",)])
def test_help_teaches_with_examples(capsys, command):
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert "bi-ops train" in out or f"bi-ops {command[0]}" in out
    assert "exit codes" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "COMMAND"),
        (("fly",), "invalid choice"),
        (("train",), "--output"),
        (("train", "--output", "x", "--task", "chess"), "invalid choice"),
        (("train", "--output", "x", "--steps", "many"), "invalid int"),
        (("train", "--output", "x", "--temperature", "0"), "temperature is 0.0"),
        (("train", "--output", "x", "--group-size", "1"), "group_size is 1"),
        (("train", "--output", "x", "--config", "nothing.json"), "nothing.json"),
        (("parity", "nowhere"), "not a checkpoint folder"),
        (("parity", "nowhere", "--prompts", "0"), "--prompts is 0"),
        (("parity", "nowhere", "--no-plugin"), "add --engine vllm"),
        (("parity", "nowhere", "--tp", "2"), "--tp 2 spreads vLLM over GPUs; add --engine vllm"),
        (("parity", "nowhere", "--engine", "vllm", "--tp", "2", "--bisect"), "leave --tp out"),
        (("parity", "nowhere", "--no-cuda-graphs"), "add --engine vllm"),
        (("train", "--output", "x", "--model", "nowhere"), "not a checkpoint folder"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_setting_of_another_type_in_a_file_is_bad_input(capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"steps": "3"}')
    code, _, err = call(capsys, "train", "--config", tmp_path / "c.json", "--output", tmp_path / "run")
    assert (code, err) == (2, "bi-ops train: error: train: steps is '3', str; it must be a whole number\n")


def test_train_prints_every_step_and_the_weights_hash(capsys, table, tmp_path):
    code, out, err = call(capsys, "train", *table["options"], "--output", tmp_path / "run", "--steps", 3)
    assert (code, err) == (0, "")
    assert out.count("128 tokens identical") == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights_sha256"] in out
    assert str(tmp_path / "run" / "metrics.jsonl") in out


def test_train_stops_on_a_difference_with_exit_code_1(capsys, table, tmp_path):
    table["broken_at"] = (1, 4, 2)
    code, _, err = call(capsys, "train", *table["options"], "--output", tmp_path / "run", "--steps", 3)
    assert code == 1
    assert "step 2" in err
    assert "sequence 4, completion position 2" in err
    assert "difference.json" in err


def test_train_refuses_a_used_folder_and_resumes_with_its_settings(capsys, table, tmp_path):
    run = ("train", "--output", tmp_path / "run")
    assert call(capsys, *run, *table["options"], "--steps", 2, "--save-every", 1)[0] == 0
    code, _, err = call(capsys, *run, *table["options"])
    assert code == 2
    assert err.startswith("bi-ops train: error: ")
    assert err.count("\n") == 1
    assert "--resume" in err
    code, out, _ = call(capsys, *run, "--resume", "--steps", 3)
    assert code == 0
    assert "step 3/3" in out
    assert "step 2/" not in out
    assert "lr was" in call(capsys, *run, "--resume", "--lr", 0.5)[2]


def test_a_failed_run_has_exit_code_3_and_debug_shows_where(capsys, table, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("lost")

    monkeypatch.setattr(TableEngine, "generate", fail)
    argv = ("train", *table["options"], "--output")
    code, _, err = call(capsys, *argv, tmp_path / "a")
    assert code == 3
    assert "KeyError" in err
    with pytest.raises(KeyError):
        call(capsys, *argv, tmp_path / "b", "--debug")


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_a_run_that_could_not_start_leaves_the_folder_free(capsys, tmp_path):
    argv = ("train", "--output", tmp_path / "run", "--steps", 1, "--engine")
    code, _, err = call(capsys, *argv, "vllm")
    assert (code, "needs a CUDA GPU" in err) == (3, True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert call(capsys, *argv, "vllm")[0] == 2
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_says_so(capsys, table, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TableEngine, "generate", interrupt)
    assert call(capsys, "train", *table["options"], "--output", tmp_path / "a")[0] == 130


def test_settings_come_from_preset_then_file_then_options(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"lr": 0.5, "steps": 7}))
    argv = ["train", "--preset", "h100", "--config", str(tmp_path / "c.json"), "--steps", "9", "--output", "x"]
    config = cli.train.make_config(cli.make_parser().parse_args(argv))
    assert (config.steps, config.lr, config.engine) == (9, 0.5, "vllm")
    demo = cli.train.make_config(cli.make_parser().parse_args(["train", "--preset", "demo", "--output", "x"]))
    assert demo == PRESETS["demo"]
    assert cli.train.make_config(cli.make_parser().parse_args(["train", "--output", "x"])) == TrainConfig()


def test_doctor_says_what_runs_each_operator(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == torch.__version__
    operators = {o["op"]: o for o in found["operators"]}
    assert {"matmul", "norm", "attention", "activation", "rope", "embedding", "logprob"} <= set(operators)
    assert all(o["backend"] and o["why"] for o in operators.values())
    assert operators["attention"]["order"].startswith("KeySteps(" if runtime.INTERPRET else "")
    assert (found["architecture"], found["orders"]) == ("interpreter", "interpreter") or not runtime.INTERPRET
    assert "vllm" in {operators["matmul"]["backend"], *operators["matmul"]["others"]}
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "matmul" in out


def test_doctor_reads_a_table_of_backends(capsys, monkeypatch):
    class Own(backends.Backend):
        name, note = "own", "written here"

    class Theirs(backends.Backend):
        name, automatic = "theirs", False

        def available(self):
            return backends.Support(False, "is not installed")

    monkeypatch.setattr(matmul, "backends", backends.Backends("matmul", (Theirs(), Own())), raising=False)
    found = {o["op"]: o for o in json.loads(call(capsys, "doctor", "--json")[1])["operators"]}["matmul"]
    assert (found["ok"], found["backend"], found["why"]) == (True, "own", "written here")
    assert found["others"] == {"theirs": "is not installed"}
    monkeypatch.setattr(matmul, "backends", backends.Backends("matmul", (Theirs(),)))
    code, out, _ = call(capsys, "doctor", "--json")
    found = {o["op"]: o for o in json.loads(out)["operators"]}["matmul"]
    assert (code, found["ok"], found["backend"], found["why"]) == (1, False, None, "no backend can run here")


def test_doctor_says_why_the_portable_orders_are_in_use(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert "portable" not in call(capsys, "doctor")[1]
    portable = dataclasses.replace(arch.PORTABLE, name="sm_120", reason="bi_ops knows no orders of its own for sm_120")
    monkeypatch.setattr(arch, "current", lambda: portable)
    found = json.loads(call(capsys, "doctor", "--json")[1])
    assert (found["orders"], found["why_these_orders"]) == ("portable", portable.reason)
    assert "orders portable: bi_ops knows no orders of its own for sm_120" in call(capsys, "doctor")[1]


def test_doctor_lists_verified_gemms_and_what_was_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert json.loads(call(capsys, "doctor", "--json")[1])["verified_gemms"]["count"] == 0
    file = tmp_path / "bi_ops" / "verified_gemms.json"
    file.parent.mkdir()
    records = {"good": {"verified": True, "differs_at": []}, "bad": {"verified": False, "differs_at": [8, 16]}}
    file.write_text(json.dumps(records | {"foreign": 1, "cut": {}}))
    found = json.loads(call(capsys, "doctor", "--json")[1])["verified_gemms"]
    assert found == {"file": str(file), "count": 1, "refused": {"bad": [8, 16]}, "superseded": None}
    out = call(capsys, "doctor")[1]
    assert "1 GEMMs verified bitwise, 1 refused" in out
    assert "bad: other bits at [8, 16]" in out
    for unreadable in ("[1]", "{", "null"):
        file.write_text(unreadable)
        assert json.loads(call(capsys, "doctor", "--json")[1])["verified_gemms"]["count"] == 0


def test_doctor_says_that_an_earlier_versions_record_is_not_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "earlier version" not in call(capsys, "doctor")[1]
    file = tmp_path / "bi_ops" / "certificates.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"good": {"holds": True}}))
    found = json.loads(call(capsys, "doctor", "--json")[1])["verified_gemms"]
    assert (found["count"], found["superseded"]) == (0, str(file))
    assert f"{file} is an earlier version's and is not read: bi_ops.warmup verifies" in call(capsys, "doctor")[1]


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_doctor_says_what_the_mode_does_not_cover_without_a_gpu():
    [item] = [item for item in cli.doctor.missing(None) if item["what"] == "GPU"]
    assert "the mode and convert cover reductions alone" in item["means"]
    assert "GPU" not in [item["what"] for item in cli.doctor.missing("an H100")]


def test_doctor_says_how_to_get_cublaslt(monkeypatch):
    assert "cuBLASLt" not in [item["what"] for item in cli.doctor.missing(None)]
    monkeypatch.setattr(arch, "current", lambda: arch.SM_90)
    absent = backends.Support(False, "no compiler")
    monkeypatch.setattr(type(matmul.backends.get("cublaslt")), "available", lambda self: absent)
    [item] = [item for item in cli.doctor.missing("an H100") if item["what"] == "cuBLASLt"]
    assert "Triton" in item["means"]
    assert "no compiler" in item["means"]
    assert "g++" in item["how"]


def test_doctor_says_why_flash_attn_does_not_serve_and_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(runtime, "INTERPRET", True)
    operators = {o["op"]: o for o in json.loads(call(capsys, "doctor", "--json")[1])["operators"]}
    reason = operators["attention"]["others"]["flash_attn"]
    assert "pip install --no-build-isolation 'bi-ops[flash-attn]'" in reason
    assert reason in call(capsys, "doctor")[1]  # brackets are no markup


@pytest.fixture
def checkpoint_folder(tmp_path):
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PARITY = ("--prompts", 3, "--new-tokens", 2, "--max-prompt-tokens", 5)


def test_parity_of_a_real_model_is_identical(capsys, checkpoint_folder, monkeypatch):
    honest = embedded.EmbeddedEngine.generate

    def chatty(self, prompts, params):
        print("a library that logs to stdout")
        return honest(self, prompts, params)

    monkeypatch.setattr(embedded.EmbeddedEngine, "generate", chatty)
    code, out, err = call(capsys, "parity", checkpoint_folder, *PARITY, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "a library that logs to stdout\n")
    assert [r["composition"] for r in rows] == ["alone", "together", "shuffled", "distractors", "draws"]
    assert {r["orders"] for r in rows} == {tiny_model(num_hidden_layers=1).orders().digest}
    assert all(r["engine"] == "embedded" and r["cuda_graphs"] is False and r["versions"] for r in rows)
    assert all(r["identical"] and r["tokens_checked"] == 6 and r["tokens_different"] == 0 for r in rows)


def test_parity_of_an_engine_that_filters_unasked_is_exit_code_1(capsys, checkpoint_folder, monkeypatch):
    """Its log-probabilities are those of the distribution that was asked for, bit for bit."""
    monkeypatch.setattr(embedded, "sample", lambda logits, *args: (-logits).argmax(-1))
    monkeypatch.setattr(embedded.EmbeddedEngine, "redraw", lambda self, logits, *args: logits.argmax(-1))
    code, out, err = call(capsys, "parity", checkpoint_folder, *PARITY)
    assert code == 1
    assert "OTHER TOKENS than their seeds draw" in out
    assert "bitwise identical" in out
    assert "draws: 6 tokens drawn again, 6 others; first: sequence 0, completion position 0: token" in err


def test_parity_of_an_engine_one_bit_off_is_exit_code_1(capsys, checkpoint_folder, monkeypatch):
    honest = embedded.EmbeddedEngine.generate

    def off(self, prompts, params):
        completions = honest(self, prompts, params)
        completions[1].logprobs.view(torch.int32)[1] ^= 1
        return completions

    monkeypatch.setattr(embedded.EmbeddedEngine, "generate", off)
    code, out, err = call(capsys, "parity", checkpoint_folder, *PARITY)
    assert code == 1
    assert "DIFFERENT" in out
    assert "together" in out
    assert "sequence 1, completion position 1" in err


def test_parity_says_null_where_a_delta_is_infinite(capsys, checkpoint_folder, monkeypatch):
    honest = embedded.EmbeddedEngine.generate

    def broken(self, prompts, params):
        completions = honest(self, prompts, params)
        completions[1].logprobs[1] = float("nan")
        return completions

    monkeypatch.setattr(embedded.EmbeddedEngine, "generate", broken)
    code, out, _ = call(capsys, "parity", checkpoint_folder, *PARITY, "--json")
    rows = json.loads(out, parse_constant=pytest.fail)
    assert code == 1
    scored = rows[:-1]  # the last says which tokens were drawn
    assert {(r["tokens_different"], r["max_delta"], r["mean_delta"]) for r in scored} == {(1, None, None)}
    assert all(r["first_difference"]["rollout"] is None for r in scored)


def test_parity_shows_its_progress_on_a_terminal_alone(capsys, checkpoint_folder, monkeypatch):
    argv = ("parity", checkpoint_folder, *PARITY)
    assert call(capsys, *argv)[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: stderr is a terminal
    code, out, err = call(capsys, *argv)
    assert (code, "distractors" in err, "15/15" in err) == (0, True, True)
    assert out.rstrip().endswith("bitwise identical")
    assert call(capsys, *argv, "--json")[2] == ""


class FakeVllm(embedded.EmbeddedEngine):
    """The embedded engine under vLLM's name and arguments; without the plugin one bit of every sequence is off."""

    name = "vllm"
    started: ClassVar[list] = []

    def __init__(self, path, *, plugin, attention, cuda_graphs):
        super().__init__(load_model(path))
        self.plugin, self.cuda_graphs = plugin, cuda_graphs
        self.orders = self.orders if plugin else None
        self.started.append((plugin, attention, cuda_graphs))

    def generate(self, prompts, params):
        completions = super().generate(prompts, params)
        for c in completions if not self.plugin else ():
            c.logprobs.view(torch.int32)[0] ^= 1
        return completions

    def describe(self):
        return super().describe() | {"plugin": self.plugin, "cuda_graphs": self.cuda_graphs}


@pytest.mark.parametrize(
    ("options", "plugin", "attention", "cuda_graphs"),
    [
        ((), True, None, True),
        (("--no-cuda-graphs",), True, None, False),
        (("--no-plugin",), False, None, True),
        (("--no-plugin", "--no-cuda-graphs"), False, None, False),
        (("--attention", "triton"), True, "triton", True),
        (("--attention", "vllm"), True, "vllm", True),
    ],
)
def test_parity_runs_vllm_each_way_it_can_run(
    options, plugin, attention, cuda_graphs, capsys, checkpoint_folder, monkeypatch
):
    monkeypatch.setattr("bi_ops.rollout.vllm_engine.VllmEngine", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [])
    code, out, _ = call(capsys, "parity", checkpoint_folder, *PARITY, "--engine", "vllm", *options, "--json")
    rows = json.loads(out)
    assert FakeVllm.started == [(plugin, attention, cuda_graphs)]
    assert code == (0 if plugin else 1)
    assert [r["composition"] for r in rows] == [*COMPOSITIONS, "draws"]
    assert {(r["engine"], r["plugin"], r["cuda_graphs"]) for r in rows} == {("vllm", plugin, cuda_graphs)}
    assert {r["tokens_different"] for r in rows[:-1]} == {0 if plugin else 3}
    assert rows[-1]["tokens_different"] == 0
    assert {r["orders"] is None for r in rows} == {not plugin}


def test_parity_scores_in_the_orders_that_sampled_or_not_at_all(capsys, checkpoint_folder, monkeypatch):
    assert call(capsys, "parity", checkpoint_folder, *PARITY, "--attention", "triton")[0] == 0
    honest = embedded.EmbeddedEngine.__init__

    def elsewhere(self, *args, **options):
        honest(self, *args, **options)
        self.orders = dataclasses.replace(self.orders, arch="sm_100")

    monkeypatch.setattr(embedded.EmbeddedEngine, "__init__", elsewhere)
    code, out, err = call(capsys, "parity", checkpoint_folder, *PARITY)
    assert (code, out) == (3, "")
    assert "and sm_100" in err


def test_orders_prints_a_record_and_compares_it(capsys, checkpoint_folder, tmp_path):
    record = load_model(checkpoint_folder).orders()
    code, out, _ = call(capsys, "orders", checkpoint_folder)
    assert code == 0
    assert f"digest        {record.digest}" in out
    assert f"attention     {record.orders['attention']['kind']}" in out
    code, out, _ = call(capsys, "orders", checkpoint_folder, "--json")
    assert json.loads(out, parse_constant=pytest.fail) == record.as_dict()
    other = dataclasses.replace(record, orders={**record.orders, "norm": {"kind": "RowOrder", "block": 512}})
    for name, values in (
        ("same", record.as_dict()),
        ("run", {"rollout": record.as_dict()}),
        ("other", other.as_dict()),
    ):
        (tmp_path / name).write_text(json.dumps(values))
    for name in ("same", "run"):
        assert call(capsys, "orders", checkpoint_folder, "--compare", tmp_path / name)[0] == 0
    code, _, err = call(capsys, "orders", checkpoint_folder, "--compare", tmp_path / "other")
    assert (code, "bi-ops orders: differs: norm: " in err, "'block': 512" in err) == (1, True, True)
    (tmp_path / "edited").write_text(json.dumps(record.as_dict() | {"arch": "sm_100"}))
    (tmp_path / "text").write_text("{")
    for name, message in (("edited", "it was edited"), ("text", "is not JSON"), ("nothing", "nothing")):
        code, _, err = call(capsys, "orders", checkpoint_folder, "--compare", tmp_path / name)
        assert (code, message in err) == (2, True)


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_orders_of_a_server_that_cannot_run_here_say_so(capsys, tmp_path):
    tiny_model(head_dim=128).save_pretrained(tmp_path)
    named = ("orders", tmp_path, "--engine", "vllm", "--attention", "vllm")
    code, out, err = call(capsys, *named)
    assert (code, out, "'vllm' cannot run here" in err) == (3, "", True)
    assert call(capsys, "orders", tmp_path, "--engine", "vllm")[0] == 0
    tiny_model(head_dim=64).save_pretrained(tmp_path)
    code, _, err = call(capsys, *named)
    assert (code, "attention='triton'" in err) == (2, True)


def test_a_model_that_nobody_knows_is_refused_by_name(capsys, checkpoint_folder):
    values = json.loads((checkpoint_folder / "config.json").read_text())
    (checkpoint_folder / "config.json").write_text(json.dumps(values | {"model_type": "gpt9"}))
    for command in (("parity", checkpoint_folder), ("orders", checkpoint_folder)):
        code, _, err = call(capsys, *command)
        assert code == 2
        assert "model_type is 'gpt9'; models that can be loaded: qwen3" in err


def test_parity_prompts_have_mixed_lengths_and_come_from_the_seed(capsys, checkpoint_folder):
    prompts = cli.parity.random_prompts(64, 40, 48, seed=0)
    assert len(prompts) == 64
    assert len({len(p) for p in prompts}) > 16
    assert prompts == cli.parity.random_prompts(64, 40, 48, seed=0) != cli.parity.random_prompts(64, 40, 48, seed=1)
    code, _, err = call(capsys, "parity", checkpoint_folder, "--new-tokens", 300)
    assert (code, "model's length is 256" in err) == (2, True)
