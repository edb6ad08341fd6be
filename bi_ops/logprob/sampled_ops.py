"""Log-probabilities of the distribution that was sampled: temperature, top-k, top-p, min-p."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bi_ops.core import checks, runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL, check_programs
from bi_ops.core.operators import custom_op
from bi_ops.core.rows import aligned_rows
from bi_ops.core.triton_helpers import PINNED
from bi_ops.logprob import order as orders
from bi_ops.logprob.config import RowConfig, SampledConfig, row_config, sampled_config
from bi_ops.logprob.sampled_kernels import sampled_logprobs_dx_kernel, sampled_logprobs_kernel

#: The bits of fp32 that a number of the dtype leaves zero: keys of the search are shorter by them.
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


class SampledStats(NamedTuple):
    """What is known of the rows of z = logits / temperature, each fp32 [T].

    row_max: the largest z. cutoff: z below it are dropped. lse: log(sum(exp(z - row_max))) over z >= cutoff.
    """

    row_max: torch.Tensor
    cutoff: torch.Tensor
    lse: torch.Tensor


# --------------------------------------------------------------------------------------------------------------
# launch


def launch_sampled_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor | None,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    config: SampledConfig | None = None,
) -> tuple[torch.Tensor, SampledStats]:
    """(log-probabilities of ids, the rows' statistics); without ids the first is memory that nothing wrote."""
    out, row_max, cutoff, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))
    if logits.shape[0] > 0:
        rows = aligned_rows(logits)
        order = orders.sampled_order(orders.Problem(logits.shape[1], logits.dtype))
        c = config or sampled_config(rows.shape[0])
        if large := max(rows.shape) >= SMALL:
            check_programs("sampled_logprobs", rows.shape[0])
        sampled_logprobs_kernel[(cdiv(rows.shape[0], c.rows),)](
            rows,
            ids,
            temperature,
            top_k,
            top_p,
            min_p,
            out,
            row_max,
            cutoff,
            lse,
            *rows.shape,
            rows.stride(0),
            HAS_IDS=ids is not None,
            ROWS=c.rows,
            BLOCK=c.block,
            SHIFT=_ZERO_BITS[rows.dtype],
            FRACTION_BITS=order.fraction_bits,
            LARGE=large,
            num_warps=c.num_warps,
            **PINNED,
        )
    return out, SampledStats(row_max, cutoff, lse)


def launch_sampled_logprobs_backward(
    g: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor,
    stats: SampledStats,
    config: RowConfig | None = None,
) -> torch.Tensor:
    """The gradient of the logits: every element by itself, from the sums of the forward."""
    dx = logits.new_empty(logits.shape)
    if logits.numel() > 0:
        rows = aligned_rows(logits)
        c = config or row_config(*rows.shape)
        sampled_logprobs_dx_kernel[(cdiv(rows.shape[0], c.rows), cdiv(rows.shape[1], c.cols))](
            g.contiguous(),
            rows,
            ids,
            temperature,
            *stats,
            dx,
            *rows.shape,
            rows.stride(0),
            ROWS=c.rows,
            BLOCK=c.cols,
            LARGE=max(rows.shape) >= SMALL,
            num_warps=4,
            **PINNED,
        )
    return dx


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::sampled_stats")
def _sampled_stats(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(launch_sampled_logprobs(logits, None, temperature, top_k, top_p, min_p)[1])  # type: ignore[return-value]


@_sampled_stats.register_fake
def _(logits, temperature, top_k, top_p, min_p):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))


@custom_op("bi_ops::sampled_logprobs")
def _sampled_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, stats = launch_sampled_logprobs(logits, ids, temperature, top_k, top_p, min_p)
    return out, *stats


@_sampled_logprobs.register_fake
def _(logits, ids, temperature, top_k, top_p, min_p):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))


@custom_op("bi_ops::sampled_logprobs_backward")
def _sampled_logprobs_grad(
    g: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor,
    row_max: torch.Tensor,
    cutoff: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    return launch_sampled_logprobs_backward(g, logits, ids, temperature, SampledStats(row_max, cutoff, lse))


@_sampled_logprobs_grad.register_fake
def _(g, logits, ids, temperature, row_max, cutoff, lse):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, g, *_):
    return _sampled_logprobs_grad(g, *ctx.saved_tensors), None, None, None, None, None


_sampled_logprobs.register_autograd(_backward, setup_context=_setup)


# --------------------------------------------------------------------------------------------------------------
# public functions


