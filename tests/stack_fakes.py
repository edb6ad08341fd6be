"""A model of a few of bi_ops' layers and an engine for it, registered as "stack": what `rl_fakes` is, in layers that
carry their gradients, so that they can be sharded. Logits come from the last token alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import torch
from rl_fakes import ORDERS, TableConfig, TableEngine
from safetensors.torch import load_file, save_file

from bi_ops import models, nn
from bi_ops.core import runtime
from bi_ops.models import packing
from bi_ops.rollout import factory

#: What a TrainConfig needs so that a run takes them.
STACK: dict[str, Any] = {"engine": "stack", "architecture": {"model_type": "stack", "vocab_size": 11}}


class StackModel(torch.nn.Module):
    """What a language model has: layers, and a tied head outside of the forward. No number of ranks divides 11 rows."""

    compute_dtype = torch.bfloat16

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config or TableConfig.from_dict(STACK["architecture"])
        n, device = self.config.vocab_size, runtime.default_device()
        self.embed = nn.Embedding(n, 16, device=device)
        self.layers = torch.nn.ModuleList(nn.Linear(16, 16, bias=False, device=device) for _ in range(2))
        self.head = nn.Linear(16, n, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, device="cpu"))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids, torch.bfloat16)
        for layer in self.layers:
            x = x + 0.25 * layer(x)
        return x

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.head(0.25 * self(ids)).float(), dim=-1)

    def token_logprobs(self, batch: Any) -> torch.Tensor:
        rows = self.logprobs(batch.input_ids)[batch.logit_indices]
        return rows.gather(1, batch.targets[:, None])[:, 0]

    @property
    def unit_tokens(self) -> int:
        return packing.UNIT_TOKENS

    def warmup(self) -> None:
        pass

    def orders(self, training: bool = False) -> Any:
        return ORDERS

    def adopt(self, record: Any) -> None:
        assert record == ORDERS

    def save_pretrained(self, path: Any, parameters: Any = None) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        found = parameters or dict(self.named_parameters())
        save_file({n: p.detach() for n, p in found.items()}, Path(path) / "model.safetensors")
        (Path(path) / "config.json").write_text(
            json.dumps({"model_type": "stack", "vocab_size": self.config.vocab_size})
        )

    @classmethod
    def from_pretrained(cls, path: Any, *dtypes_and_device: Any) -> StackModel:
        model = cls()
        model.load_state_dict(load_file(Path(path) / "model.safetensors"), strict=False)
        return model


class StackEngine(TableEngine):
    """As `TableEngine`."""

    def __init__(self, model: StackModel) -> None:
        self.model = cast(Any, StackModel(model.config))
        self.broken_at, self.calls, self.closed = None, 0, False
        self.update_weights(cast(Any, model))

    @torch.no_grad()
    def update_weights(self, model: Any) -> None:
        for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(new)


def kill_this_process() -> None:
    """At once, without a word to anyone."""
    os.kill(os.getpid(), signal.SIGKILL)


models.register("stack", cast(Any, TableConfig), cast(Any, StackModel))
factory.register(
    "stack",
    factory.Entry(
        lambda path, model, attention=None: StackEngine(cast(Any, model)), True, lambda path, attention: ORDERS
    ),
)
