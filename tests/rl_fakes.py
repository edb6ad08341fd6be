"""A model and an engine in plain torch that stand in for Qwen3: logits come from a table by the last token alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bi_ops.rollout.base import Completion, check_request


class TableModel(nn.Module):
    def __init__(self, vocab_size: int = 12, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=64)
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)))

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
        (Path(path) / "config.json").write_text(json.dumps({"vocab_size": self.config.vocab_size}))

    @classmethod
    def from_pretrained(cls, path) -> TableModel:
        table = load_file(Path(path) / "model.safetensors")["table"]
        model = cls(table.shape[0])
        model.table.data.copy_(table)
        return model


class TableEngine:
    """`broken_at`: a (call, sequence, position) whose log-probability is off by one bit, or NaN; calls count from 0."""

    name = "table"
    max_model_len = 64
    attention = None
    breaks_to_nan = False

    def __init__(self, model: TableModel, broken_at: tuple[int, int, int] | None = None) -> None:
        self.model = TableModel(model.config.vocab_size)
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
                row = self.model.logprobs(torch.tensor([(*prompt, *tokens)[-1]]))[0]
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
