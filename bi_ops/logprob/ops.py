"""Log-probabilities: check, allocate, launch, differentiate."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks, pdl, runtime
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.limits import SMALL, check_programs
from bi_ops.core.operators import custom_op, on_device_of_first
from bi_ops.core.rows import aligned_rows
from bi_ops.core.triton_helpers import PINNED
from bi_ops.logprob import order as orders
from bi_ops.logprob.config import RowConfig, SplitConfig, row_config, token_config
from bi_ops.logprob.kernels import (
    softmax_dx_kernel,
    softmax_kernel,
    token_logprobs_dx_kernel,
    token_logprobs_kernel,
)
from bi_ops.logprob.split_kernels import row_part_max_kernel, row_token_logprobs_kernel

# --------------------------------------------------------------------------------------------------------------
# launch. config: None for the one of this size


def _order(x: torch.Tensor) -> orders.RowOrder:
    return orders.order(orders.Problem(x.shape[-1], x.dtype), arches.of(x.device))


def _is_large(op: str, rows: torch.Tensor) -> bool:
    """Do rows or columns need 64 bits? Raises ValueError if a grid cannot hold a program for each row."""
    large = max(rows.shape) >= SMALL
    if large:
        check_programs(op, rows.shape[0])
    return large


def launch_softmax(x: torch.Tensor, log: bool, dtype: torch.dtype, config: RowConfig | None = None) -> torch.Tensor:
    """Softmax, or if `log` its logarithm, over the last dimension, in `dtype`."""
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel() == 0:
        return y
    rows, order = aligned_rows(x), _order(x)
    c = config or row_config(*rows.shape)
    softmax_kernel[(cdiv(rows.shape[0], c.rows),)](
        rows,
        y,
        *rows.shape,
        rows.stride(0),
        LOG=log,
        ROWS=c.rows,
        BLOCK=order.block,
        LARGE=_is_large("softmax", rows),
        num_warps=order.num_warps,
        **PINNED,
    )
    return y


def launch_softmax_backward(
    g: torch.Tensor, y: torch.Tensor, log: bool, dtype: torch.dtype, config: RowConfig | None = None
) -> torch.Tensor:
    """The gradient of x in `dtype`, from that of y and y itself."""
    dx = y.new_empty(y.shape, dtype=dtype)
    if y.numel() == 0:
        return dx
    g_rows, y_rows, order = aligned_rows(g), aligned_rows(y), _order(y)
    c = config or row_config(*y_rows.shape)
    softmax_dx_kernel[(cdiv(y_rows.shape[0], c.rows),)](
        g_rows,
        y_rows,
        dx,
        *y_rows.shape,
        g_rows.stride(0),
        y_rows.stride(0),
        LOG=log,
        ROWS=c.rows,
        BLOCK=order.block,
        LARGE=_is_large("softmax", y_rows),
        num_warps=order.num_warps,
        **PINNED,
    )
    return dx


class TokenStats(NamedTuple):
    """What the rows of logits [T, V] come to, fp32 [T] each: all that their gradient needs besides themselves.

    logprobs: of the chosen tokens. row_max: the maximum. lse: log(sum(exp(x - row_max))). entropy: of the softmax, in
    nats; empty unless it was asked for.
    """

    logprobs: torch.Tensor
    row_max: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


def launch_token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, entropy: bool = False, config: RowConfig | SplitConfig | None = None
) -> TokenStats:
    """The statistics of each row. config: None for the one of this size; a row is never split for its entropy."""
    n_rows = logits.shape[0]
    out, row_max, lse, h = (
        logits.new_empty(n, dtype=torch.float32) for n in (n_rows, n_rows, n_rows, n_rows * entropy)
    )
    if n_rows > 0:
        rows, order = aligned_rows(logits), _order(logits)
        # How another Triton adds within a thread was not compared between one program and many.
        one = entropy or order.thread_sums != "sequential"
        c = config or (row_config(*rows.shape) if one else token_config(*rows.shape, rows.element_size()))
        if isinstance(c, SplitConfig):
            _launch_split(rows, ids, out, row_max, lse, order, c)
            return TokenStats(out, row_max, lse, h)
        token_logprobs_kernel[(cdiv(n_rows, c.rows),)](
            rows,
            ids,
            out,
            row_max,
            lse,
            h if entropy else None,
            *rows.shape,
            rows.stride(0),
            ROWS=c.rows,
            BLOCK=order.block,
            ENTROPY=entropy,
            LARGE=_is_large("token_logprobs", rows),
            num_warps=order.num_warps,
            **PINNED,
        )
    return TokenStats(out, row_max, lse, h)


def _launch_split(
    rows: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    row_max: torch.Tensor,
    lse: torch.Tensor,
    order: orders.RowOrder,
    config: SplitConfig,
    ranks: torch.Tensor | None = None,
) -> None:
    """`token_logprobs_kernel` with the programs of `split_kernels`. ranks: int64 [T], counted in the same pass."""
    (n_rows, n), stride = rows.shape, rows.stride(0)
    n_chunks = cdiv(n, order.block)
    n_parts = cdiv(n_chunks, config.chunks)
    part_max, sums = (rows.new_empty((n_rows, m), dtype=torch.float32) for m in (n_parts, n_chunks))
    done = rows.new_empty(n_rows, dtype=torch.int32)
    tile = {"CHUNKS": config.chunks, "LARGE": _is_large("token_logprobs", rows)}
    tile |= pdl.launch_options(arches.of(rows.device))
    grid = n_rows, n_parts
    row_part_max_kernel[grid](rows, part_max, done, ranks, n, stride, n_parts, BLOCK=order.block, **tile, **PINNED)
    row_token_logprobs_kernel[grid](
        *(rows, ids, part_max, sums, done, out, row_max, lse, ranks, n, stride, n_parts, n_chunks),
        BLOCK=order.block,
        PARTS_2=next_power_of_2(n_parts),
        AHEAD=config.ahead,
        num_warps=order.num_warps,
        **tile,
        **PINNED,
    )


@on_device_of_first
def launch_ranked_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, config: SplitConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, ranks) of `ids`; config: None for the one of this size."""
    n_rows = logits.shape[0]
    rows, order = aligned_rows(logits), _order(logits)
    c = config or token_config(n_rows, logits.shape[1], logits.element_size())
    if n_rows > 0 and isinstance(c, SplitConfig) and order.thread_sums == "sequential":
        out, row_max, lse = (logits.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
        ranks = ids.new_empty(n_rows)
        _launch_split(rows, ids, out, row_max, lse, order, c, ranks)
        return out, ranks
    known = (ids >= 0) & (ids < logits.shape[1])
    chosen = logits.gather(1, ids.where(known, 0)[:, None])
    return launch_token_logprobs(logits, ids).logprobs, ((logits >= chosen) & known[:, None]).sum(1)


def launch_token_logprobs_backward(
    g: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    row_max: torch.Tensor,
    lse: torch.Tensor,
    g_entropy: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: RowConfig | None = None,
) -> torch.Tensor:
    """The gradient of the logits: every element by itself, from the sums of the forward. out: may be the logits."""
    dx = logits.new_empty(logits.shape) if out is None else out
    if logits.numel() > 0:
        rows, order = aligned_rows(logits), _order(logits)
        c = config or row_config(*rows.shape)
        token_logprobs_dx_kernel[(cdiv(rows.shape[0], c.rows), cdiv(rows.shape[1], c.cols))](
            g.contiguous(),
            rows,
            ids,
            row_max,
            lse,
            None if g_entropy is None else g_entropy.contiguous(),
            entropy,
            dx,
            *rows.shape,
            rows.stride(0),
            dx.stride(0),
            ROWS=c.rows,
            BLOCK=c.cols,
            ENTROPY=g_entropy is not None,
            LARGE=_is_large("token_logprobs", rows),
            num_warps=order.num_warps,
            **PINNED,
        )
    return dx


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::softmax")
def _softmax(x: torch.Tensor, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return launch_softmax(x, log, dtype)


@_softmax.register_fake
def _(x, log, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@custom_op("bi_ops::softmax_backward")
def _softmax_grad(g: torch.Tensor, y: torch.Tensor, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return launch_softmax_backward(g, y, log, dtype)


@_softmax_grad.register_fake
def _(g, y, log, dtype):
    return y.new_empty(y.shape, dtype=dtype)


def _softmax_setup(ctx, inputs, output):
    x, ctx.log, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output)


def _softmax_backward(ctx, g):
    (y,) = ctx.saved_tensors
    return _softmax_grad(g, y, ctx.log, ctx.x_dtype), None, None


_softmax.register_autograd(_softmax_backward, setup_context=_softmax_setup)


@custom_op("bi_ops::token_logprobs")
def _token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(launch_token_logprobs(logits, ids, entropy))  # type: ignore[return-value]


@_token_logprobs.register_fake
def _(logits, ids, entropy=False):
    n = logits.shape[0]
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in (n, n, n, n if entropy else 0))


@custom_op("bi_ops::token_logprobs_backward")
def _token_logprobs_grad(
    g: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    row_max: torch.Tensor,
    lse: torch.Tensor,
    g_entropy: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    return launch_token_logprobs_backward(g, logits, ids, row_max, lse, g_entropy, entropy)


@_token_logprobs_grad.register_fake
def _(g, logits, ids, row_max, lse, g_entropy=None, entropy=None):
    return logits.new_empty(logits.shape)


@custom_op("bi_ops::token_logprobs_backward_", mutates_args={"logits"})
def _token_logprobs_grad_(
    logits: torch.Tensor,
    g: torch.Tensor,
    ids: torch.Tensor,
    row_max: torch.Tensor,
    lse: torch.Tensor,
    g_entropy: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> None:
    launch_token_logprobs_backward(g, logits, ids, row_max, lse, g_entropy, entropy, out=logits)


@_token_logprobs_grad_.register_fake
def _(logits, g, ids, row_max, lse, g_entropy=None, entropy=None):
    return None


def _token_logprobs_setup(ctx, inputs, output):
    logits, ids, ctx.with_entropy = inputs
    ctx.save_for_backward(logits, ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:3], *(() if ctx.with_entropy else output[3:]))


def _token_logprobs_backward(ctx, g, _max, _lse, g_entropy):
    *saved, entropy = ctx.saved_tensors
    parts = (g_entropy, entropy) if ctx.with_entropy else (None, None)
    return _token_logprobs_grad(g, *saved, *parts), None, None


_token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_token_logprobs_setup)


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check(op: str, name: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the result: `dtype`, else that of x."""
    checks.tensor(op, name, x)
    checks.dtype(op, name, x)
    checks.shape(op, x.ndim >= 1, lambda: f"{name} needs a last dimension to normalise, {list(x.shape)}")
    return x.dtype if dtype is None else checks.result_dtype(op, dtype)


def log_softmax(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x - max - log(sum(exp(x - max)))`` over the last dimension, computed in fp32, rounded once.

    Args:
        x: [..., N], bf16, fp16 or fp32. dtype: of the result; None is the dtype of x.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong shape or device.
    """
    return _softmax(x, True, _check("log_softmax", "x", x, dtype))


def softmax(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``exp(x - max) / sum(exp(x - max))`` over the last dimension. Arguments and errors as `log_softmax`."""
    return _softmax(x, False, _check("softmax", "x", x, dtype))


def check_tokens(op: str, logits: torch.Tensor, ids: torch.Tensor, vocab_size: int | None = None) -> None:
    """Raise unless `ids` chooses a column of each row of `logits`; vocab_size: of rows of which logits are a part."""
    _check(op, "logits", logits)
    checks.tensor(op, "ids", ids, ndim=1)
    checks.same_device(op, logits=logits, ids=ids)
    ok = logits.ndim == 2 and logits.shape[1] > 0
    checks.shape(op, ok, lambda: f"logits must be [T, V] with V > 0, got {list(logits.shape)}")
    checks.shape(
        op, ids.shape == logits.shape[:1], lambda: f"ids {list(ids.shape)} do not fit logits {list(logits.shape)}"
    )
    checks.dtype(op, "ids", ids, (torch.int64,))
    if runtime.INTERPRET and not torch.compiler.is_compiling() and ids.numel() > 0:
        low, high, columns = int(ids.min()), int(ids.max()), logits.shape[1] if vocab_size is None else vocab_size
        if low < 0 or high >= columns:
            raise IndexError(f"{op}: ids reach from {low} to {high}; logits have {columns} columns")


@overload
def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, return_entropy: Literal[False] = False) -> torch.Tensor: ...
@overload
def token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, return_entropy: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, return_entropy: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, return_entropy: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each row's chosen token, what vLLM reports for a sampled token, in the same bits.

    vLLM's v2 model runner takes log-probabilities from bf16 logits, and so does its v1 runner with the plugin. Without
    it the v1 runner casts logits to fp32 first, whose bits are those of fp32 logits here.

    Args:
        logits: [T, V], bf16, fp16 or fp32. ids: int64 [T], each in [0, V) (checked here on the CPU only; on a GPU an
            id outside gives NaN). return_entropy: also the entropy of each row's softmax.

    Returns:
        fp32 [T], natural logarithm; with `return_entropy` (that, the entropy in nats, fp32 [T]). The gradient reaches
        the logits, in their dtype.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong shape or device. IndexError: an id outside [0, V).
    """
    op = "token_logprobs"
    check_tokens(op, logits, ids)
    checks.boolean(op, "return_entropy", return_entropy)
    out, _, _, entropy = _token_logprobs(logits, ids.contiguous(), return_entropy)
    return (out, entropy) if return_entropy else out


@torch.no_grad()
def ranked_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` without a gradient, and the ranks int64 [T] of the tokens: how many logits are not below theirs.

    What vLLM reports for sampled tokens, in one pass after that of the maximum. The rank of an id outside [0, V) is 0.
    Arguments and errors as `token_logprobs`.
    """
    check_tokens("ranked_logprobs", logits, ids)
    return launch_ranked_logprobs(logits, ids.contiguous())


@torch.no_grad()
def token_stats(logits: torch.Tensor, ids: torch.Tensor, entropy: bool = False) -> TokenStats:
    """`token_logprobs` without a gradient, and what `token_stats_backward_` needs. Arguments and errors as there."""
    check_tokens("token_stats", logits, ids)
    checks.boolean("token_stats", "entropy", entropy)
    return TokenStats(*_token_logprobs(logits, ids.contiguous(), entropy))


@torch.no_grad()
def token_stats_backward_(
    logits: torch.Tensor,
    ids: torch.Tensor,
    stats: TokenStats,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Overwrite `logits` with their gradient, the bits of `token_logprobs`', and return them: no second [T, V].

    Args:
        logits, ids: as `token_logprobs`, the logits with contiguous rows. stats: of `token_stats` for them. grad: fp32
            [T], of the log-probabilities. grad_entropy: fp32 [T], of the entropy, or None.

    Raises:
        TypeError, ValueError, IndexError: as `token_logprobs`; gradients of another shape or dtype; grad_entropy
            without an entropy in `stats`.
    """
    op = "token_stats_backward_"
    check_tokens(op, logits, ids)
    checks.shape(op, logits.stride(1) == 1 or logits.shape[1] == 1, lambda: "rows of logits must be contiguous")
    if not isinstance(stats, TokenStats):
        raise TypeError(f"{op}: stats must be a TokenStats, got {type(stats).__name__}")
    has_entropy = grad_entropy is not None
    named = {"grad": grad, "row_max": stats.row_max, "lse": stats.lse}
    named |= {"grad_entropy": grad_entropy, "entropy": stats.entropy} if grad_entropy is not None else {}
    for name, t in named.items():
        checks.tensor(op, name, t, ndim=1)
        checks.dtype(op, name, t, (torch.float32,))
        checks.shape(op, len(t) == len(logits), f"{name} {list(t.shape)} for {len(logits)} rows")
    checks.same_device(op, logits=logits, **named)
    entropy = stats.entropy if has_entropy else None
    _token_logprobs_grad_(logits, grad, ids.contiguous(), stats.row_max, stats.lse, grad_entropy, entropy)
    return logits
