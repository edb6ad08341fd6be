"""Ranks that share a model end in the bytes of one process of the same segments; on ranks that talk over gloo."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from test_fsdp import Copy, saved
from test_microbatches import Lengths
from test_parallel import equal, metrics
from tiny import tiny_model, tiny_moe_config

from bi_ops import matmul, optim, parallel, rl
from bi_ops.cli import main
from bi_ops.core.tensor_files import joined
from bi_ops.matmul import subtree
from bi_ops.models.qwen3_moe import Qwen3MoeForCausalLM
from bi_ops.models.tiny import TINY
from bi_ops.nn.parallel_linear import ColumnParallelLinear, RowParallelLinear
from bi_ops.parallel.tensor import OrderedAllReduce, TensorParallel
from bi_ops.rl import checkpoint
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.microbatches import Pack, check_equal
from bi_ops.rl.tasks import Problem
from bi_ops.rl.trainer import Trainer

SEGMENTS = 4
#: Four sequences in two atoms.
CONFIG = {"prompts_per_step": 2, "group_size": 2, "atoms": 2}
#: The first atom in two micro-batches.
CUT: dict[str, Any] = {"max_tokens_per_microbatch": 21}
#: Every rank has a group of a key head and two query heads, and a chunk of the vocabulary, the last one a short one.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 3100}
#: Of the vocabulary, on each of so many ranks.
ROWS = {"2": (2048, 1052), "4": (1024, 1024, 1024, 28)}
RUN = TrainConfig.from_dict(
    {"steps": 3, "save_every": 1, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 2, "symbols": 2}
    | {"lr": 0.05, "atoms": 2, "segments": SEGMENTS, "architecture": TINY | HEADS}
)


class Even:
    """A task that random tokens of a large vocabulary earn something in."""

    name = "even"

    def sample(self, rng: random.Random) -> Problem:
        return Problem((rng.randrange(1, 3000),), 2, lambda completion: sum(token % 2 == 0 for token in completion) / 2)


def shared_model(segments: int = SEGMENTS, **changes: Any) -> Any:
    return tiny_model(segments=segments, **(HEADS | {"num_hidden_layers": 1} | changes))


class Library(OrderedAllReduce):
    """The control: partial outputs are rounded, then a library adds them."""

    def __call__(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = partial.to(dtype)
        dist.all_reduce(rounded, group=self.ranks.group)
        return rounded


def trained(here: parallel.Ranks = parallel.ALONE, *, tied: bool = True, **changes: Any) -> dict[str, Any]:
    """An update on sequences that are given: what a rank reports, whole gradients, and on the first whole weights."""
    config = TrainConfig.from_dict({"segments": SEGMENTS} | CONFIG | changes)
    model, other = (shared_model(config.segments, tie_word_embeddings=tied) for _ in range(2))
    engine = cast(Any, Copy(other))
    engine.describe = dict
    trainer = Trainer(config, model, engine, cast(Any, Lengths()), ranks=here)
    trainer.generate = lambda prompts, params: trainer.engine.generate(prompts, params)  # type: ignore[method-assign]
    with mock.patch.object(type(model), "unit_tokens", 1):
        s = trainer.step(1)
    grads = {n: cast(torch.Tensor, p.grad) for n, p in model.named_parameters()}
    if isinstance(layout := trainer.layout, TensorParallel):
        for name, layer in layout.layers.items():
            grads[name] = layout.joined(layer, grads[name])
    return {
        "rows": [len(cast(torch.Tensor, layer.weight)) for layer in (model.model.embed_tokens, model.lm_head)],
        # The loss that is reported is added up micro-batch by micro-batch.
        "metrics": (s.grad_norm, s.kl, s.tokens_checked, s.tokens_different, s.clip_fraction),
        "grads": list(grads.values()),
        "weights": list((trainer.layout.collected() or dict(model.named_parameters())).values()),
        "engine": [p.detach().bfloat16() for p in engine.model.parameters()],
    }


# --------------------------------------------------------------------------------------------------------------
# sums and slices


def partial_output(rank: int) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(rank))


def sums_on_a_rank(here: parallel.Ranks) -> dict[str, torch.Tensor]:
    """One-shot, two-shot, and the control."""
    own = partial_output(here.rank)
    sums = {"one-shot": OrderedAllReduce(here), "two-shot": OrderedAllReduce(here, 0), "library": Library(here)}
    return {name: add(own.clone(), torch.bfloat16) for name, add in sums.items()}


def test_segments_are_summed_apart_and_one_is_the_gemm(device):
    """A GPU adds K in steps of 16, so parts of that size may follow one another; the interpreter in steps of 128."""
    k, part = 512, 256
    x, weight = torch.randn(20, k, device=device).bfloat16(), torch.randn(48, k, device=device).bfloat16()
    whole = subtree(x, weight, 1)
    assert torch.equal(whole.bfloat16(), matmul.linear(x, weight))
    a, b, c, d = (subtree(*pieces, 1) for pieces in zip(x.chunk(4, 1), weight.chunk(4, 1), strict=True))
    assert torch.equal(subtree(x, weight, 4), (a + b) + (c + d))
    assert not torch.equal(subtree(x, weight, 4), whole)  # the control: another order
    assert not torch.equal(subtree(x, weight, 4), ((a + b) + c) + d)
    # A segment of two parts goes on from one to the other.
    order = torch.arange(k, device=device).view(2, 2, part // 2).transpose(0, 1).reshape(-1)
    joint = subtree(x[:, order], weight[:, order], 2)
    assert torch.equal(subtree(x, weight, 2, [part, part]), joint)
    exact, bound = x.double() @ weight.double().t(), k * 2**-24 * (x.double().abs() @ weight.double().abs().t())
    assert ((joint - exact).abs() <= bound).all()


def test_a_layer_takes_what_a_linear_one_takes(device):
    """Axes before the last; other widths are refused."""
    layer, x = RowParallelLinear(128, 16, 2, device=device), torch.randn(6, 128, device=device).bfloat16()
    out = layer(x)
    assert torch.equal(layer(x.view(2, 3, 128)), out.view(2, 3, 16))
    assert not torch.equal(RowParallelLinear.forward(layer, x.flip(1)), out)
    for width in (64, 256):
        with pytest.raises(ValueError, match=rf"needs \[M, K\] and \[N, K\], got \[4, {width}\] and \[16, 128\]"):
            layer(torch.zeros(4, width, device=device).bfloat16())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_are_all_of_a_layer(size, device):
    """Ranks played by one process: products and gradients of the slices, added in order, are those of the whole."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(20, n, generator=generator).bfloat16().to(device) for n in (64, 256))
    for make in (
        lambda: ColumnParallelLinear(64, (128, 64, 64), 4, device=device),
        lambda: RowParallelLinear(64, 256, 4, device=device),
    ):
        whole, parts = make(), []
        subtrees: list[torch.Tensor] = []

        def added(subtree: torch.Tensor, dtype: torch.dtype, seen: list[torch.Tensor] = subtrees) -> torch.Tensor:
            seen.append(subtree.clone())
            return subtree.to(dtype)

        with torch.no_grad():
            whole.weight.copy_(torch.randn(whole.weight.shape, generator=generator))
        is_row = isinstance(whole, RowParallelLinear)
        rounded = whole.weight.detach().bfloat16()
        out, dx = whole.product(x, rounded), matmul.mm(g, rounded) if is_row else whole.gradient(g, rounded)
        for rank in range(size):
            part = make()
            part.weight = torch.nn.Parameter(whole.weight.detach().clone())
            part.cut(rank, size, added)
            parts.append(part.place(part.weight.detach(), rank, size))
            own = part.weight.detach().bfloat16()
            inputs = x.chunk(size, 1)[rank] if is_row else x
            found = part.product(inputs, own)
            if is_row:
                assert torch.equal(matmul.mm(g, own), dx.chunk(size, 1)[rank])
            else:
                runs = part.place(own, rank, size).each_run()
                columns = torch.cat([torch.arange(first, first + n) for first, n in runs])
                assert torch.equal(found, out[:, columns])
                part.gradient(g[:, columns], own)
        assert torch.equal(joined(parts), whole.weight.detach())
        while len(subtrees) > 1:
            subtrees = [a + b for a, b in zip(subtrees[::2], subtrees[1::2], strict=True)]
        assert torch.equal(subtrees[0].bfloat16(), out if is_row else dx)


