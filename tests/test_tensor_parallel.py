"""Ranks that share a model end in the bytes of one process of the same segments; on ranks that talk over gloo."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from test_fsdp import Copy
from test_microbatches import Lengths
from test_parallel import equal
from tiny import tiny_model

from bi_ops import parallel
from bi_ops.parallel.tensor import OrderedAllReduce, TensorParallel
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.trainer import Trainer

SEGMENTS, UPDATES = 4, 3
#: Four sequences in two atoms.
CONFIG = {"prompts_per_step": 2, "group_size": 2, "atoms": 2}
#: Micro-batches: each atom in one, or the first in two.
CUTS: tuple[dict[str, Any], ...] = ({}, {"max_tokens_per_microbatch": 21})


def shared_model(segments: int = SEGMENTS, **changes: Any) -> Any:
    """With as many heads as there are segments."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return tiny_model(segments=segments, **(sizes | changes))


class Library(OrderedAllReduce):
    """The control: partial outputs are rounded, then a library adds them."""

    def __call__(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = partial.to(dtype)
        dist.all_reduce(rounded, group=self.ranks.group)
        return rounded


def trained(here: parallel.Ranks = parallel.ALONE, library: bool = False, **changes: Any) -> dict[str, Any]:
    """Three updates on sequences that are given: what every rank reports, and whole weights on the first."""
    config = TrainConfig.from_dict({"segments": SEGMENTS} | CONFIG | changes)
    model, engine = shared_model(config.segments), cast(Any, Copy(shared_model(config.segments)))
    sum_of = Library if library else OrderedAllReduce
    with mock.patch("bi_ops.parallel.tensor.layout.OrderedAllReduce", sum_of):
        trainer = Trainer(config, model, engine, cast(Any, Lengths()), ranks=here)
    trainer.generate = lambda prompts, params: trainer.engine.generate(prompts, params)  # type: ignore[method-assign]
    if library:
        trainer.check = lambda *args: mock.MagicMock(tokens_checked=1, identical=True)  # type: ignore
    layout = cast(TensorParallel, trainer.layout)
    with mock.patch.object(type(model), "unit_tokens", 1):
        steps = [trainer.step(step) for step in range(1, UPDATES + 1)]
    grads = {}
    if isinstance(layout, TensorParallel):
        for name, p in model.named_parameters():
            layer = layout._layers.get(name.removesuffix(".weight"))
            g = p.grad
            grads[name] = g if layer is None else layout._joined(layer, list(layout._gathered(g)))
    else:
        grads = {n: p.grad for n, p in model.named_parameters()}
    return {
        # The loss that is reported is added up micro-batch by micro-batch.
        "metrics": [(s.grad_norm, s.kl, s.tokens_checked, s.tokens_different, s.clip_fraction) for s in steps],
        "grads": list(grads.values()),
        "weights": list((layout.collected() or dict(model.named_parameters())).values()),
        "engine": [p.detach().bfloat16() for p in engine.model.parameters()],
    }


def on_a_rank(tp: int) -> list[dict[str, Any]]:
    here = parallel.Ranks.of()
    return [trained(here, tp=tp, **cut) for cut in CUTS]


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_that_share_a_model_end_in_the_bytes_of_one_process(tp, dp):
    one = trained()
    for rank, found in enumerate(ranks.run(tp * dp, on_a_rank, tp)):
        for result in found:
            assert result["metrics"] == one["metrics"]
            assert equal(result["grads"], one["grads"])
            assert all(torch.equal(a, b) for a, b in zip(result["engine"], one["engine"], strict=True))
            if rank == 0:
                assert equal(result["weights"], one["weights"])
