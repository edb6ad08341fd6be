"""Log-probabilities of chosen tokens straight from hidden states: of large logits a chunk of rows exists at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch

from bi_ops import logprob, matmul
from bi_ops.core import checks, rounding
from bi_ops.core.main_grad import MainGrad, open_buffer
from bi_ops.core.operators import custom_op
from bi_ops.core.transforms import Node

#: Bytes of logits that are kept for the backward; what is beyond is computed again, chunk by chunk.
WHOLE_BYTES = 1 << 31
#: Bytes of a chunk of logits: enough rows for whole waves of tiles, and a weight gradient that is not read too often.
CHUNK_BYTES = 1 << 30


def chunks_of(n_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Rows, front to back, so many at a time."""
    for start in range(0, n_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, n_rows))


def rows_at_once(op: str, n_rows: int, row_bytes: int, chunk_rows: int | None) -> tuple[int, int]:
    """(rows of logits of a chunk, how many chunks are kept for the backward); row_bytes: of a row of logits.

    chunk_rows: if given, rows of a chunk, of which none is kept where there are several. Else all rows are one that is
    kept, up to `WHOLE_BYTES`; of more, chunks of `CHUNK_BYTES`, of which the first are kept.

    Raises:
        ValueError: chunk_rows below 1 or no multiple of TOKEN_STEP. TypeError: no integer.
    """
    step = matmul.TOKEN_STEP
    if chunk_rows is None:
        if n_rows * row_bytes <= WHOLE_BYTES:
            return max(n_rows, 1), 1
        chunk_rows = max(CHUNK_BYTES // row_bytes // step, 1) * step
        return chunk_rows, WHOLE_BYTES // (chunk_rows * row_bytes)
    checks.integer(op, "chunk_rows", chunk_rows)
    if chunk_rows < 1 or chunk_rows % step:
        raise ValueError(f"{op}: chunk_rows must be a positive multiple of {step}, got {chunk_rows}")
    return chunk_rows, int(n_rows <= chunk_rows)


def may_keep(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Will a backward ask for logits, and may they wait beside the graph? Not in one that torch.compile traces."""
    has_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return has_backward and not torch.compiler.is_compiling()


@custom_op("bi_ops::linear_token_logprobs_backward", mutates_args={"main_grad", "logits_of_chunks"})
def _chunked_grad(
    main_grad: torch.Tensor,
    logits_of_chunks: list[torch.Tensor],
    g: torch.Tensor,
    g_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    row_max: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    accumulate: bool,
) -> torch.Tensor:
    """The gradient of hidden, empty where not needed; the weight's is added to main_grad, or not `accumulate` written.

    logits_of_chunks: of the first chunks, which their gradient is written over; those of the others are computed again.
    An operator, because torch.compile does not trace the loop's checks in a backward.
    """
    kept = logprob.TokenStats(logprobs, row_max, lse, entropy)
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    buffer = main_grad if accumulate else MainGrad(main_grad.shape, main_grad.device, main_grad)
    for i, part in enumerate(chunks_of(len(ids), chunk_rows)):
        logits = logits_of_chunks[i] if i < len(logits_of_chunks) else matmul.linear(hidden[part], weight)
        stats = logprob.TokenStats(*(t[part] for t in kept))
        parts = (g[part], None if g_entropy is None else g_entropy[part])
        dlogits = logprob.token_stats_backward_(logits, ids[part], stats, *parts)
        if need_hidden:
            dhidden[part] = matmul.mm(dlogits, weight)
        if need_weight:
            matmul.accumulate_weight_grad(buffer, dlogits, hidden[part].contiguous())
        del logits, dlogits  # before the next chunk's
    if need_weight and isinstance(buffer, MainGrad):
        buffer.collect()  # zeros where there were no rows
    return dhidden


@_chunked_grad.register_fake
def _(main_grad, logits_of_chunks, g, g_entropy, hidden, *rest):
    *_, need_hidden, _, _ = rest
    return hidden.new_empty(hidden.shape if need_hidden else 0)


class _LinearTokenLogprobs(Node):
    """Both passes walk the chunks front to back, so the weight gradient has the bits of one pass over all rows.

    The backward writes each chunk's gradient over its logits. What the softmax sums is kept from the forward, and the
    logits of the first `n_kept` chunks, which a second backward computes again as those of the others.
    """

    operator = "linear_token_logprobs"

    @staticmethod
    def forward(ctx, hidden, weight, ids, main_grad, chunk_rows, n_kept, entropy):
        rounded = rounding.rounded(weight, hidden.dtype)  # once for both passes
        found, ctx.logits = [], []
        for part in chunks_of(len(ids), chunk_rows):
            logits = matmul.linear(hidden[part], rounded)
            found.append(logprob.token_stats(logits, ids[part], entropy))
            if len(ctx.logits) < n_kept:
                ctx.logits.append(logits)
            del logits  # before the next chunk's
        out = [torch.cat(parts) for parts in zip(*found, strict=True)]
        stats = logprob.TokenStats(*out) if out else logprob.TokenStats(*hidden.new_empty((4, 0), dtype=torch.float32))
        ctx.save_for_backward(hidden, rounded, ids, *(t.detach() for t in stats))
        ctx.main_grad, ctx.chunk_rows, ctx.weight_dtype, ctx.entropy = main_grad, chunk_rows, weight.dtype, entropy
        if not entropy:
            ctx.mark_non_differentiable(stats.entropy)
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, ids, *kept = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, []
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        if need_weight and ctx.main_grad is not None:
            buffer, holds_sum = open_buffer(ctx.main_grad)
        else:
            buffer, holds_sum = hidden.new_empty(weight.shape if need_weight else 0, dtype=torch.float32), False
        dhidden = _chunked_grad(
            *(buffer, logits, g, g_entropy if ctx.entropy else None, hidden, weight, ids, *kept),
            *(ctx.chunk_rows, need_hidden, need_weight, holds_sum),
        )
        dweight = buffer.to(ctx.weight_dtype) if need_weight and ctx.main_grad is None else None
        return dhidden if need_hidden else None, dweight, None, None, None, None, None


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    main_grad: torch.Tensor | MainGrad | None = None,
    chunk_rows: int | None = None,
    return_entropy: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    main_grad: torch.Tensor | MainGrad | None = None,
    chunk_rows: int | None = None,
    *,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    main_grad: torch.Tensor | MainGrad | None = None,
    chunk_rows: int | None = None,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``token_logprobs(linear(hidden, weight), ids)``, bit for bit, with a bounded piece of the logits in memory.

    The backward computes the logits of a chunk that was not kept again, one GEMM more than without chunks, and writes
    their gradient over them. Gradients are those of the two operators too: a row's own, and a weight gradient that is
    accumulated over the rows front to back in fp32 and rounded once. Logits are never stored in more than the dtype of
    hidden.

    Args:
        hidden: [T, K], bf16, fp16 or fp32. weight: [V, K], the dtype of hidden or fp32. ids: int64 [T], in [0, V).
        main_grad: fp32 [V, K], contiguous, or a `MainGrad`, or None; as in `bi_ops.matmul.linear`.
        chunk_rows: rows of logits held at once, a multiple of `bi_ops.matmul.TOKEN_STEP`; none are kept for the
            backward. None: all are kept, up to 2 GiB of logits (`WHOLE_BYTES`); of more 1 GiB (`CHUNK_BYTES`) is
            computed at a time, and the first 2 GiB are kept, but under torch.compile. It changes no bit.
        return_entropy: also the entropy of each row's softmax, as `bi_ops.logprob.token_logprobs`.

    Returns:
        fp32 [T], natural logarithm; with `return_entropy` (that, the entropy in nats, fp32 [T]).

    Raises:
        ValueError: chunk_rows below 1 or no multiple of TOKEN_STEP, ids and hidden of different lengths; otherwise
        TypeError, ValueError and IndexError as `bi_ops.matmul.linear` and `bi_ops.logprob.token_logprobs`.
    """
    op = "linear_token_logprobs"
    for name, t in (("hidden", hidden), ("weight", weight), ("ids", ids)):
        checks.tensor(op, name, t)
    if (hidden.ndim, weight.ndim, ids.ndim) != (2, 2, 1) or len(ids) != len(hidden):
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, ids {list(ids.shape)}"
        raise ValueError(f"{op}: needs hidden [T, K], weight [V, K] and ids [T], got {shapes}")
    checks.dtype(op, "hidden", hidden)
    checks.dtype(op, "weight", weight, (hidden.dtype, torch.float32))
    checks.same_device(op, hidden=hidden, weight=weight, ids=ids)
    checks.shape(
        op,
        hidden.shape[1] == weight.shape[1],
        lambda: f"hidden {list(hidden.shape)} does not fit weight {list(weight.shape)}",
    )
    checks.boolean(op, "return_entropy", return_entropy)
    if main_grad is not None:
        checks.main_grad(op, "main_grad", main_grad, weight.shape, weight.device)
    whole = chunk_rows is None
    chunk_rows, n_kept = rows_at_once(op, len(ids), weight.shape[0] * hidden.element_size(), chunk_rows)
    if whole and len(ids) <= chunk_rows:
        logits = matmul.linear(hidden, weight, main_grad=main_grad)
        return logprob.token_logprobs(logits, ids, return_entropy)
    n_kept = n_kept if may_keep(hidden, weight) else 0
    out, entropy = _LinearTokenLogprobs.apply(hidden, weight, ids, main_grad, chunk_rows, n_kept, return_entropy)
    return (out, entropy) if return_entropy else out
