"""`bi-ops verify`: what it covers, that it finds what is broken, and what it prints and returns."""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

import bi_ops
from bi_ops import cli
from bi_ops.core import runtime
from bi_ops.core.provenance import versions
from bi_ops.verify import golden, packs, pool, report, suite, sweep
from bi_ops.verify.contract import PROPERTIES, SWEPT, Setting, _poison, not_here
from bi_ops.verify.controls import controls
from bi_ops.verify.integers import fingerprint
from bi_ops.verify.operators import NOT_SUBJECTS, SUBJECTS, starts
from bi_ops.verify.subject import Result, Subject, make_batch, results, select_items
from bi_ops.verify.values import KINDS, Make, Shape


def rows_by_count(x):
    """Another order of a row's sum for another number of rows."""
    return torch.stack([p.contiguous().sum(1) for p in x.tensor_split(1 + len(x) % 7, 1)]).sum(0)


def described(call, **more) -> Subject:
    sizes = {"cpu": ((300, 8),), "cuda": ((300, 8),)}
    options: dict[str, Any] = {"batch": {"x": 0}, "dtypes": (torch.float32,), "sizes": sizes, "compiled": False} | more
    return Subject(call.__name__, call, lambda m: {"x": m.x()}, **options)


BROKEN = described(rows_by_count)
DOUBLE = described(torch.square)
NO_SUBJECT = rows_by_count


# --------------------------------------------------------------------------------------------------------------
# what it covers


def test_every_public_function_is_a_subject_or_listed_with_a_reason():
    families = sorted(p.parent.name for p in Path(bi_ops.__file__).parent.glob("*/ops.py"))
    public = set()
    for family in families:
        package = importlib.import_module(f"bi_ops.{family}")
        public |= {f"{family}.{n}" for n in package.__all__ if callable(getattr(package, n)) and not n[0].isupper()}
    named = {s.name.partition(",")[0] for s in SUBJECTS}
    missing = {name for name in public if name.partition(".")[2] not in named}
    assert missing == set(NOT_SUBJECTS)


def test_every_property_has_a_negative_control():
    assert {c.property for c in controls()} == set(PROPERTIES)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_a_subject_is_what_its_description_says(subject, device):
    lengths = (3, 1, 2) if subject.sequences else (1,) * 6
    batch = make_batch(subject, lengths, (32, 8), subject.dtypes[0], device)
    part = select_items(subject, batch, range(2))
    for name, axis in subject.batch.items():
        assert part.inputs[name].shape[axis] == sum(lengths[:2])
    assert all(part.inputs[n] is t for n, t in batch.inputs.items() if n not in subject.batch)
    assert set(subject.buffers) <= set(batch.inputs) - set(subject.batch)


def test_values_are_what_their_names_say(device):
    made = {k: Make(Shape((64,), 32, 8), torch.float32, device, values=k).x() for k in KINDS}
    tiny = torch.finfo(torch.float32).tiny
    assert (made["denormal"].abs() < tiny).float().mean() > 0.9
    assert made["huge"].abs().max() > 1e37
    assert made["huge"].isfinite().all()
    assert made["cancelling"].sum(1).abs().max() < 1e-4
    assert ((made["negative zero"] == 0) & made["negative zero"].signbit()).any()
    assert made["mixed"].abs().max() / made["mixed"].abs().min() > 1e12
    assert not torch.equal(made["assorted"], made["normal"])


# --------------------------------------------------------------------------------------------------------------
# what it finds


def test_every_negative_control_is_found():
    unit = suite.Unit("controls", "", "quick", tuple(p for p in PROPERTIES if not not_here(p)))
    found = suite.run_unit(unit).controls
    assert {c.property for c in found} == set(unit.properties)
    assert [c for c in found if not c.caught] == []


@pytest.mark.parametrize("name", ["silu_and_mul", "sum, first axis"])
def test_an_operator_of_bi_ops_holds_and_its_controls_are_found(name):
    found = suite.verify([f"bi_ops:{name}"], jobs=1)
    assert found.failed == []
    assert found.missed == []
    assert {c.property for c in found.checks} >= {*SWEPT, "kernel config", "compile", "layout"}
    assert all(c.comparisons for c in found.checks)