# --------------------------------------------------------------------------------------------------------------
# training


def go_on(folder: str, here: parallel.Ranks, tp: int, steps: int) -> None:
    config = TrainConfig.from_dict(RUN.to_dict() | {"steps": steps, "tp": tp})
    with mock.patch("bi_ops.rl.runner.make_task", return_value=Even()):
        rl.run(config, folder, resume=True, ranks=here)


def on_a_rank(folder: str) -> dict[str, Any]:
    """Everything that is asked of four ranks, at once: to start them takes longer."""
    here = parallel.Ranks.of()
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {"sums": sums_on_a_rank(here)}
    found["2 x 2"] = trained(here, tp=2, **CUT)
    found["4 x 1"] = trained(here, tied=False, tp=4, recompute="layer")
    if here.rank < 2:
        found["2 x 1"] = trained(parallel.Ranks.of(pair), tied=False, tp=2, recompute="none", **CUT)
    with mock.patch("bi_ops.parallel.tensor.layout.OrderedAllReduce", Library), pytest.raises(rl.DifferenceFound):
        trained(here, tp=4)
    go_on(folder, here, tp=2, steps=2)
    go_on(folder, here, tp=4, steps=3)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with mock.patch("bi_ops.rl.runner.make_task", return_value=Even()):
        rl.run(RUN, folder)
    return folder


