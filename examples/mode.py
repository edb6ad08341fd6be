"""Batch-invariant mode on a plain PyTorch model: no line of the model changes.

    python examples/mode.py

Counts the rows whose logits change when the batch around them changes, without the mode and with it, then takes two
training steps from the same weights and compares the gradients.
"""

from __future__ import annotations

import bi_ops  # before triton, and before what imports triton
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, kernels run in Triton's interpreter
VOCAB, HIDDEN, TOKENS = 50, 256, 16


class Model(torch.nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.norm = torch.nn.RMSNorm(HIDDEN)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 64), torch.nn.SiLU(), torch.nn.Linear(64, VOCAB))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> logits [T, VOCAB]."""
        return self.mlp(self.norm(self.embedding(ids)))


def rows_that_change(model: Model, ids: torch.Tensor) -> int:
    """Rows whose logits have other bits alone than in the batch."""
    together = model(ids)
    return sum(not torch.equal(model(ids[i : i + 1])[0], together[i]) for i in range(len(ids)))


def gradients(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of one training step, in the order of the parameters."""
    loss = F.cross_entropy(model(ids[:-1]), ids[1:])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def main() -> None:
    torch.manual_seed(0)
    model, ids = Model().to(DEVICE), torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    print(f"without the mode  {rows_that_change(model, ids)} of {TOKENS} rows change with the batch")
    with bi_ops.batch_invariant_backward_mode():
        print(f"with the mode     {rows_that_change(model, ids)} of {TOKENS} rows change with the batch")
        first, second = gradients(model, ids), gradients(model, ids)
    equal = sum(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    print(f"gradients         {equal} of {len(first)} have the same bits on a second run")


if __name__ == "__main__":
    main()
