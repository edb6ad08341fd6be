"""Properties of row-wise operators. Each function returns what broke the rule; an empty answer means it held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]
RowOp = Callable[..., torch.Tensor | Tensors]

#: Row counts where tiles, warps and launch heuristics change.
ROW_COUNTS = (
    *(1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257),
    *(511, 512, 513, 1000, 1024, 2048, 4096, 8192),
)


def _tuple(out: torch.Tensor | Sequence[torch.Tensor]) -> Tensors:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits (a NaN equals the same NaN, 0.0 does not equal -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def row_variant(op: RowOp, rows: Tensors, counts: Iterable[int] = ROW_COUNTS) -> list[int]:
    """Row counts m at which `op` on m rows differs from the same rows of `op` on all rows.

    Args:
        op: maps tensors [M, ...] to one or several tensors [M, ...], row by row.
        rows: the inputs, [M_max, ...] each. Both the first and the last m rows are tried, so that a row is seen at
            another position too.
        counts: the values of m; those above M_max are left out.

    Raises:
        ValueError: no m below M_max, so nothing would be compared.
    """
    counts, total = tuple(counts), rows[0].shape[0]
    if not any(m < total for m in counts):
        raise ValueError(f"row_variant: no row count in {counts} is below the {total} rows given: nothing to compare")
    full = _tuple(op(*rows))
    broken = []
    for m in counts:
        if m > total:
            continue
        for part in (slice(0, m), slice(total - m, total)):
            some = _tuple(op(*(r[part].clone() for r in rows)))
            if not all(bits_equal(s, f[part]) for s, f in zip(some, full, strict=True)):
                broken.append(m)
                break
    return broken


def order_variant(op: RowOp, rows: Tensors, trials: int = 3, seed: int = 0) -> list[int]:
    """Trials in which shuffling the rows changed some row's bits.

    Raises:
        ValueError: fewer than two rows or no trial, so nothing would be compared.
    """
    if trials < 1 or rows[0].shape[0] < 2:
        raise ValueError(f"order_variant: {trials} trials of {rows[0].shape[0]} rows leave nothing to compare")
    full = _tuple(op(*rows))
    generator = torch.Generator().manual_seed(seed)
    broken = []
    for trial in range(trials):
        perm = torch.randperm(rows[0].shape[0], generator=generator).to(rows[0].device)
        shuffled = _tuple(op(*(r[perm] for r in rows)))
        if not all(bits_equal(s, f[perm]) for s, f in zip(shuffled, full, strict=True)):
            broken.append(trial)
    return broken


def rerun_variant(op: Callable[[], torch.Tensor | Tensors], runs: int = 100) -> list[int]:
    """Reruns (1-based) whose result differs from the first run's. Raises ValueError for fewer than two runs."""
    if runs < 2:
        raise ValueError(f"rerun_variant: {runs} runs leave nothing to compare; use at least 2")
    first = _tuple(op())
    return [
        run for run in range(1, runs) if not all(bits_equal(a, b) for a, b in zip(_tuple(op()), first, strict=True))
    ]


@dataclass(frozen=True)
class GradientErrors:
    """Relative Frobenius errors against the fp64 oracle: the operator's and plain torch's in the same dtype."""

    name: str
    ours: float
    plain: float

    @property
    def ok(self) -> bool:
        """At most twice plain torch's error (one fp32 rounding of slack where plain torch is exact)."""
        return self.ours <= max(2 * self.plain, 2.0**-22)


def gradient_errors(op: RowOp, reference: RowOp, inputs: dict[str, torch.Tensor]) -> list[GradientErrors]:
    """Errors of the outputs and of every input's gradient.

    Args:
        op: the operator; called with the inputs in order. reference: the same mathematics in plain torch; run in
            fp64 for the oracle and in the inputs' own dtype for the comparison.
        inputs: name to tensor; floating-point ones get gradients. A fixed random cotangent is used.
    """

    def run(fn: RowOp, cast: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        args = {n: cast(t.detach()) if t.is_floating_point() else t for n, t in inputs.items()}
        leaves = {n: t.clone().requires_grad_() for n, t in args.items() if t.is_floating_point()}
        outs = _tuple(fn(*(leaves.get(n, t) for n, t in args.items())))
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(inputs_dtype).to(o) for o in outs]
        grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
        named = {f"out{i}": o for i, o in enumerate(outs)}
        return named | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}

    inputs_dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    ours = run(op, lambda t: t)
    plain = run(reference, lambda t: t)
    exact = run(reference, lambda t: t.double())

    def error(x: torch.Tensor, ref: torch.Tensor) -> float:
        return ((x.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()

    return [GradientErrors(n, error(ours[n], exact[n]), error(plain[n], exact[n])) for n in exact]
