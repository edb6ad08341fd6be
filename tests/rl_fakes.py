"""A model and an engine in plain torch, registered as "table": logits come from a table by the last token alone.

They live where kernels run, for the optimizer's are real.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bi_ops import models
from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.core.orders import OrderRecord
from bi_ops.models import packing
from bi_ops.rollout import factory
from bi_ops.rollout.base import Completion, check_request

#: What a TrainConfig needs so that a run takes them.
TABLE: dict[str, Any] = {"engine": "table", "architecture": {"model_type": "table", "vocab_size": 12}}
ORDERS = OrderRecord("table", {"lookup": {"kind": "Row"}})


class TableConfig(SimpleNamespace):
    @classmethod
    def from_dict(cls, values) -> TableConfig:
        return cls(vocab_size=values["vocab_size"], max_position_embeddings=64)


class TableModel(nn.Module):
    def __init__(self, config=None, seed: int = 0) -> None:
        super().__init__()
        self.config = config or TableConfig.from_dict(TABLE["architecture"])
        shape = (self.config.vocab_size, self.config.vocab_size)
        self.table = nn.Parameter(torch.empty(shape, device=runtime.default_device()))
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        self.table.copy_(torch.randn(self.table.shape, generator=torch.Generator().manual_seed(seed)))

    @property
    def unit_tokens(self) -> int:
        return packing.UNIT_TOKENS

    def warmup(self) -> None:
        pass

    def orders(self, training=False) -> OrderRecord:
        return ORDERS

    def adopt(self, record: OrderRecord) -> None:
        if record != ORDERS:
            raise RuntimeError(f"other orders: {record.differences(ORDERS)}")

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.table[ids].bfloat16().float(), dim=-1)

    def token_logprobs(self, batch) -> torch.Tensor:
        rows = self.logprobs(batch.input_ids[batch.logit_indices])
        return rows.gather(1, batch.targets[:, None])[:, 0]

    def allocate_main_grads(self) -> None:
        """Autograd's own sum will do."""

    def collect_main_grads(self) -> None:
        """See allocate_main_grads."""

    def save_pretrained(self, path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file({"table": self.table.detach()}, Path(path) / "model.safetensors")
        write_json(Path(path) / "config.json", {"model_type": "table", "vocab_size": self.config.vocab_size})

    @classmethod
    def from_pretrained(cls, path, *dtypes_and_device) -> TableModel:
        table = load_file(Path(path) / "model.safetensors")["table"]
        model = cls(TableConfig.from_dict({"vocab_size": table.shape[0]}))
        model.table.data.copy_(table)
        return model


class TableEngine:
    """`broken_at`: a (call, sequence, position) whose log-probability is off by one bit, or NaN; calls count from 0."""

    name = "table"
    max_model_len = 64
    orders: OrderRecord | None = ORDERS
    breaks_to_nan = False

    def __init__(self, model: TableModel, broken_at: tuple[int, int, int] | None = None) -> None:
        self.model = TableModel(model.config)
        self.broken_at, self.calls, self.closed = broken_at, 0, False
        self.update_weights(model)

    def update_weights(self, model: TableModel) -> None:
        self.model.load_state_dict(model.state_dict())

    @torch.no_grad()
    def generate(self, prompts, params) -> list[Completion]:
        vocab = self.model.config.vocab_size
        out = []
        params = check_request(prompts, params, vocab_size=vocab, max_model_len=64)
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            generator = torch.Generator().manual_seed(p.seed)
            tokens: list[int] = []
            scores = []
            for _ in range(p.max_new_tokens):
                last = torch.tensor([(*prompt, *tokens)[-1]], device=runtime.default_device())
                row = self.model.logprobs(last)[0].cpu()
                tokens.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
                scores.append(row[tokens[-1]])
            logprobs = torch.stack(scores)
            if self.broken_at is not None and self.broken_at[:2] == (self.calls, i):
                if self.breaks_to_nan:
                    logprobs[self.broken_at[2]] = float("nan")
                else:
                    logprobs.view(torch.int32)[self.broken_at[2]] ^= 1
            out.append(Completion(tuple(prompt), tuple(tokens), logprobs, "length"))
        self.calls += 1
        return out

    def describe(self) -> dict[str, object]:
        return {"engine": self.name}

    def close(self) -> None:
        self.closed = True


#: Of the engines that are made by name.
_settings: dict = {"broken_at": None}


def _make(path, model, attention=None):
    return TableEngine(model, _settings["broken_at"])


models.register("table", cast(Any, TableConfig), cast(Any, TableModel))
factory.register("table", factory.Entry(_make, True, lambda path, attention: ORDERS))


@contextlib.contextmanager
def fresh_settings():
    """Yields the settings of engines that are made by name, and gives them back as they were."""
    before = dict(_settings)
    try:
        yield _settings
    finally:
        _settings.update(before)