def test_ranks_that_share_a_model_end_in_the_bytes_of_one_process(alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)  # as it was after the first step
    for path in [*(folder / "checkpoints").glob("step_00000[23]"), folder / "final"]:
        shutil.rmtree(path)
    (folder / "checkpoints" / checkpoint.LATEST).write_text("step_000001\n")
    found = ranks.run(4, on_a_rank, str(folder))

    a, b, c, d = map(partial_output, range(4))
    total = ((a + b) + (c + d)).bfloat16()
    tied, untied = trained(), trained(tied=False)
    for rank, result in enumerate(found):
        assert torch.equal(result["sums"]["one-shot"], total)
        assert torch.equal(result["sums"]["two-shot"], total)
        assert not torch.equal(result["sums"]["library"], total)
        for layout in ("2 x 2", "4 x 1", *(["2 x 1"] if rank < 2 else [])):
            one = tied if layout == "2 x 2" else untied
            assert result[layout]["rows"] == [ROWS[layout[0]][rank % int(layout[0])]] * 2, layout
            assert result[layout]["metrics"] == one["metrics"], layout
            assert equal(result[layout]["grads"], one["grads"]), layout
            assert all(map(torch.equal, result[layout]["engine"], one["engine"])), layout
            assert rank > 0 or equal(result[layout]["weights"], one["weights"]), layout
    assert not equal(trained(segments=1)["grads"], tied["grads"])  # segments are a part of the order

    assert metrics(folder) == metrics(alone)
    assert any(m["grad_norm"] > 0 for m in metrics(alone)[1:])
    assert saved(folder) == saved(alone)  # weights and states of every step, and the final weights


def killed_in_a_sum() -> str:
    """Rank 1 ends in the backward of the first update."""
    here, calls = parallel.Ranks.of(), []
    real = OrderedAllReduce.__call__

    def counted(self: OrderedAllReduce, *args: Any) -> torch.Tensor:
        calls.append(1)
        if here.rank == 1 and len(calls) == 3:  # behind o_proj's and down_proj's output
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    with mock.patch.object(OrderedAllReduce, "__call__", counted):
        try:
            with parallel.watched(here):
                trained(here, tp=2)
        except parallel.RankLost as error:
            return str(error)
    return "nothing"


def test_a_rank_that_ends_in_a_sum_is_named():
    found, codes = ranks.start(2, killed_in_a_sum)
    assert codes[1] == -signal.SIGKILL
    assert "rank 1 of 2 was killed, or its machine is gone; this run is over. Resume it" in found[0]


# --------------------------------------------------------------------------------------------------------------
# what is refused


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="segments=8: 4 key and value heads are not cut into as many"):
        shared_model(8)
    with pytest.raises(ValueError, match="segments=4: intermediate_size 48 is not cut into multiples of 16"):
        shared_model(4, intermediate_size=48)
    with pytest.raises(ValueError, match=r"segments=4: vocab_size 3072 has 3 chunks of 1024 columns.*: take fewer"):
        shared_model(4, vocab_size=3072)
    with pytest.raises(ValueError, match="segments is 3; it must be a power of two"):
        shared_model(3)
    with pytest.raises(ValueError, match="segments=2: experts are not shared by tensor-parallel ranks"):
        Qwen3MoeForCausalLM(tiny_moe_config(), segments=2)
    with pytest.raises(ValueError, match=r"4 ranks cannot share sums of segments=2; declare as many segments as ranks"):
        TensorParallel(shared_model(2), parallel.order(1), tensor=parallel.Ranks(0, 4))
    with pytest.raises(ValueError, match="tp is 4; it must be a divisor of segments=2: declare as many segments"):
        TrainConfig(segments=2, tp=4)
    with pytest.raises(ValueError, match="segments is 6; it must be a power of two"):
        TrainConfig(segments=6)
    with pytest.raises(ValueError, match=r"fsdp is True; it must be false with segments above 1, or tp"):
        TrainConfig(segments=2, fsdp=True)
    with pytest.raises(ValueError, match="offload is 'masters'; it must be none or states with tp"):
        TrainConfig(segments=2, tp=2, offload="masters")
    with pytest.raises(
        ValueError, match="peer_memory is True; it must be false without atoms, tp or tensor_parallel_size above 1"
    ):
        TrainConfig(segments=2, peer_memory=True)
    with pytest.raises(ValueError, match="3 ranks are not groups of 2; start a multiple of 2 with torchrun"):
        parallel.Ranks(0, 3).split(2)
    model = shared_model(1)
    with pytest.raises(ValueError, match="segments=4, but the model was made with 1"):
        Trainer(TrainConfig(segments=4), model, cast(Any, Copy(model)), cast(Any, Lengths()))


