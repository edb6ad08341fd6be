"""Ranks that share experts end in the bytes of one process; on ranks that talk over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
from sweeps import sweep
from test_fsdp import Copy, saved
from test_microbatches import Lengths
from test_parallel import equal, metrics
from tiny import tiny_model, tiny_moe_model

from bi_ops import nn, parallel, rl
from bi_ops.models.tiny import TINY_MOE
from bi_ops.parallel.experts import ExpertParallel
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.trainer import Trainer

#: Four sequences in four atoms.
CONFIG = {"prompts_per_step": 2, "group_size": 2, "atoms": 4}
#: Two atoms, of one micro-batch and of two where the second is cut: the first rank idles once a step.
UNCUT = {"atoms": 2}
CUT = UNCUT | {"max_tokens_per_microbatch": 17}
RUN = TrainConfig.from_dict(
    {"steps": 2, "save_every": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2, "symbols": 2}
    | {"lr": 0.05, "atoms": 2, "architecture": TINY_MOE}
)


def model() -> Any:
    """One expert is wanted by no token."""
    made = tiny_moe_model()
    with torch.no_grad():
        made.get_parameter("model.layers.0.mlp.gate.weight")[2] = 0.0
        made.get_parameter("model.layers.0.mlp.gate.weight")[2, 0] = -30.0
    return made


class Folded(ExpertParallel):
    """The control: a library adds an expert's gradients."""

    def _collect(self) -> None:
        for block in self.model.modules():
            if isinstance(block, nn.Experts):
                for layer in (block.gate_up_proj, block.down_proj):
                    sums = cast(Any, layer.main_grad).collect()
                    total = sums[-1]
                    for part in sums[:-1].flip(0):
                        total = total + part
                    layer.main_grad = None
                    layer.weight.grad = total
        super()._collect()


def trained(here: parallel.Ranks = parallel.ALONE, updates: int = 2, layout: Any = None, **changes: Any) -> Any:
    """Updates on sequences that are given: what a rank reports, whole gradients and weights."""
    config = TrainConfig.from_dict(CONFIG | changes)
    own, engine = model(), cast(Any, Copy(model()))
    engine.describe = dict
    reference = model() if config.kl else None
    if reference is not None:
        reference.get_parameter("lm_head.weight").data *= 1.5
    with mock.patch("bi_ops.parallel.experts.ExpertParallel", layout or ExpertParallel):
        trainer = Trainer(config, own, engine, cast(Any, Lengths()), reference, ranks=here)
    trainer.generate = lambda prompts, params: trainer.engine.generate(prompts, params)  # type: ignore[method-assign]
    idles = mock.patch.object(Trainer, "_idle", autospec=True, side_effect=Trainer._idle)
    with mock.patch.object(type(own), "unit_tokens", 16), idles as idle:
        steps = [trainer.step(step) for step in range(1, updates + 1)]
    grads = {n: cast(torch.Tensor, p.grad) for n, p in own.named_parameters()}
    if isinstance(shared := trainer.layout, ExpertParallel):
        grads |= {n: shared.whole(grads[n]) for n in shared.owned}
    return {
        "metrics": [(s.grad_norm, s.kl, s.tokens_checked, s.tokens_different, s.clip_fraction) for s in steps],
        "grads": list(grads.values()),
        "weights": list((trainer.layout.collected() or dict(own.named_parameters())).values()),
        "engine": [p.detach().bfloat16() for p in engine.model.parameters()],
        "idles": idle.call_count,
    }


def on_a_rank(folder: str) -> dict[str, Any]:
    """Everything that is asked of the ranks, at once: to start them takes longer."""
    here = parallel.Ranks.of()
    found: dict[str, Any] = {"trained": {}}
    if here.size == 4:
        found["trained"] = {ep: trained(here, 1, None, ep=ep) for ep in (2, 4)}
        found["control"] = trained(here, 1, Folded, ep=4)["grads"]
    else:
        found["cut"] = trained(here, 2, None, ep=2, **CUT)
        shared = TrainConfig.from_dict(RUN.to_dict() | {"ep": 2})
        rl.run(shared, folder, resume=True, ranks=here)  # whose first step was one process's
    return found