def test_attention_decodes_and_pages_with_the_bits_of_prefill():
    names = ("prefill = decode", "paged = dense", "batch size")
    found = suite.verify(["bi_ops:flash_attention"], properties=names, jobs=1)
    assert found.failed == []
    assert {c.property for c in found.checks} == set(names)
    few = suite.verify(["bi_ops:flash_attention"], properties=("batch size",), jobs=1)  # three sequences
    assert few.failed == few.missed == []


def test_micro_batches_are_cut_and_compared():
    """As one, cut at every step, and in the middle."""
    level = dataclasses.replace(suite.levels()["quick"], items=40, setting=Setting(variants=2))
    found = suite.verify_subject(packs.find("bi_ops:embedding"), torch.float32, level, ("micro-batches",))
    assert found.failed == []
    assert [c.comparisons for c in found.checks] == [3]


def test_what_was_given_is_not_poisoned_between_replays(device):
    """A sum's gradient is its cotangent, expanded."""
    x, given = torch.ones(3, 4, device=device), torch.ones(3, 1, device=device)
    rows = torch.arange(3)
    found = {"out 0": Result(x + 1, 0, rows), "gradient of x": Result(given.expand(3, 4), 0, rows)}
    _poison(found, (x, given))
    assert found["out 0"].tensor.isnan().all()
    assert torch.equal(given, torch.ones_like(given))


def test_a_captured_call_finds_its_cu_seqlens_on_the_device(device):
    lengths = (3, 1, 2)
    assert starts(lengths, device) is starts(tuple(lengths), device)
    assert starts(lengths, device).tolist() == [0, 3, 4, 6]
    assert starts((3, 3), device).tolist() == [0, 3, 6]


def test_a_broken_operator_is_found_with_its_place():
    found = suite.verify_subject(BROKEN, torch.float32, suite.levels()["quick"], ("rerun", "batch size", "position"))
    bad = found.failed
    assert {c.property for c in bad} == {"batch size"}
    assert "out 0" in bad[0].message
    assert "at row" in bad[0].message


def test_a_drawn_batch_that_fails_is_shrunk(device):
    level = dataclasses.replace(suite.levels()["quick"], examples=20, items=40)
    ((name, count, message, _),) = sweep.run(BROKEN, torch.float32, (300, 8), ["batch size"], level, device)
    assert name == "batch size"
    assert count > 0, message
    assert message.startswith("2 rows")  # the least that has another batch
    ((_, count, message, _),) = sweep.run(DOUBLE, torch.float32, (300, 8), ["batch size"], level, device)
    assert (count > 0, message) == (True, "")


def test_an_operator_that_raises_is_a_failure():
    def refuses(x):
        if len(x) < 10:
            raise RuntimeError("no small batches")
        return x

    level = suite.levels()["quick"]
    level = dataclasses.replace(level, setting=Setting(sizes=(2,)))
    found = suite.verify_subject(described(refuses), torch.float32, level, ("rerun", "batch size"))
    assert {c.property: c.message for c in found.failed}["batch size"] == "raised RuntimeError: no small batches"


def test_results_of_one_value_show_nothing():
    level = suite.levels()["quick"]
    found = suite.verify_subject(described(torch.zeros_like), torch.float32, level, ("rerun",))
    assert "show nothing" in found.failed[0].message


def test_inputs_that_are_not_as_described_are_named(device):
    wrong = Subject("wrong", torch.square, lambda m: {"x": m.randn(3, 4)}, batch={"x": 0})
    with pytest.raises(ValueError, match=r"wrong: input x \[3, 4\] must have 5 rows on axis 0"):
        make_batch(wrong, (1,) * 5, (4, 4), torch.float32, device)