def check_options(op: str, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise TypeError or ValueError unless the four are numbers that a token can be sampled with."""
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        checks.real(op, name, value)
    checks.integer(op, "top_k", top_k)
    fp32 = torch.finfo(torch.float32)
    if not fp32.tiny <= temperature <= fp32.max:
        raise ValueError(f"{op}: temperature must be above 0 and fit fp32, got {temperature}; greedy sampling is 1")
    if not top_k >= 0:
        raise ValueError(f"{op}: top_k must be 0 (all tokens) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{op}: min_p must be in [0, 1], got {min_p}")


def _rows(op: str, logits: torch.Tensor, **options: torch.Tensor | float) -> list[torch.Tensor]:
    """Checked temperature, top_k, top_p and min_p, a number per row of `logits`."""
    checks.tensor(op, "logits", logits)
    checks.dtype(op, "logits", logits)
    ok = logits.ndim == 2 and logits.shape[1] > 0
    checks.shape(op, ok, lambda: f"logits must be [T, V] with V > 0, got {list(logits.shape)}")
    numbers = {n: v for n, v in options.items() if not isinstance(v, torch.Tensor)}
    plain: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    check_options(op, **{**plain, **numbers})  # type: ignore[arg-type]
    out = []
    for name, value in options.items():
        dtype = torch.int32 if name == "top_k" else torch.float32
        if isinstance(value, torch.Tensor):
            checks.tensor(op, name, value, ndim=1)
            checks.same_device(op, logits=logits, **{name: value})
            checks.dtype(op, name, value, (torch.int32, torch.int64) if name == "top_k" else (torch.float32,))
            what = f"{name} {list(value.shape)} does not fit logits {list(logits.shape)}"
            checks.shape(op, value.shape == logits.shape[:1], lambda what=what: what)  # type: ignore[misc]
            out.append(value.to(dtype).contiguous())
        else:
            number = min(value, logits.shape[1]) if name == "top_k" else float(value)
            out.append(torch.full(logits.shape[:1], number, dtype=dtype, device=logits.device))
    return out


def sampled_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    min_p: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """The log-probability of each row's token under the distribution that it was sampled from; differentiable.

    vLLM's `processed_logprobs`, with the plugin in the same bits: z = logits / temperature in fp32; of its softmax p,
    tokens with p >= min_p * max(p) are kept; of these the `top_k` largest; of these, normalised, a token if those above
    it have less than `top_p` together (Holtzman et al., 2020). Tokens of equal z are kept or dropped together. The
    result is z[id] - max(z) - log(sum(exp(z - max(z)))) over the kept tokens, whose sum is one of integers
    (`FixedPointOrder`), so that logits in bf16 and the same in fp32 have equal bits.

    Args:
        logits: [T, V], bf16, fp16 or fp32. ids: int64 [T], each in [0, V) (checked here on the CPU only; on a GPU an id
            outside gives NaN). temperature, top_k, top_p, min_p: a number, or one per row, [T] (fp32; top_k int32 or
            int64; unchecked). top_k = 0, top_p = 1 and min_p = 0 keep all.

    Returns:
        fp32 [T], natural logarithm; -inf for a token that is not kept; NaN in a row with NaN or +inf. The gradient
        reaches the logits: (1[i = id] - p_i) / temperature for the kept tokens, 0 for the others. Which tokens are kept
        has no gradient.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong shape, device or number. IndexError: an id outside [0, V).
    """
    op = "sampled_logprobs"
    rows = _rows(op, logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    checks.tensor(op, "ids", ids, ndim=1)
    checks.same_device(op, logits=logits, ids=ids)
    checks.shape(
        op, ids.shape == logits.shape[:1], lambda: f"ids {list(ids.shape)} do not fit logits {list(logits.shape)}"
    )
    checks.dtype(op, "ids", ids, (torch.int64,))
    if runtime.INTERPRET and not torch.compiler.is_compiling() and ids.numel() > 0:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= logits.shape[1]:
            raise IndexError(f"{op}: ids reach from {low} to {high}; logits have {logits.shape[1]} columns")
    return _sampled_logprobs(logits, ids.contiguous(), *rows)[0]


@torch.no_grad()
def sampled_stats(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    min_p: torch.Tensor | float = 0.0,
) -> SampledStats:
    """What `sampled_logprobs` computes of the rows; no gradient. Arguments and errors as there."""
    rows = _rows("sampled_stats", logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return SampledStats(*_sampled_stats(logits, *rows))


@torch.no_grad()
def processed_logits(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    min_p: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """logits / temperature, fp32 [T, V], with -inf for tokens that are not kept: what a token is sampled from.

    No gradient. Arguments and errors as `sampled_logprobs`.
    """
    rows = _rows("processed_logits", logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    z = logits.float() / rows[0][:, None]
    return z.masked_fill_(z < _sampled_stats(logits, *rows)[1][:, None], float("-inf"))