@sweep("size", (2, 4), (2,))
def test_every_layout_has_the_bits_of_one_process(size, tmp_path):
    one = tmp_path / "one"
    alone = {"cut": trained(parallel.ALONE, 2, None, **UNCUT)} if size == 2 else {"trained": trained(updates=1)}
    if size == 2:
        rl.run(RUN, one)
        rl.run(TrainConfig.from_dict(RUN.to_dict() | {"steps": 1}), tmp_path / "run")
    found = ranks.run(size, on_a_rank, str(tmp_path / "run"))
    for result in found:
        cut = {"cut": result["cut"]} if size == 2 else {}
        for name, mine in (result["trained"] | cut).items():
            wanted = alone["cut" if name == "cut" else "trained"]
            assert mine["metrics"] == wanted["metrics"], name
            for what in ("grads", "engine"):
                assert all(torch.equal(a, b) for a, b in zip(mine[what], wanted[what], strict=True)), (name, what)
        if size == 4:
            assert not equal(result["control"], alone["trained"]["grads"])
    for ep, each in found[0]["trained"].items():
        assert equal(each["weights"], alone["trained"]["weights"]), ep
    if size == 2:
        assert [result["cut"]["idles"] for result in found] == [2, 0]
        assert metrics(tmp_path / "run") == metrics(one)
        assert saved(tmp_path / "run") == saved(one)


#: What an update may have besides: a KL to the first model, two updates on a rollout, whole layers computed again.
MORE: dict[str, Any] = {"kl": 0.1, "updates_per_rollout": 2, "recompute": "layer"}


def more_on_a_rank() -> dict[str, Any]:
    """On 4 ranks an atom is cut besides."""
    here = parallel.Ranks.of()
    cut: dict[str, Any] = {} if here.size == 2 else {"max_tokens_per_microbatch": 17}
    return trained(here, 1, None, **(MORE | cut | {"ep": here.size}))


def goes_on(folder: str, config: TrainConfig) -> None:
    rl.run(config, folder, resume=Path(folder).exists(), ranks=parallel.Ranks.of())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_experts_are_shared_whatever_else_a_step_does(size, tmp_path):
    """And a run that 2 ranks began goes on in one process, or on 4."""
    one, other = tmp_path / "one", tmp_path / "other"
    run = TrainConfig.from_dict(RUN.to_dict() | {"steps": 3, "atoms": 4})
    rl.run(run, one)
    ranks.run(2, goes_on, str(other), TrainConfig.from_dict(run.to_dict() | {"steps": 1, "ep": 2}))
    if size == 2:
        rl.run(run, other, resume=True)
    else:
        ranks.run(4, goes_on, str(other), TrainConfig.from_dict(run.to_dict() | {"ep": 4}))
    assert metrics(other) == metrics(one)
    assert saved(other) == saved(one)
    wanted = trained(updates=1, **MORE)
    for result in ranks.run(size, more_on_a_rank):
        assert result["metrics"] == wanted["metrics"]
        for what in ("grads", "engine"):
            assert all(torch.equal(a, b) for a, b in zip(result[what], wanted[what], strict=True)), what


def test_what_ranks_cannot_share_is_refused_by_name():
    ranks_, tree = parallel.Ranks(0, 2), parallel.order(2)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts; leave ep out"):
        ExpertParallel(tiny_model(), tree, ranks_, ranks_)
    odd = tiny_moe_model(num_experts=3)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts has 3 experts, which 2 ranks cannot share evenly"):
        ExpertParallel(odd, tree, ranks_, ranks_)
    for wrong, message in (
        ({"ep": 3}, "ep is 3; it must be a power of two"),
        ({"ep": 2, "fsdp": True, "atoms": 2}, "fsdp is True; it must be false with ep above 1"),
        ({"ep": 2, "segments": 2}, "ep is 2; it must be 1 with segments above 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict(wrong)


@pytest.mark.parametrize("frozen", [None, "gate_up_proj", "down_proj"])
def test_a_backward_without_main_grads_is_refused(frozen):
    experts = nn.Experts(4, 16, 16)
    experts.share(0, 2, cast(Any, object()))
    if frozen:
        experts.get_submodule(frozen).requires_grad_(False)
    with pytest.raises(RuntimeError, match="2 of 4 experts are this rank's"):
        experts(torch.zeros(1, 16), torch.ones(1, 2), torch.tensor([[0, 1]], dtype=torch.int32))


def test_one_sum_for_all_ranks_is_refused():
    experts = nn.Experts(4, 16, 16)
    experts.share(0, 2, cast(Any, object()))
    experts.gate_up_proj.main_grad = torch.zeros_like(experts.gate_up_proj.weight)
    with pytest.raises(TypeError, match=r"main_grad is a tensor \[2, 32, 16\], one sum; .* one for each rank"):
        experts(torch.zeros(1, 16), torch.ones(1, 2), torch.tensor([[0, 1]], dtype=torch.int32))


def test_of_frozen_experts_a_rank_has_its_rows_too():
    ranks_, made = parallel.Ranks(1, 2), tiny_moe_model()
    name = "model.layers.0.mlp.experts.gate_up_proj.weight"
    whole = made.get_parameter(name).requires_grad_(False).shape
    rows, own = ExpertParallel(made, parallel.order(2), ranks_, ranks_).rows()[name]
    assert (rows.shape, rows.start) == (whole, 2)
    assert len(own) == 2