def test_a_rows_cotangent_goes_with_it(device):
    """Or gradients of a moved row would differ in every operator."""
    batch = make_batch(DOUBLE, (1,) * 8, (300, 8), torch.float32, device)
    whole, part = results(DOUBLE, batch), results(DOUBLE, select_items(DOUBLE, batch, [5, 2]))
    assert torch.equal(part["gradient of x"].tensor, whole["gradient of x"].tensor[[5, 2]])
    assert not torch.equal(part["gradient of x"].tensor, whole["gradient of x"].tensor[:2])


# --------------------------------------------------------------------------------------------------------------
# how the work is spread


def test_a_unit_is_one_dtype_and_size_and_the_longest_come_first():
    specs = ["bi_ops:sum", "bi_ops:flash_attention"]
    sizes = {s: packs.find(s).sizes[runtime.device_type()] for s in specs}
    full = suite.units(specs, "full", ("rerun",))
    assert full[0].spec == "bi_ops:flash_attention"
    assert {(u.spec, u.size) for u in full} == {("controls", (0, 0)), *((s, z) for s in specs for z in sizes[s])}
    quick, with_digests = suite.units(specs, "quick", ("rerun",)), suite.units(specs, "quick", ("rerun",), "all")
    assert len(quick) == 3
    assert len(with_digests) == len(full)
    assert sum(bool(u.properties) for u in with_digests) == 3
    assert len(suite.units(specs, "quick", ("rerun",), "checked")) == 3


def test_what_there_is_no_time_for_is_said():
    found = suite.verify(["bi_ops:sum"], properties=("rerun",), jobs=1, seconds=0.0)
    assert found.checks == []
    assert any(name.startswith("bi_ops:sum") for name in found.not_run)


def test_a_process_that_dies_is_a_failed_check(monkeypatch):
    died = lambda run, work, jobs, until: ((unit, RuntimeError("gone")) for unit in work)  # noqa: E731
    monkeypatch.setattr(suite.pool, "outcomes", died)
    found = suite.verify(["bi_ops:sum"], properties=("rerun",))
    assert "raised RuntimeError: gone" in {c.message for c in found.failed}


def doubled(n: int) -> int:
    if n == 0:
        os._exit(1)
    return 2 * n


trap: list[int] = []


def doubled_once(n: int) -> int:
    """What comes after 0 in its process dies."""
    if trap:
        os._exit(1)
    trap.extend([n] if n == 0 else [])
    return 2 * n


@pytest.fixture
def forks(monkeypatch):
    """Processes of a pool, which import nothing."""
    forks = multiprocessing.get_context("fork")
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda method: forks)


@pytest.mark.parametrize("work", [[0, 1, 2], [1, 2, 3, 4, 0], [3, 0, 4, 1, 2]])
def test_what_ran_beside_a_process_that_dies_runs_again(work, forks):
    found = dict(pool.outcomes(doubled, work, jobs=2))
    assert isinstance(found.pop(0), BrokenProcessPool)
    assert found == {n: 2 * n for n in work if n}


def test_nobody_is_blamed_for_what_ran_before_in_its_process(forks):
    assert dict(pool.outcomes(doubled_once, [0, 1, 2, 3], jobs=2)) == {0: 0, 1: 2, 2: 4, 3: 6}


def test_after_an_error_of_its_gpu_a_process_finds_nothing_more(monkeypatch):
    class Lost(RuntimeError):
        pass

    def illegal(x):
        if len(x) < 37:  # a batch of another size
            raise Lost("an illegal instruction")
        return x.cumsum(-1)

    monkeypatch.setattr(torch, "AcceleratorError", Lost, raising=False)
    monkeypatch.setattr(suite, "_lost", [])
    broken = dataclasses.replace(packs.find("bi_ops:softmax"), name="broken", call=illegal)
    monkeypatch.setattr(packs, "find", lambda spec: broken)
    unit = next(u for u in suite.units(["broken"], "quick", ("batch size", "rerun")) if u.spec == "broken")
    report = suite.run_unit(unit)
    assert [(c.property, c.message) for c in report.checks] == [("batch size", "raised Lost: an illegal instruction")]
    with pytest.raises(Lost):
        suite.run_unit(unit)


