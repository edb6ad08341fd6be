"""Shards of weights, gradients and optimizer states end in the bytes of one process; on ranks that talk over gloo."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stack_fakes import STACK, StackModel
from sweeps import sweep
from test_microbatches import Lengths, Replay, small_model
from test_parallel import equal, metrics
from tiny import tiny_moe_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from library_sums import LibrarySums

from bi_ops import nn, optim, parallel, rl
from bi_ops.core import rounding, tensor_files
from bi_ops.parallel import fsdp
from bi_ops.parallel.fsdp import FullySharded
from bi_ops.parallel.gradients import Collectives
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.trainer import Trainer


def weights_of(layout: parallel.Whole | FullySharded) -> list[torch.Tensor]:
    """All rows of every master, on every rank."""
    named = layout.model.named_parameters()
    if isinstance(layout, FullySharded):
        return [layout.whole_weight(name) for name, _ in named]
    return [p.detach().clone() for _, p in named]


def gradients_of(layout: parallel.Whole | FullySharded) -> list[torch.Tensor]:
    """All rows of every gradient, on every rank."""
    if isinstance(layout, FullySharded):
        return [layout.whole_gradient(name) for name in layout.parameters]
    return [cast(torch.Tensor, p.grad).clone() for p in layout.parameters.values()]


# --------------------------------------------------------------------------------------------------------------
# a few layers: order, shards, what is refused


#: Micro-batches of each of eight atoms: none, one, or several.
MICROBATCHES = (1, 2, 0, 1, 1, 3, 1, 0)


def backward(model: StackModel, i: int, j: int, scale: float = 1.0) -> None:
    """That of micro-batch j of atom i; with scale 0 it adds zeros."""
    generator = torch.Generator().manual_seed(10 * i + j)
    ids = torch.randint(0, 11, (16,), generator=generator).to(model.embed.weight.device)
    wanted = torch.randn(16, 11, generator=generator).to(ids.device)
    (model.head(0.25 * model(ids)).float() * (scale * wanted)).sum().backward()


def update(layout: parallel.Whole | FullySharded, optimizer: torch.optim.Optimizer, idle: bool) -> torch.Tensor:
    """A step over the atoms; `idle`: every rank makes as many passes."""
    here, model = layout.ranks, cast(StackModel, layout.model)
    for step in range(layout.steps):
        atoms = range(step * here.size, (step + 1) * here.size)
        mine, most = atoms[here.rank], max(MICROBATCHES[i] for i in atoms) or 1
        passes = [(mine, j, 1.0) for j in range(MICROBATCHES[mine])]
        if idle:
            passes = [(0, 0, 0.0)] * (most - len(passes)) + passes
        layout.begin_atom()
        for n, args in enumerate(passes, 1):
            layout.before_backward(last=n == len(passes))
            backward(model, *args)
        layout.end_atom()
    norm = layout.finish()
    cast(Any, optimizer).step(grad_scale=optim.clip_scale(norm, 1.0))
    return norm


def two_updates(layout: parallel.Whole | FullySharded) -> dict[str, Any]:
    optimizer = optim.AdamW(list(layout.parameters.values()), lr=0.1)
    norms = [update(layout, optimizer, isinstance(layout, FullySharded)) for _ in range(2)]
    found: dict[str, Any] = {
        "norms": norms,
        "grads": gradients_of(layout),
        "weights": weights_of(layout),
    }
    if isinstance(layout, FullySharded):
        with layout.gathered():
            found["gathered"] = [p.detach().clone() for p in layout.model.parameters()]
        found["rows"] = {n: list(p.shape) for n, p in layout.parameters.items()}
        found["state"] = [list(optimizer.state[p]["exp_avg"].shape) for p in layout.parameters.values()]
    return found


class Accumulating(FullySharded):
    """The control, with the gradients of a rank's atoms added one after the other, as torch accumulates them."""

    def __init__(self, model: torch.nn.Module, atoms: int, here: parallel.Ranks) -> None:
        super().__init__(model, parallel.order(here.size), here, exchange=lambda: LibrarySums(here))
        self.steps, self.begun = atoms // here.size, 0

    def begin_atom(self) -> None:
        self.begun += 1
        if self.begun == 1:
            super().begin_atom()

    def before_backward(self, last: bool) -> None:
        super().before_backward(last and self.begun == self.steps)


class Counted(Collectives):
    """gathers: how many FSDP modules' weights were gathered."""

    gathers = 0

    def gather(self, outs: Any, shards: Any) -> None:
        self.gathers += 1
        super().gather(outs, shards)


