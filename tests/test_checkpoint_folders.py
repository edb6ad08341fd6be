"""Whatever a folder held, what was saved last is what loads, or the call refuses; an interrupted save mixes nothing."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import json
import os
import pathlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from bi_ops.models.qwen3 import Qwen3ForCausalLM
from bi_ops.rl import checkpoint

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def model(value: float, **changes) -> Qwen3ForCausalLM:
    made = tiny_model(num_hidden_layers=1, **changes)
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(value)
    return made


def value_of(folder) -> float:
    """The value that fills the checkpoint in `folder`; all tensors must have the same."""
    values = {float(v) for p in Qwen3ForCausalLM.from_pretrained(folder).parameters() for v in p.detach().unique()}
    assert len(values) == 1, values
    return values.pop()


def shard(folder, names=SHARDS) -> None:
    """Cut the one file of `folder` into shards."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {n: names[i % len(names)] for i, n in enumerate(sorted(tensors))}
    for name in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == name}, folder / name)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def one_file(folder) -> None:
    """As it was saved."""


def no_index(folder) -> None:
    """Shards without their index, as after a copy that stopped."""
    shard(folder)
    (folder / INDEX).unlink()


def lost_shard(folder) -> None:
    shard(folder)
    (folder / SHARDS[0]).unlink()


def own_names(folder) -> None:
    shard(folder, ("a.safetensors", "b.safetensors"))


def damaged_index(folder) -> None:
    shard(folder)
    (folder / INDEX).write_text("{")


def one_file_beside_shards(folder) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(whole)


def partial_file(folder) -> None:
    """What a killed process leaves."""
    (folder / ".model.safetensors.1.partial").write_bytes(b"half")


LEFTOVERS = (one_file, shard, no_index, lost_shard, own_names, damaged_index, one_file_beside_shards, partial_file)


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_what_was_saved_last_is_what_every_reader_finds(tmp_path, leftover):
    model(1.0).save_pretrained(tmp_path)
    leftover(tmp_path)
    model(2.0).save_pretrained(tmp_path)
    assert value_of(tmp_path) == 2.0
    assert not (tmp_path / INDEX).exists()
    for file in tmp_path.glob("*.safetensors"):  # as vLLM reads a folder
        assert all(bool((t == 2.0).all()) for t in load_file(file).values()), file
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert all(bool((p == 2.0).all()) for p in theirs.parameters())