def test_processes_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    started = multiprocessing.get_context("spawn").Value("i", 0)
    threads = torch.get_num_threads()
    try:
        taken = []
        for _ in range(3):
            pool._start(started, ["4", "7"])
            taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    finally:
        torch.set_num_threads(threads)
    assert taken == ["4", "7", "4"]


# --------------------------------------------------------------------------------------------------------------
# the command


def call(capsys, *argv):
    code: Any
    try:
        code = cli.main(["verify", "--jobs", "1", *argv])
    except SystemExit as e:
        code = e.code
    return (code, *capsys.readouterr())


def test_a_report_is_data_and_a_page_that_needs_nothing_else(capsys, tmp_path):
    page, file = tmp_path / "report.html", tmp_path / "verify.json"
    code, out, _ = call(
        *(capsys, "--op", "sum", "--property", "batch size", "--json", "--html", str(page), "--output", str(file))
    )
    data = json.loads(out)
    assert code == 0
    assert json.loads(file.read_text()) == data
    assert data["failed"] == 0 < data["checks"]
    assert data["controls"] == data["controls_caught"] > 0
    assert data["versions"]["torch"]
    text = page.read_text()
    assert "<svg" in text
    assert "batch size" in text
    assert not any(word in text for word in ("<script", "src=", "href="))


def test_a_failed_check_is_1_and_says_where(capsys):
    code, out, err = call(capsys, "--op", "test_verify_suite:BROKEN", "--property", "batch size")
    assert code == 1
    assert "DIFFERENT" in out
    assert "rows_by_count, batch size, float32" in err
    assert "first at row" in err


def test_a_control_that_is_not_found_is_4_whatever_else(capsys, monkeypatch):
    """Negative control of the controls: properties that compare a result with itself."""
    monkeypatch.setitem(PROPERTIES, "batch size", PROPERTIES["rerun"])
    code, out, err = call(capsys, "--op", "test_verify_suite:BROKEN", "--property", "batch size")
    assert code == 4
    assert "THE SUITE IS BROKEN" in out
    assert "control not found" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--op", "nothing"), "no subject 'nothing'"),
        (("--op", "no_such_module:OP"), "cannot import no_such_module"),
        (("--op", "test_verify_suite:NO_SUBJECT"), "no description"),
        (("--property", "speed"), "unknown properties"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--level", "endless"), "invalid choice"),
        (("--op", "sum", "--property", "backend"), "nothing was checked"),
    ],
)
def test_bad_usage_is_2(capsys, argv, message):
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert message in err


def test_the_list_runs_nothing(capsys):
    code, out, _ = call(capsys, "--list")
    assert code == 0
    assert "bi_ops:flash_attention, window" in out
    assert "prefill = decode" in out


def test_names_are_escaped_in_a_page():
    check = suite.Check("<b>", "rerun", "float32", (1, 1), "normal", 1, "a < b", 0.0)
    text = report.to_html(suite.Report("quick", [check]))
    assert "<b>" not in text.replace("<b>DIFFERENT", "")
    assert "a &lt; b" in text


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU runs them all")
def test_what_needs_a_gpu_is_said():
    found = suite.verify(["bi_ops:sum"], properties=("stream", "rerun"), jobs=1)
    assert found.not_run == {"stream": "needs a CUDA GPU"}


def test_torchs_sums_over_rows_depend_on_the_batch_and_its_softmax_does_not():
    found = suite.verify(["torch:softmax", "torch:linear"], properties=("batch size",), jobs=1)
    assert found.missed == []
    assert "softmax" not in {c.subject for c in found.failed}


@pytest.mark.parametrize("pack", ["vllm", "flash-attn", "liger"])
def test_a_library_that_is_not_here_is_named(capsys, pack):
    if runtime.INTERPRET:
        code, _, err = call(capsys, "--subject", pack)
        assert code == 2
        assert "GPU" in err


