"""Log-probabilities of chosen tokens straight from hidden states: the logits exist a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bi_ops import logprob, matmul
from bi_ops.core.transforms import Node

#: Bytes of logits that `linear_token_logprobs` holds at once unless it is told how many rows.
CHUNK_BYTES = 1 << 31


def _chunks(n_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, n_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, n_rows))


class _LinearTokenLogprobs(Node):
    """Both passes walk the chunks front to back, so the weight gradient has the bits of one pass over all rows."""

    operator = "linear_token_logprobs"

    @staticmethod
    def forward(ctx, hidden, weight, ids, main_grad, chunk_rows):
        rounded = weight.to(hidden.dtype)  # once for both passes
        parts = _chunks(len(ids), chunk_rows)
        found = [logprob.token_logprobs(matmul.linear(hidden[p], rounded), ids[p]) for p in parts]
        ctx.save_for_backward(hidden, rounded, ids)
        ctx.main_grad, ctx.chunk_rows, ctx.weight_dtype = main_grad, chunk_rows, weight.dtype
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, g):
        hidden, weight, ids = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        buffer = ctx.main_grad
        if need_weight and buffer is None:
            buffer = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _chunks(len(ids), ctx.chunk_rows):
            logits = matmul.linear(hidden[part], weight).requires_grad_()
            with torch.enable_grad():
                scores = logprob.token_logprobs(logits, ids[part])
            (dlogits,) = torch.autograd.grad(scores, logits, g[part])
            if dhidden is not None:
                dhidden[part] = matmul.mm(dlogits, weight)
            if need_weight:
                matmul.accumulate_weight_grad(buffer, dlogits, hidden[part].contiguous())
        dweight = buffer.to(ctx.weight_dtype) if need_weight and ctx.main_grad is None else None
        return dhidden, dweight, None, None, None


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    main_grad: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """``token_logprobs(linear(hidden, weight), ids)``, bit for bit, with a bounded piece of the logits in memory.

    The backward computes each chunk's logits again. Gradients are those of the two operators too: a row's own, and a
    weight gradient that is accumulated over the rows front to back in fp32 and rounded once.

    Args:
        hidden: [T, K], bf16, fp16 or fp32. weight: [V, K], the dtype of hidden or fp32. ids: int64 [T], in [0, V).
        main_grad: fp32 [V, K], contiguous, or None; as in `bi_ops.matmul.linear`.
        chunk_rows: rows of logits held at once, a multiple of `bi_ops.matmul.TOKEN_STEP`; None: as many as fit into
            `CHUNK_BYTES`. It changes no bit.

    Returns:
        fp32 [T], natural logarithm.

    Raises:
        ValueError: chunk_rows below 1 or no multiple of TOKEN_STEP, ids and hidden of different lengths; otherwise
        TypeError, ValueError and IndexError as the two operators.
    """
    op = "linear_token_logprobs"
    if hidden.ndim != 2 or weight.ndim != 2 or ids.ndim != 1 or len(ids) != len(hidden):
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, ids {list(ids.shape)}"
        raise ValueError(f"{op}: needs hidden [T, K], weight [V, K] and ids [T], got {shapes}")
    step = matmul.TOKEN_STEP
    if chunk_rows is None:
        chunk_rows = max(CHUNK_BYTES // max(weight.shape[0] * hidden.element_size(), 1) // step, 1) * step
    if chunk_rows < 1 or chunk_rows % step:
        raise ValueError(f"{op}: chunk_rows must be a positive multiple of {step}, got {chunk_rows}")
    return _LinearTokenLogprobs.apply(hidden, weight, ids, main_grad, chunk_rows)