def test_a_loaded_sharded_checkpoint_is_saved_over_itself(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    shard(tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in loaded.parameters():
            p.fill_(3.0)
    loaded.save_pretrained(tmp_path)
    assert value_of(tmp_path) == 3.0


def test_two_checkpoints_in_one_folder_are_refused(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    one_file_beside_shards(tmp_path)
    with pytest.raises(ValueError, match=r"two checkpoints\. Delete the one that is not wanted"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / INDEX).unlink()
    assert value_of(tmp_path) == 1.0


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    shard(tmp_path)
    first = load_file(tmp_path / SHARDS[0])
    save_file(load_file(tmp_path / SHARDS[1]) | {"model.norm.weight": torch.zeros(32)}, tmp_path / SHARDS[1])
    save_file(first | {"model.norm.weight": torch.ones(32)}, tmp_path / SHARDS[0])
    with pytest.raises(ValueError, match=r"twice: model\.norm\.weight"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)


def test_a_file_that_a_reader_would_mix_in_stops_the_save(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    (tmp_path / "best.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    save_file({"adapter.weight": torch.ones(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"best\.safetensors holds .*move it elsewhere, or save into another folder"):
        model(2.0).save_pretrained(tmp_path)
    assert value_of(tmp_path) == 1.0
    (tmp_path / "best.safetensors").unlink()
    model(2.0).save_pretrained(tmp_path)
    assert (value_of(tmp_path), (tmp_path / "adapter.safetensors").exists()) == (2.0, True)


def test_an_index_reads_and_deletes_nothing_outside_its_folder(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "x.safetensors"
    model(1.0).save_pretrained(inside)
    outside.write_bytes((inside / "model.safetensors").read_bytes())
    (inside / "model.safetensors").unlink()
    names = load_file(outside)
    (inside / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../x.safetensors")}))
    with pytest.raises(ValueError, match="files outside its folder"):
        Qwen3ForCausalLM.from_pretrained(inside)
    model(2.0).save_pretrained(inside)
    assert outside.exists()
    assert value_of(inside) == 2.0


def test_a_checkpoint_without_the_prefix_is_one_line(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    bare = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no prefix `model\.`.*AutoModelForCausalLM") as error:
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "whole")  # the way out
    assert value_of(tmp_path / "whole") == 1.0


def test_a_long_list_of_tensors_is_cut(tmp_path):
    model(1.0).save_pretrained(tmp_path)
    extra = {f"extra.{i}": torch.zeros(1) for i in range(500)}
    save_file(load_file(tmp_path / "model.safetensors") | extra, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="and 480 more") as error:
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert len(str(error.value)) < 2000


class Crash(Exception):
    pass


@pytest.fixture
def crash_at(monkeypatch):
    """Let the n-th change of the disk, counted from 0, and all after it raise; returns how many there were before."""
    calls: list[str] = []

    def arm(n: int) -> list[str]:
        calls.clear()
        for where, name in ((os, "replace"), (os, "fsync"), (pathlib.Path, "unlink")):
            real = getattr(where, name)

            def counted(*args, real=real, name=name, **kwargs):
                if len(calls) >= n and not (name == "unlink" and str(args[0]).endswith(".partial")):
                    raise Crash(name)
                calls.append(name)
                return real(*args, **kwargs)

            monkeypatch.setattr(where, name, counted)
        return calls

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("leftover", [one_file, shard])
@pytest.mark.parametrize("change", [{}, {"rope_theta": 5.0}], ids=["same-config", "other-config"])
def test_an_interrupted_save_leaves_the_old_the_new_or_no_checkpoint(tmp_path, crash_at, monkeypatch, leftover, change):
    outcomes = []
    for n in range(30):
        folder = tmp_path / str(n)
        model(1.0).save_pretrained(folder)
        leftover(folder)
        new = model(2.0)
        new.config = replace(new.config, **change)
        crash_at(n)
        try:
            new.save_pretrained(folder)
            finished = True
        except Crash:
            finished = False
        monkeypatch.undo()
        try:
            loaded = Qwen3ForCausalLM.from_pretrained(folder)
            found = value_of(folder), loaded.config.rope_theta
        except FileNotFoundError:
            found = None
        old, fresh = (1.0, 1e6), (2.0, change.get("rope_theta", 1e6))
        assert found in (None, old, fresh), found
        outcomes.append(found)
        model(4.0).save_pretrained(folder)  # nothing that is left stops the next save
        assert value_of(folder) == 4.0
        if finished:
            assert found == fresh
            break
    else:
        pytest.fail("the save never finished")
    assert outcomes[0] == old
    if leftover is one_file and not change:
        assert None not in outcomes, "one rename is all that is needed"


def stepped(value: float) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    net = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.fill_(value)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    net.weight.sum().backward()
    optimizer.step()
    return net, optimizer


def save_step(folder, value: float) -> pathlib.Path:
    net, optimizer = stepped(value)
    return checkpoint.save(folder, 1, net, optimizer, {})


def test_saving_a_step_again_leaves_one_of_the_two_whatever_happens(tmp_path, crash_at, monkeypatch):
    outcomes = []
    for n in range(30):
        folder = tmp_path / str(n)
        save_step(folder, 1.0)
        crash_at(n)
        try:
            save_step(folder, 2.0)
            finished = True
        except Crash:
            finished = False
        monkeypatch.undo()
        net, optimizer = stepped(0.0)
        latest = checkpoint.latest(folder)
        assert latest is not None
        checkpoint.load(latest, net, optimizer)
        outcomes.append(net.weight[0, 0].item())
        assert bool((net.weight == outcomes[-1]).all())
        save_step(folder, 3.0)
        assert {p.name for p in folder.iterdir()} == {"step_000001", "latest"}
        if finished:
            break
    else:
        pytest.fail("the save never finished")
    assert outcomes[0] == 1.0
    assert outcomes[-1] == 2.0
    assert set(outcomes) == {1.0, 2.0}


def test_moments_of_before_do_not_outlive_a_load(tmp_path):
    net = torch.nn.Linear(2, 2, bias=False)
    path = checkpoint.save(tmp_path, 1, net, torch.optim.AdamW(net.parameters()), {})  # no step taken: no moments
    other, optimizer = stepped(1.0)
    checkpoint.load(path, other, optimizer)
    assert not optimizer.state.get(other.weight)


def test_a_dtype_that_would_be_rounded_is_refused(tmp_path):
    net, optimizer = stepped(1.0)
    path = checkpoint.save(tmp_path, 1, net, optimizer, {})
    half = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight is torch.float32, the model has torch.bfloat16"):
        checkpoint.load(path, half, torch.optim.AdamW(half.parameters()))


@pytest.mark.parametrize(
    ("name", "text"), [("state.json", "{"), ("state.json", "[1]"), ("optimizer.safetensors", None)]
)
def test_a_damaged_part_is_named_and_changes_nothing(tmp_path, name, text):
    path = save_step(tmp_path, 1.0)
    (path / name).unlink() if text is None else (path / name).write_text(text)
    net, optimizer = stepped(5.0)
    with pytest.raises(ValueError, match=rf"step_000001/{name} cannot be read .*earlier checkpoint into .*/latest"):
        checkpoint.load(path, net, optimizer)
    assert bool((net.weight == 5.0).all())