def layers_on_a_rank() -> dict[str, Any]:
    here, tree = parallel.Ranks.of(), parallel.order(8)
    found = two_updates(FullySharded(StackModel(), tree, here))
    with mock.patch.object(fsdp, "GATHERED_LAYERS", 1):
        found["apart"] = two_updates(FullySharded(StackModel(), tree, here))
    for reshards in (True, False):
        exchanges = [Counted(here) for _ in range(2)]
        kept = FullySharded(StackModel(), tree, here, exchange=iter(exchanges).__next__, reshard_after_forward=reshards)
        found["kept" if not reshards else "freed"] = two_updates(kept)
        found["gathers" if not reshards else "gathers of freed"] = exchanges[1].gathers
    model = StackModel()
    library = Accumulating(model, 8, here)
    update(library, optim.AdamW(list(library.parameters.values())), idle=True)
    found["library"] = gradients_of(library)
    return found


@sweep("size", (2, 4), (2,))
def test_shards_have_the_bits_of_one_process(size):
    ranks.need_gpus(size)
    found = ranks.run(size, layers_on_a_rank)
    one = two_updates(parallel.Whole(StackModel(), parallel.order(8)))
    first = parallel.Whole(StackModel(), parallel.order(8))
    update(first, optim.AdamW(list(first.parameters.values())), idle=False)
    for rank, result in enumerate(found):
        for what in ("norms", "grads", "weights"):
            assert equal(result[what], one[what]), what
            assert equal(result["apart"][what], one[what]), what  # each layer by itself
            assert equal(result["kept"][what], one[what]), what
            assert equal(result["freed"][what], one[what]), what
        # Both layers together, and the rest: once in each of two updates, and for `gathered`.
        assert result["gathers"] == 2 * (2 + 1)
        passes = sum(max(1, *MICROBATCHES[i : i + size]) for i in range(0, 8, size))
        assert result["gathers of freed"] == 2 * passes * (2 + 1) + 2
        rounded = [w.bfloat16() for w in one["weights"]]
        for how in ("gathered", "kept", "freed"):
            gathered = result["gathered"] if how == "gathered" else result[how]["gathered"]
            assert all(torch.equal(a, b) for a, b in zip(gathered, rounded, strict=True)), how
        assert result["rows"]["embed.weight"] == [{2: (6, 5), 4: (3, 3, 3, 2)}[size][rank], 16]
        assert result["rows"]["layers.0.weight"] == [16 // size, 16]
        assert result["state"] == list(result["rows"].values())
        # The control: a library sums.
        assert not equal(result["library"], [cast(torch.Tensor, p.grad) for p in first.parameters.values()])


@torch.no_grad()
def write(masters: Iterable[torch.Tensor], factor: float) -> None:
    """As a checkpoint does."""
    for p in masters:
        p.mul_(factor)


def rounded_on_a_rank() -> None:
    """Who writes masters, and who rounds them: an optimizer that is given the copies, else the next forward."""
    here = parallel.Ranks.of()
    for given in (True, False):
        layout = FullySharded(StackModel(), parallel.order(8), here)
        copies = layout.keep_rounded_weights(torch.bfloat16)
        assert set(copies) == set(layout.parameters.values())
        optimizer = optim.AdamW(list(layout.parameters.values()), lr=0.1, bf16_copies=copies if given else {})
        update(layout, optimizer, idle=True)
        agree = [torch.equal(p.bfloat16(), copy) for p, copy in copies.items() if p.numel()]
        assert agree == [given] * len(agree)
        assert layout.keep_rounded_weights(torch.float16) == {}
        ids = torch.arange(11, device=layout.parameters["embed.weight"].device)

        with mock.patch.object(rounding, "refresh", wraps=rounding.refresh) as rounds:
            write(copies, 1.5)
            cast(StackModel, layout.model)(ids)
            assert rounds.call_count == len(copies)
            assert all(torch.equal(p.bfloat16(), copy) for p, copy in copies.items())
            cast(StackModel, layout.model)(ids)
            assert rounds.call_count == len(copies)  # nothing was written
            layout.begin_atom()
            write(copies, 0.75)
            cast(StackModel, layout.model)(ids)  # in a step too: it may have begun behind one that failed
            assert all(torch.equal(p.bfloat16(), copy) for p, copy in copies.items())


def a_forward_too_many_on_a_rank() -> None:
    layout = FullySharded(StackModel(), parallel.order(2), parallel.Ranks.of())
    layout.begin_atom()
    layout.before_backward(last=True)
    backward(cast(StackModel, layout.model), 0, 0)
    with pytest.raises(RuntimeError, match=r"parallel: a \w+ has handed its sums over, and a forward came after"):
        backward(cast(StackModel, layout.model), 0, 1)


def test_a_forward_behind_the_last_backward_is_refused():
    ranks.need_gpus(2)
    ranks.run(2, a_forward_too_many_on_a_rank)


#: What is frozen: then the layers behind it get an input without a gradient.
FROZEN: list[list[str]] = [["embed"], ["embed", "layers.0"], ["layers.0", "head"], ["layers"]]


def frozen(names: list[str]) -> StackModel:
    model = StackModel()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def frozen_on_a_rank() -> list[dict[str, Any]]:
    return [two_updates(FullySharded(frozen(names), parallel.order(8), parallel.Ranks.of())) for names in FROZEN]


def test_what_is_frozen_is_not_waited_for():
    ranks.need_gpus(2)
    for found in ranks.run(2, frozen_on_a_rank):
        for names, result in zip(FROZEN, found, strict=True):
            one = two_updates(parallel.Whole(frozen(names), parallel.order(8)))
            for what in ("norms", "grads", "weights"):
                assert equal(result[what], one[what]), (names, what)


def test_masters_are_rounded_by_the_optimizer_or_before_the_next_forward():
    ranks.need_gpus(2)
    ranks.run(2, rounded_on_a_rank)


def test_small_layers_are_gathered_together():
    def sizes(hidden: int, n: int) -> list[int]:
        layers = [torch.nn.Linear(hidden, hidden, bias=False, device="meta") for _ in range(n)]
        return [len(each) for each in fsdp.together(layers)]

    assert sizes(16, 9) == [4, 4, 1]
    assert sizes(10_000, 5) == [2, 2, 1]  # of 100 million
    assert sizes(13_000, 3) == [1, 1, 1]
    assert sizes(40_000, 2) == [1, 1]
    assert fsdp.together([]) == []


class Listed(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(nn.Linear(16, 16, bias=False, device=device) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[1](self.parts[0](0.25 * x))


class Twice(StackModel):
    """Layers, a list inside of each, that are called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Listed(self.embed.weight.device) for _ in range(2))
        self.init_weights(0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids, torch.bfloat16)
        for layer in [*self.layers, *self.layers]:
            x = x + 0.25 * layer(x)
        return x


def lists_on_a_rank() -> list[dict[str, Any]]:
    here, tree = parallel.Ranks.of(), parallel.order(8)
    return [
        two_updates(FullySharded(Twice(), tree, here, reshard_after_forward=reshards)) for reshards in (True, False)
    ]


def test_a_layer_may_be_called_again_and_have_lists_of_its_own():
    ranks.need_gpus(2)
    one = two_updates(parallel.Whole(Twice(), parallel.order(8)))
    for found in ranks.run(2, lists_on_a_rank):
        for each in found:
            for what in ("norms", "grads", "weights"):
                assert equal(each[what], one[what]), what


def read_again_on_a_rank() -> None:
    """Forwards outside of a step, and behind a step that was given up."""
    for reshards in (True, False):
        layout = FullySharded(StackModel(), parallel.order(2), parallel.Ranks.of(), reshard_after_forward=reshards)
        ids = torch.arange(11, device=layout.parameters["embed.weight"].device)

        def output(layout: FullySharded = layout, ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return cast(StackModel, layout.model)(ids)

        optimizer = optim.AdamW(
            list(layout.parameters.values()), lr=0.1, bf16_copies=layout.keep_rounded_weights(torch.bfloat16)
        )
        update(layout, optimizer, idle=True)
        seen = [output()]
        optimizer.step()
        seen.append(output())
        write(layout.parameters.values(), 1.5)
        seen.append(output())
        layout.begin_atom()
        seen.append(output())
        write(layout.parameters.values(), 1.5)  # the step is given up
        layout.begin_atom()
        seen.append(output())
        layout._reshard()
        assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False, False, True, False]
        assert torch.equal(output(), seen[-1])


def test_what_was_gathered_of_earlier_values_is_not_read_again():
    ranks.need_gpus(2)
    ranks.run(2, read_again_on_a_rank)


def refusals_on_a_rank() -> list[str]:
    here, said = parallel.Ranks.of(), []
    with_bias = torch.nn.ModuleDict({"a": nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    sharing = StackModel()
    cast(Any, sharing.layers[1]).weight = sharing.layers[0].weight
    of_two = FullySharded(Two(), parallel.order(2), here)
    of_two.begin_atom()
    for make in (
        lambda: FullySharded(StackModel(), parallel.order(1), here),
        lambda: FullySharded(with_bias, parallel.order(2), here),
        lambda: FullySharded(sharing, parallel.order(2), here),
        lambda: of_two.model(torch.arange(11, device=of_two.parameters["embed.weight"].device)),
    ):
        with pytest.raises((TypeError, ValueError), match=r"fsdp|parallel") as error:
            make()
        said.append(str(error.value))
    return said


class Two(StackModel):
    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(ids), ids


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="fsdp: one rank has nothing to share; start several with torchrun"):
        FullySharded(StackModel(), parallel.order(2), parallel.ALONE)
    ranks.need_gpus(2)
    for said in ranks.run(2, refusals_on_a_rank):
        assert said[0].startswith("parallel: 2 ranks cannot share atoms=1 evenly")
        assert said[1].startswith("fsdp: a.bias, b.weight, b.bias would be summed by autograd")
        assert said[2].startswith("fsdp: layers.0.weight would be summed by several layers")
        assert "returns a tuple; its gradients are exchanged behind one tensor" in said[3]
    for other in ({"step_graphs": True}, {"offload": "masters"}):
        with pytest.raises(ValueError, match="fsdp is True; it must be false with"):
            TrainConfig(fsdp=True, **other)
    with pytest.raises(ValueError, match="reshard_after_forward is False; it must be true without fsdp"):
        TrainConfig(reshard_after_forward=False)
    TrainConfig(fsdp=True).check_resumes(TrainConfig())


# --------------------------------------------------------------------------------------------------------------
# runs and their checkpoints

RUN = TrainConfig.from_dict(
    {"steps": 4, "save_every": 1, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 3}
    | {"symbols": 4, "lr": 0.05, "atoms": 4}
    | STACK
)


def layout(steps: int, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(RUN.to_dict() | {"steps": steps} | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    rl.run(RUN, folder)
    return folder


def saved(folder: Path) -> dict[str, bytes]:
    """Every file of tensors in a run's folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def goes_on(folder: str, *configs: TrainConfig) -> None:
    for config in configs:
        rl.run(config, folder, resume=True, ranks=parallel.Ranks.of())


def test_a_run_goes_on_in_another_layout_to_the_same_bytes(alone, tmp_path):
    ranks.need_gpus(4)
    folder = tmp_path / "run"
    rl.run(layout(1), folder)
    ranks.run(2, goes_on, str(folder), layout(2, fsdp=True), layout(3))
    ranks.run(4, goes_on, str(folder), layout(4, fsdp=True))
    assert metrics(folder) == metrics(alone)
    wanted, found = saved(alone), saved(folder)
    assert len([name for name in wanted if name.startswith("checkpoints/")]) == 2 * RUN.steps
    assert found == wanted  # weights and states of every step, and the final weights
    # The files are those of safetensors itself.
    path = alone / "checkpoints" / "step_000004" / "optimizer.safetensors"
    save_file(load_file(path), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def empty_on_a_rank(folder: str) -> list[str]:
    """Of a batch of three sequences in eight atoms."""
    few = {"steps": 1, "prompts_per_step": 1, "group_size": 3, "atoms": 8, "save_every": 0}
    here = parallel.Ranks.of()
    return [rl.run(layout(**few, fsdp=fsdp), f"{folder}/{fsdp}", ranks=here).weights_sha256 for fsdp in (True, False)]


def test_atoms_without_a_sequence_add_zeros(tmp_path):
    ranks.need_gpus(2)
    for in_shards, whole in ranks.run(2, empty_on_a_rank, str(tmp_path)):
        assert in_shards == whole


def test_rows_are_written_and_read_where_they_belong(tmp_path):
    """One process plays ranks of other numbers: what two or three wrote is what one writes, and each reads its own."""
    model = StackModel()
    named = dict(model.named_parameters())
    for size in (1, 2, 3, 16):
        path = tmp_path / f"{size}.safetensors"
        parts = []
        for rank in range(size):
            rows = {n: part_of(p, rank, size) for n, p in named.items()}
            if rank == 0:
                tensor_files.create(path, rows)
            tensor_files.write(path, rows, rows)
            parts.append(rows)
        with safe_open(path, framework="pt") as file:
            for rows in parts:
                for n, part in rows.items():
                    assert torch.equal(tensor_files.read(file, n, part).cpu(), part.tensor.cpu()), (size, n)
        assert path.read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def pieces_of(p: torch.Tensor, rank: int, size: int) -> tensor_files.Rows:
    """Columns of a matrix, or its part of each half of the rows."""
    if p.ndim == 2 and p.shape[1] % size == 0:
        width = p.shape[1] // size
        return tensor_files.Rows(p[:, rank * width :][:, :width], tuple(p.shape), column=rank * width)
    n = len(p) // 2 // size
    runs = ((rank * n, n), (len(p) // 2 + rank * n, n)) if size > 1 else ()
    own = torch.cat([p[first : first + n] for first, n in runs]) if runs else p
    return tensor_files.Rows(own, tuple(p.shape), runs=runs)


def test_columns_and_several_runs_of_rows_are_written_and_read_where_they_belong(tmp_path):
    named = {"a": torch.randn(6, 8), "b": torch.randn(8, 3), "c": torch.randn(16).bfloat16(), "d": torch.tensor(3)}
    for size in (1, 2, 4):
        path, parts = tmp_path / f"{size}.safetensors", []
        for rank in range(size):
            rows = {n: pieces_of(p, rank, size) if p.ndim else tensor_files.whole(p) for n, p in named.items()}
            if rank == 0:
                tensor_files.create(path, rows)
            tensor_files.write(path, rows, rows)
            parts.append(rows)
        assert load_file(path).keys() == named.keys()
        for name, t in load_file(path).items():
            assert torch.equal(t, named[name]), (size, name)
        with safe_open(path, framework="pt") as file:
            for rows in parts:
                for n, part in rows.items():
                    assert torch.equal(tensor_files.read(file, n, part).cpu(), part.tensor.cpu()), (size, n)
                    assert torch.equal(part.of(named[n]) if named[n].ndim else named[n], part.tensor), (size, n)
        assert path.read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def part_of(p: torch.Tensor, rank: int, size: int) -> tensor_files.Rows:
    chunk = -(-len(p) // size)
    start = min(rank * chunk, len(p))
    return tensor_files.Rows(p.detach()[start : start + chunk], tuple(p.shape), start)


# --------------------------------------------------------------------------------------------------------------
# a model, through the trainer

#: Four sequences, two in each atom: in two micro-batches of the first, and in one of the second.
CONFIG = {"prompts_per_step": 2, "group_size": 2, "atoms": 2, "max_tokens_per_microbatch": 21}
UPDATES = 3


class Copy(Replay):
    """An engine with a whole model of its own."""

    @torch.no_grad()
    def update_weights(self, model):
        for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(new)


def trained(here: parallel.Ranks = parallel.ALONE, moe: bool = False, **changes: Any) -> dict[str, Any]:
    """Three updates on sequences that are given."""
    make = tiny_moe_model if moe else small_model
    model, engine = make(), cast(Any, Copy(make()))
    reference = make(seed=1).requires_grad_(False) if "kl" in changes else None
    trainer = Trainer(TrainConfig(**(CONFIG | changes)), model, engine, cast(Any, Lengths()), reference, ranks=here)
    trainer.generate = lambda prompts, params: trainer.engine.generate(prompts, params)  # type: ignore[method-assign]
    with mock.patch.object(type(model), "unit_tokens", 1):
        steps = [trainer.step(step) for step in range(1, UPDATES + 1)]
    return {
        "metrics": [(s.loss, s.grad_norm, s.kl, s.tokens_checked, s.tokens_different, s.clip_fraction) for s in steps],
        "grads": gradients_of(trainer.layout),
        "weights": weights_of(trainer.layout),
        "engine": [p.detach().bfloat16() for p in engine.model.parameters()],
    }


def trained_on_a_rank(changes: dict[str, Any], reshards: bool) -> dict[str, Any]:
    return trained(parallel.Ranks.of(), fsdp=True, reshard_after_forward=reshards, **changes)


#: A KL to another model, and the layers that are computed again; what the second update begins with.
WITH_KL: dict[str, Any] = {"kl": 0.1, "updates_per_rollout": 2, "recompute": "layer"}


@sweep(
    ("changes", "reshards"),
    [({}, True), (WITH_KL, True), (WITH_KL, False), ({"offload": "states"}, True), ({"moe": True}, True)],
    [({}, True)],
)
def test_a_model_in_shards_ends_in_the_bytes_of_one_process(changes, reshards):
    ranks.need_gpus(2)
    found, one = ranks.run(2, trained_on_a_rank, changes, reshards), trained(**changes)
    for result in found:
        assert result["metrics"] == one["metrics"]
        assert equal(result["grads"], one["grads"])
        assert equal(result["weights"], one["weights"])
        assert all(torch.equal(a, b) for a, b in zip(result["engine"], one["engine"], strict=True))