def test_ranks_that_share_a_model_and_find_other_bits_are_named():
    def found(*scores: float) -> list[Pack]:
        return [Pack(slice(2, 4), [torch.tensor([s]) for s in scores], 0.0, 0.0, 0.0, 0, 2)]

    check_equal(found(-1.0, math.nan), found(-1.0, math.nan), 1)
    with pytest.raises(RuntimeError, match="tensor-parallel ranks 0 and 1 have other log-probabilities for sequence 3"):
        check_equal(found(-1.0, 0.0), found(-1.0, -0.0), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--segments", "2", "--tp", "2"],
            "train: --tp 2, but 1 processes were started; use torchrun --nproc-per-node 2",
        ),
        (["--segments", "2", "--tp", "2", "--dp", "2"], "train: --dp 2 --tp 2, but 1 processes .* --nproc-per-node 4"),
        (["--dp", "2"], "train: --dp 2, but 1 processes were started; use torchrun --nproc-per-node 2"),
    ],
)
def test_a_command_on_too_few_processes_says_how_many_it_needs(options, message, tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path / "run"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_resumed_on_other_ranks_but_not_with_other_segments():
    TrainConfig(segments=4, tp=2).check_resumes(TrainConfig(segments=4))
    with pytest.raises(ValueError, match="segments was 4, now 2"):
        TrainConfig(segments=2).check_resumes(TrainConfig(segments=4))


def test_the_orders_of_other_segments_differ():
    whole, shared = shared_model(1).orders(), shared_model(4).orders()
    assert shared.differences(whole) == ["segments: {'kind': 'Segments', 'segments': 4} and None"]
    with pytest.raises(RuntimeError, match="segments"):
        shared_model(4).adopt(whole)


def test_the_norm_has_the_rows_of_segments():
    """With segments the squares of a row whose columns are shared are added by segments first."""
    layout = TensorParallel(shared_model(), parallel.order(1))
    generator = torch.Generator().manual_seed(0)
    for p in layout.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    grads = [cast(torch.Tensor, p.grad) for p in layout.parameters.values()]
    shared = [isinstance(layout.layers.get(n), RowParallelLinear) for n in layout.parameters]
    viewed = [g.view(len(g) * SEGMENTS, -1) if s else g for g, s in zip(grads, shared, strict=True)]
    assert any(shared)
    assert torch.equal(layout.norm(), optim.global_norm(viewed))


def test_sums_go_over_peer_memory_where_gpus_reach_each_other(monkeypatch):
    made: list[str] = []

    def unreachable(*args: object) -> None:
        made.append("tried")
        raise RuntimeError("parallel.peer: 2 ranks cannot share memory")

    monkeypatch.setattr("bi_ops.parallel.peer.PeerAllReduce", unreachable)

    def sums(asked: bool | None, device: str = "cuda", size: int = 2) -> object:
        model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(hidden_size=8))
        trainer: Any = SimpleNamespace(
            config=TrainConfig(segments=2, tp=2, peer_memory=asked), tensor=parallel.Ranks(0, size), model=model
        )
        return Trainer._peer_sums(trainer)

    with pytest.warns(
        UserWarning, match="train: ranks exchange by collectives, which takes longer: parallel.peer: 2 ranks cannot"
    ):
        assert sums(None) is None
    with pytest.raises(RuntimeError, match="cannot share memory"):
        sums(True)
    assert made == ["tried"] * 2
    assert sums(False) is sums(None, "cpu") is sums(None, size=1) is None
    assert made == ["tried"] * 2


def test_gradients_travel_over_peer_memory_on_one_host(monkeypatch):
    monkeypatch.setattr("bi_ops.parallel.peer.PeerCopies", lambda *args: args)

    def copies(asked: bool | None, n: int, device: str = "cuda", size: int = 2) -> object:
        weight = SimpleNamespace(device=torch.device(device))
        ranks, model = parallel.Ranks(0, size), SimpleNamespace(parameters=lambda: iter([weight]))
        trainer: Any = SimpleNamespace(config=TrainConfig(atoms=2, peer_memory=asked), ranks=ranks, model=model)
        return Trainer._peer_copies(trainer, n)

    expected = (parallel.Ranks(0, 2), torch.device("cuda"))
    assert copies(None, 1) == [expected]
    assert copies(None, 2) == copies(True, 2) == [expected] * 2
    assert copies(False, 2) == copies(None, 2, "cpu") == copies(None, 2, size=1) == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert copies(None, 2) == []