@pytest.mark.gpu
@pytest.mark.vllm
def test_stock_vllms_defects_are_found_by_themselves():
    """0.26: fused_add_rms_norm at 256 tokens; FlashAttention 3 where head_dim is 64 or 96, decoding."""
    names = ("fused_add_rms_norm", "FlashAttention 3", "rms_norm_batch_invariant")
    found = suite.verify([f"vllm:{n}" for n in names], "full", ("batch size", "prefill = decode"), jobs=3)
    assert found.missed == []
    failed = {(c.subject, c.property, c.size[0]) for c in found.failed}
    release = packs.find("vllm:FlashAttention 3") and versions()["vllm"]
    if str(release).startswith("0.26"):
        assert ("fused_add_rms_norm", "batch size", 4096) in failed
    assert {size for s, p, size in failed if (s, p) == ("FlashAttention 3", "prefill = decode")} == {64, 96}
    assert not any(s == "rms_norm_batch_invariant" for s, _, _ in failed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(packs.subjects("bi_ops")))
def test_an_operator_holds_on_a_gpu(name):
    found = suite.verify([f"bi_ops:{name}"], jobs=1)
    assert found.failed == []
    assert found.missed == []


# --------------------------------------------------------------------------------------------------------------
# digests


def test_a_record_is_compared_and_a_changed_bit_is_named(capsys, tmp_path, monkeypatch):
    file = tmp_path / "here.json"
    options = ("--op", "silu_and_mul", "--property", "rerun")
    assert call(capsys, *options, "--record", str(file))[0] == 0
    record = json.loads(file.read_text())
    sizes = SILU.sizes[runtime.device_type()]
    assert len(record["digests"]) == 2 * len(SILU.dtypes) * len(sizes)  # an output, and a gradient
    code, out, _ = call(capsys, *options, "--compare", str(file))
    assert code == 0
    assert "digests: 0 differences" in out
    name = next(iter(record["digests"]))
    changed = record | {"digests": record["digests"] | {name: "0" * 16}, "versions": {"torch": "1.0", "triton": "3"}}
    file.write_text(json.dumps(changed))
    code, _, err = call(capsys, *options, "--compare", str(file))
    assert code == 1
    assert f"bits of {name}" in err
    assert "and 1.0" in err  # torch


SILU = packs.find("bi_ops:silu_and_mul")


def test_a_table_that_bi_ops_carries_is_found_by_architecture_and_releases(tmp_path):
    here = versions()
    name = f"{runtime.architecture()}-{str(here['torch']).split('+')[0]}-{here['triton']}.json"
    assert golden.committed(tmp_path) is None
    (tmp_path / name).write_text("{}")
    assert golden.committed(tmp_path) == tmp_path / name


def test_a_run_is_compared_with_what_the_carried_table_has_of_it(capsys, tmp_path, monkeypatch):
    table = golden.path(tmp_path)
    monkeypatch.setattr(golden, "committed", lambda: table if table.exists() else None)
    options = ("--op", "sum", "--property", "rerun")
    assert call(capsys, *options, "--record", str(table))[0] == 0
    assert call(capsys, *options)[0] == 0
    record = json.loads(table.read_text())
    changed = dict.fromkeys(record["digests"], "0" * 16)
    table.write_text(json.dumps(record | {"digests": changed}))
    code, _, err = call(capsys, *options)
    assert code == 1
    assert 0 < err.count("bits of") < len(changed)  # of the dtype and size that were checked
    table.write_text(json.dumps(record | {"digests": {"another": "0" * 16}}))
    assert call(capsys, *options)[0] == 0


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}"])
def test_what_is_no_record_is_bad_input(capsys, tmp_path, text):
    (tmp_path / "file").write_text(text)
    code, _, err = call(capsys, "--op", "sum", "--compare", str(tmp_path / "file"))
    assert code == 2
    assert "verify:" in err


def test_a_fingerprint_sees_each_bit_and_its_place(device):
    t = torch.arange(8.0, device=device)
    assert fingerprint(t) == fingerprint(t.clone())
    assert len({fingerprint(x) for x in (t, t.flip(0), -t, t * 1.0000001)}) == 4
