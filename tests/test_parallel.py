"""Ranks that share a batch end in the bytes of one process; on ranks that talk over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import ranks
import torch
import torch.distributed as dist
from rl_fakes import TABLE

from bi_ops import parallel, rl
from bi_ops.parallel.gradients import sum_over_ranks
from bi_ops.rl.checkpoint import sha256_of_weights
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.trainer import Trainer

SHAPES = [(3, 5), (64,), (), (7, 11)]


def atom(i: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit, wherever they are."""
    return all(torch.equal(x.cpu().view(torch.int32), y.cpu().view(torch.int32)) for x, y in zip(a, b, strict=True))


def pairwise(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The oracle: neighbours first."""
    while len(parts) > 1:
        parts = [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


# --------------------------------------------------------------------------------------------------------------
# the order


@pytest.mark.parametrize("lengths", [[5] * 8, [100, 1, 1, 1], [1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [1, 1, 1, 100]])
@pytest.mark.parametrize("atoms", [1, 2, 8])
def test_a_cut_keeps_every_sequence_once_and_in_order(lengths, atoms):
    parts = parallel.cut(lengths, atoms)
    assert len(parts) == atoms
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))


def test_a_cut_is_even_where_it_can_be():
    assert parallel.cut([5] * 8, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert parallel.cut([100, 1, 1, 1], 2) == [slice(0, 1), slice(1, 4)]


@pytest.mark.parametrize("atoms", [0, 3, -2, 12])
def test_atoms_are_a_power_of_two(atoms):
    with pytest.raises(ValueError, match=f"atoms is {atoms}; it must be a power of two"):
        parallel.order(atoms)


# --------------------------------------------------------------------------------------------------------------
# the sum


@pytest.mark.parametrize("atoms", [1, 2, 8])
def test_one_process_adds_atoms_pairwise(atoms):
    tree = parallel.GradientTree(parallel.order(atoms))
    for _ in range(2):  # it can be used again
        for i in range(atoms):
            tree.add(atom(i))
        assert equal(tree.total(), pairwise([atom(i) for i in range(atoms)]))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"2 ranks cannot share atoms=1 evenly; declare as many atoms as ranks"):
        parallel.GradientTree(parallel.order(1), parallel.Ranks(0, 2))
    tree = parallel.GradientTree(parallel.order(2))
    with pytest.raises(TypeError, match=r"gradient 0 \[2\] is torch.bfloat16; sums over atoms are fp32"):
        tree.add([torch.zeros(2).bfloat16()])
    tree.add([torch.zeros(2)])
    with pytest.raises(ValueError, match="1 of rank 0's 2 atoms are added"):
        tree.total()
    with pytest.raises(ValueError, match="other shapes"):
        tree.add([torch.zeros(3)])
    tree.add([torch.zeros(2)])
    with pytest.raises(ValueError, match="all are added"):
        tree.add([torch.zeros(2)])


# --------------------------------------------------------------------------------------------------------------
# training, on several ranks

CONFIG = TrainConfig(steps=3, symbols=4, prompts_per_step=4, group_size=3, lr=0.1, save_every=2, atoms=8, **TABLE)


def model_on_a_rank(atoms: int = 2, steps: int = 1) -> dict[str, Any]:
    """Updates of a small Qwen3 on sequences that are given: its weights, and the norms."""
    from test_microbatches import Lengths, Replay, small_model

    config = TrainConfig(prompts_per_step=2, group_size=2, atoms=atoms)
    model = small_model()
    trainer = Trainer(config, model, cast(Any, Replay(model)), cast(Any, Lengths()), ranks=parallel.Ranks.of())
    trainer.generate = lambda prompts, params: trainer.engine.generate(prompts, params)  # type: ignore[method-assign]
    norms = [trainer.step(step).grad_norm for step in range(1, steps + 1)]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"norms": norms, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}, "grads": grads}


def on_a_rank(folder: str, with_model: bool) -> dict[str, Any]:
    """Everything that is asked of the ranks, at once: to start them takes longer."""
    here = parallel.Ranks.of()
    tree = parallel.GradientTree(parallel.order(8), here)
    for i in range(here.rank, 8, here.size):
        tree.add(atom(i))
    naive = atom(here.rank)
    for i in range(here.rank + here.size, 8, here.size):
        naive = [a + b for a, b in zip(naive, atom(i), strict=True)]
    for n in naive:
        dist.all_reduce(n)
    flat = torch.randn(8 * here.size, generator=torch.Generator().manual_seed(here.rank))
    exchanges = [sum_over_ranks(flat, here.size, None, halving).clone() for halving in (False, True)]
    refused = []
    for fails in (lambda: 1 / 0, lambda: "value"):
        try:
            refused.append(here.on_first(fails))
        except ZeroDivisionError as error:
            refused.append(str(error))
    summary = rl.run(CONFIG, folder, ranks=here)
    flipped = CONFIG.to_dict() | {"seed": 1}
    stopped = None
    from rl_fakes import fresh_settings

    with fresh_settings() as settings:
        settings["broken_at"] = (0, 0, 1) if here.rank == here.size - 1 else None
        try:
            rl.run(TrainConfig.from_dict(flipped), f"{folder}-broken", ranks=here)
        except rl.DifferenceFound as difference:
            stopped = difference.record["sequence"]
    return {
        "total": tree.total(),
        "naive": naive,
        "exchanges": exchanges,
        "on first": refused,
        "summary": summary,
        "stopped": stopped,
        "model": model_on_a_rank() if with_model else None,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    rl.run(CONFIG, folder)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("size", [2, 4])
def test_every_number_of_ranks_ends_in_the_bytes_of_one_process(alone, tmp_path, size):
    found = ranks.run(size, on_a_rank, str(tmp_path / "run"), size == 2)
    total = pairwise([atom(i) for i in range(8)])
    for result in found:
        assert equal(result["total"], total)
        assert not equal(result["naive"], total)  # the control: each rank its sum, then a library's over ranks
        assert torch.equal(*result["exchanges"])
        assert result["on first"] == ["division by zero", "value"]
        assert result["summary"] == found[0]["summary"]
        assert result["stopped"] == size - 1  # a flipped bit on one rank stops all, and is named alike
    assert metrics(tmp_path / "run") == metrics(alone)  # rewards, losses, norms
    assert found[0]["summary"].weights_sha256 == sha256_of_weights(alone / "final")
    saved = [p for p in (alone / "checkpoints").rglob("*.safetensors") if p.is_file()]
    assert saved
    for path in saved:  # weights and the optimizer's moments
        assert (tmp_path / "run" / path.relative_to(alone)).read_bytes() == path.read_bytes()
    if size == 2:
        one = model_on_a_rank()
        for result in found:
            assert result["model"]["norms"] == one["norms"]
            for what in ("weights", "grads"):
                mine = result["model"][what]
                assert equal([mine[n] for n in one[what]], list(one[what].values()))
        other = model_on_a_rank(atoms=1)["grads"]  # the number of atoms is part of the order
        assert not equal([other[n] for n in one["grads"]], list(one["grads"].values()))


def test_a_run_is_not_resumed_with_other_atoms_and_may_be_on_other_ranks():
    with pytest.raises(ValueError, match="atoms was 8, now 4"):
        TrainConfig.from_dict(CONFIG.to_dict() | {"atoms": 4}).check_resumes(CONFIG)
    with pytest.raises(ValueError, match="atoms is 6; it must be a power of two"):
        TrainConfig(atoms=6)
    with pytest.raises(ValueError, match="tensor_parallel_size is 2; it must be 1, except for vllm"):
        TrainConfig(tensor_parallel_size=2)
    TrainConfig(engine="vllm", tensor_parallel_size=2).check_resumes(TrainConfig(engine="vllm"))
    with pytest.raises(ValueError, match="enable_expert_parallel is True; it must be false for tensor_parallel_size=1"):
        TrainConfig(engine="vllm", enable_expert_parallel=True)
    owned = TrainConfig(engine="vllm", tensor_parallel_size=2, enable_expert_parallel=True)
    owned.check_resumes(TrainConfig(engine="vllm"))
    assert owned.engine_options()["enable_expert_parallel"] is True
    assert "enable_expert_parallel" not in TrainConfig(engine="vllm").engine_options()
