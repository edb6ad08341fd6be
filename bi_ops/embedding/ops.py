"""Embedding lookup: check, allocate, launch, differentiate."""

from __future__ import annotations

import torch

from bi_ops.core import checks
from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL
from bi_ops.core.main_grad import MainGrad, open_rows
from bi_ops.core.operators import custom_op
from bi_ops.core.transforms import Node
from bi_ops.core.triton_helpers import PINNED
from bi_ops.embedding.config import TileConfig, gradient_config, lookup_config
from bi_ops.embedding.kernels import embedding_backward_kernel, embedding_kernel

_ID_DTYPES = (torch.int64, torch.int32)

# --------------------------------------------------------------------------------------------------------------
# launch


def check_range(op: str, ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError if a CPU id is outside 0..rows-1; on a GPU asking would wait for the device."""
    if ids.device.type == "cpu" and ids.numel() > 0 and not ((ids >= 0) & (ids < rows)).all():
        raise IndexError(f"{op}: ids span {int(ids.min())}..{int(ids.max())}, the table has rows 0..{rows - 1}")


def launch_lookup(
    ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, config: TileConfig | None = None
) -> torch.Tensor:
    """weight[ids] in `dtype`; [..., D]. config: None for the one of this size."""
    check_range("embedding", ids, weight.shape[0])
    n_rows, n_cols = ids.numel(), weight.shape[1]
    y = weight.new_empty((*ids.shape, n_cols), dtype=dtype)
    if y.numel() == 0:
        return y
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    c = config or lookup_config(n_rows, n_cols)
    embedding_kernel[(cdiv(n_rows, c.rows), cdiv(n_cols, c.cols))](
        ids.contiguous(),
        weight,
        y,
        n_rows,
        n_cols,
        weight.shape[0],
        weight.stride(0),
        ROWS=c.rows,
        COLS=c.cols,
        LARGE=n_cols >= SMALL,
        num_warps=c.num_warps,
        **PINNED,
    )
    return y


def launch_gradient(
    dw: torch.Tensor,
    g: torch.Tensor,
    ids: torch.Tensor,
    padding_idx: int,
    accumulate: bool,
    touched: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """dw[V, D] = each id's rows of g, summed; accumulate: dw is fp32 and where the sums start, else it holds zeros.

    touched: bool [V + 1], where sums start from dw, the others from zero; rows of the ids are added to it.
    Ids outside 0..V-1 have no row of it. No step of it waits for the device. config: None for the one of this size.
    """
    num_embeddings = dw.shape[0]
    n_rows, n_cols = ids.numel(), g.shape[-1]
    if g.numel() == 0 or num_embeddings == 0:
        return
    ids = ids.reshape(-1).long()
    has_row = (ids >= 0) & (ids < num_embeddings) & (ids != padding_idx)
    # A stable sort keeps the tokens of one id in the order in which they stand in the batch.
    sorted_ids, token = torch.sort(torch.where(has_row, ids, num_embeddings), stable=True)
    # The runs, front to back. Their number is on the device alone; the host knows that it is at most n_runs.
    n_runs = min(n_rows, num_embeddings + 1)
    positions = torch.arange(n_rows, device=ids.device)
    is_first = torch.cat((positions[:1] == 0, sorted_ids[1:] != sorted_ids[:-1]))
    starts = torch.sort(torch.where(is_first, positions, n_rows)).values
    starts = torch.cat((starts, starts.new_full((1,), n_rows)))
    c = config or gradient_config(n_runs, n_cols)
    embedding_backward_kernel[(cdiv(n_runs, c.rows), cdiv(n_cols, c.cols))](
        g.contiguous(),
        sorted_ids,
        token,
        starts,
        dw,
        touched,
        n_runs,
        n_rows,
        n_cols,
        num_embeddings,
        ACCUMULATE=accumulate,
        ROWS=c.rows,
        COLS=c.cols,
        LARGE=n_cols >= SMALL,
        UNROLL=c.unroll,
        num_warps=c.num_warps,
        **PINNED,
    )
    if touched is not None:  # behind the kernel, whose programs of other columns ask for the same row
        touched.index_fill_(0, sorted_ids, True)


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::embedding")
def _embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, padding_idx: int) -> torch.Tensor:
    return launch_lookup(ids, weight, dtype)


@_embedding.register_fake
def _(ids, weight, dtype, padding_idx):
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


@custom_op("bi_ops::embedding_backward")
def _embedding_grad(
    g: torch.Tensor, ids: torch.Tensor, num_embeddings: int, padding_idx: int, dtype: torch.dtype
) -> torch.Tensor:
    check_range("embedding_backward", ids, num_embeddings)
    dw = g.new_zeros((num_embeddings, g.shape[-1]), dtype=dtype)
    launch_gradient(dw, g, ids, padding_idx, accumulate=False)
    return dw


@_embedding_grad.register_fake
def _(g, ids, num_embeddings, padding_idx, dtype):
    return g.new_empty((num_embeddings, g.shape[-1]), dtype=dtype)


@custom_op("bi_ops::accumulate_embedding_grad", mutates_args={"main_grad"})
def _accumulate(main_grad: torch.Tensor, g: torch.Tensor, ids: torch.Tensor, padding_idx: int) -> None:
    check_range("embedding_backward", ids, main_grad.shape[0])
    launch_gradient(main_grad, g, ids, padding_idx, accumulate=True)


@_accumulate.register_fake
def _(main_grad, g, ids, padding_idx):
    return None


@custom_op("bi_ops::accumulate_embedding_rows", mutates_args={"main_grad", "touched"})
def _accumulate_rows(
    main_grad: torch.Tensor, touched: torch.Tensor, g: torch.Tensor, ids: torch.Tensor, padding_idx: int
) -> None:
    check_range("embedding_backward", ids, main_grad.shape[0])
    launch_gradient(main_grad, g, ids, padding_idx, True, touched)


@_accumulate_rows.register_fake
def _(main_grad, touched, g, ids, padding_idx):
    return None


def _setup(ctx, inputs, output):
    ids, weight, _, ctx.padding_idx = inputs
    ctx.save_for_backward(ids)
    ctx.num_embeddings, ctx.weight_dtype = weight.shape[0], weight.dtype


def _backward(ctx, g):
    (ids,) = ctx.saved_tensors
    return None, _embedding_grad(g, ids, ctx.num_embeddings, ctx.padding_idx, ctx.weight_dtype), None, None


_embedding.register_autograd(_backward, setup_context=_setup)


class _EmbeddingIntoBuffer(Node):
    """The lookup whose weight gradient goes into a buffer and not to autograd."""

    operator = "embedding with main_grad"

    @staticmethod
    def forward(ctx, ids, weight, dtype, padding_idx, main_grad):
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.main_grad = padding_idx, main_grad
        return _embedding(ids, weight, dtype, padding_idx)

    @staticmethod
    def backward(ctx, g):
        (ids,) = ctx.saved_tensors
        buffer, touched = open_rows(ctx.main_grad)
        if touched is None:
            _accumulate(buffer, g, ids, ctx.padding_idx)
        else:
            _accumulate_rows(buffer, touched, g, ids, ctx.padding_idx)
        return None, None, None, None, None


# --------------------------------------------------------------------------------------------------------------
# public functions


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype | None = None,
    padding_idx: int = -1,
    main_grad: torch.Tensor | MainGrad | None = None,
) -> torch.Tensor:
    """Rows of `weight`, cast to `dtype`: a 16-bit forward over an fp32 master weight needs no copy of the table.

    The gradient of the weight sums each id's tokens front to back in fp32 and is rounded once.

    Args:
        ids: [...], int64 or int32, in 0..V-1. On a GPU an id outside gives a row of NaN.
        weight: [V, D], bf16, fp16 or fp32. dtype: of the result; None for the weight's.
        padding_idx: the row that gets no gradient; -1 for none.
        main_grad: fp32 [V, D], contiguous, or a `bi_ops.nn.MainGrad`, or None. If given, each id's sum is accumulated
            in it, in place, and `weight.grad` stays as it is: a batch cut anywhere ends in the bits of one pass.

    Returns:
        [..., D] in `dtype`.

    Raises:
        TypeError: unsupported dtypes. ValueError: wrong rank, shape, device or padding_idx. IndexError: ids outside
            (CPU).
    """
    checks.tensor("embedding", "ids", ids)
    checks.dtype("embedding", "ids", ids, _ID_DTYPES)
    checks.tensor("embedding", "weight", weight, ndim=2)
    checks.dtype("embedding", "weight", weight)
    checks.same_device("embedding", ids=ids, weight=weight)
    dtype = weight.dtype if dtype is None else checks.result_dtype("embedding", dtype)
    _check_padding("embedding", padding_idx, weight.shape[0])
    if main_grad is not None:
        checks.main_grad("embedding", "main_grad", main_grad, weight.shape, weight.device)
        return _EmbeddingIntoBuffer.apply(ids, weight, dtype, padding_idx, main_grad)
    return _embedding(ids, weight, dtype, padding_idx)


def embedding_backward(
    grad: torch.Tensor,
    ids: torch.Tensor,
    num_embeddings: int,
    padding_idx: int = -1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The gradient of the table: dweight[id] = sum of grad over the tokens of id, front to back in fp32.

    Args:
        grad: [..., D], bf16, fp16 or fp32. ids: [...], int64 or int32; an id outside 0..V-1 is left out on a GPU.
        num_embeddings: V. padding_idx: the row that stays zero; -1 for none. dtype: of the result, rounded once.

    Returns:
        [V, D] in `dtype`.

    Raises:
        TypeError, ValueError, IndexError: as `embedding`.
    """
    op = "embedding_backward"
    checks.tensor(op, "grad", grad)
    checks.dtype(op, "grad", grad)
    checks.tensor(op, "ids", ids)
    checks.dtype(op, "ids", ids, _ID_DTYPES)
    checks.same_device(op, grad=grad, ids=ids)
    fits = grad.shape[:-1] == ids.shape and grad.ndim == ids.ndim + 1
    checks.shape(
        op, fits, lambda: f"grad {list(grad.shape)} does not fit ids {list(ids.shape)}: it needs one row per id"
    )
    checks.integer(op, "num_embeddings", num_embeddings)
    checks.shape(op, num_embeddings >= 0, lambda: f"num_embeddings must not be negative, got {num_embeddings}")
    _check_padding(op, padding_idx, num_embeddings)
    return _embedding_grad(grad, ids, num_embeddings, padding_idx, checks.result_dtype(op, dtype))


def _check_padding(op: str, padding_idx: int, rows: int) -> None:
    checks.integer(op, "padding_idx", padding_idx)
    ok = -1 <= padding_idx < rows
    checks.shape(
        op, ok, lambda: f"padding_idx must be a row of the table, 0..{rows - 1}, or -1 for none; got {padding_idx}"
    )
