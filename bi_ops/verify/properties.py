"""Properties of row-wise operators. Each function returns what broke the rule; an empty answer means it held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from bi_ops.core import checks

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


def _shows_something(name: str, outs: Tensors) -> None:
    """Raise ValueError if equal bits of `outs` would be no proof: no element, no number, or one value everywhere."""
    for out in outs:
        if out.numel() == 0:
            continue
        finite = out[out.isfinite()] if out.is_floating_point() else out.reshape(-1)
        if finite.numel() and (out.numel() == 1 or bool((out.reshape(-1) != finite[0]).any())):
            return
    shapes = ", ".join(str(list(out.shape)) for out in outs)
    raise ValueError(
        f"{name}: the results {shapes} are empty, of one value, or no finite numbers, so equal bits show nothing; give "
        "inputs whose results differ"
    )


def _check_rows(name: str, op: object, rows: object) -> None:
    if not callable(op):
        raise TypeError(f"{name}: op must be callable, got {op!r}")
    if not isinstance(rows, tuple | list) or not rows or not all(isinstance(r, torch.Tensor) for r in rows):
        raise TypeError(f"{name}: rows must be a tuple of tensors [M, ...], got {type(rows).__name__}")
    if any(r.ndim == 0 or r.shape[0] != rows[0].shape[0] for r in rows):
        raise ValueError(f"{name}: rows must have one first axis, got {[list(r.shape) for r in rows]}")


def row_variant(op: RowOp, rows: Tensors, counts: Iterable[int] = ROW_COUNTS) -> list[int]:
    """Row counts m at which `op` on m rows differs from the same rows of `op` on all rows.

    Args:
        op: maps tensors [M, ...] to one or several tensors [M, ...], row by row.
        rows: the inputs, [M_max, ...] each. Both the first and the last m rows are tried, so that a row is seen at
            another position too.
        counts: the values of m; those above M_max are left out.

    Raises:
        TypeError: an argument of another type. ValueError: a count below 1, no m below M_max, or results that are
            empty, all of one value or no finite numbers, so nothing would be compared.
    """
    _check_rows("row_variant", op, rows)
    if isinstance(counts, str) or not isinstance(counts, Iterable):
        raise TypeError(f"row_variant: counts must be row counts, got {counts!r}")
    counts, total = tuple(counts), rows[0].shape[0]
    for m in counts:
        checks.size("row_variant", "a count", m)
    if not any(m < total for m in counts):
        raise ValueError(f"row_variant: no row count in {counts} is below the {total} rows given: nothing to compare")
    full = _tuple(op(*rows))
    _shows_something("row_variant", full)
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
        ValueError: fewer than two rows or no trial, or results as in `row_variant`, so nothing would be compared.
    """
    _check_rows("order_variant", op, rows)
    checks.integer("order_variant", "trials", trials)
    checks.integer("order_variant", "seed", seed)
    if trials < 1 or rows[0].shape[0] < 2:
        raise ValueError(f"order_variant: {trials} trials of {rows[0].shape[0]} rows leave nothing to compare")
    full = _tuple(op(*rows))
    _shows_something("order_variant", full)
    generator = torch.Generator().manual_seed(seed)
    broken = []
    for trial in range(trials):
        perm = torch.randperm(rows[0].shape[0], generator=generator, device="cpu")
        if torch.equal(perm, torch.arange(len(perm))):  # every row where it was
            perm = perm.roll(1)
        perm = perm.to(rows[0].device)
        shuffled = _tuple(op(*(r[perm] for r in rows)))
        if not all(bits_equal(s, f[perm]) for s, f in zip(shuffled, full, strict=True)):
            broken.append(trial)
    return broken


def rerun_variant(op: Callable[[], torch.Tensor | Tensors], runs: int = 100) -> list[int]:
    """Reruns (1-based) whose result differs from the first run's.

    Raises:
        ValueError: fewer than two runs, or results as in `row_variant`.
    """
    if not callable(op):
        raise TypeError(f"rerun_variant: op must be callable, got {op!r}")
    checks.integer("rerun_variant", "runs", runs)
    if runs < 2:
        raise ValueError(f"rerun_variant: {runs} runs leave nothing to compare; use at least 2")
    first = _tuple(op())
    _shows_something("rerun_variant", first)
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
        """At most twice plain torch's error (one fp32 rounding of slack where plain torch is exact); never infinite."""
        return math.isfinite(self.ours) and self.ours <= max(2 * self.plain, 2.0**-22)


def gradient_errors(op: RowOp, reference: RowOp, inputs: dict[str, torch.Tensor]) -> list[GradientErrors]:
    """Errors of the outputs and of every input's gradient.

    Args:
        op: the operator; called with the inputs in order. reference: the same mathematics in plain torch; run in
            fp64 for the oracle and in the inputs' own dtype for the comparison.
        inputs: name to tensor; floating-point ones get gradients. A fixed random cotangent is used.

    Raises:
        TypeError: an argument of another type. ValueError: no floating-point input, outputs that are empty or of other
            shapes than the reference's.
    """

    if not callable(op) or not callable(reference):
        raise TypeError(f"gradient_errors: op and reference must be callable, got {op!r} and {reference!r}")
    if not isinstance(inputs, dict) or not all(isinstance(t, torch.Tensor) for t in inputs.values()):
        raise TypeError("gradient_errors: inputs must be a dict of tensors")

    def run(fn: RowOp, cast: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        args = {n: cast(t.detach()) if t.is_floating_point() else t for n, t in inputs.items()}
        leaves = {n: t.clone().requires_grad_() for n, t in args.items() if t.is_floating_point()}
        outs = _tuple(fn(*(leaves.get(n, t) for n, t in args.items())))
        generator = torch.Generator().manual_seed(1)  # of the CPU, whatever device is the default
        drawn = [torch.randn(o.shape, generator=generator, device="cpu") for o in outs]
        cotangents = [t.to(inputs_dtype).to(o) for t, o in zip(drawn, outs, strict=True)]
        grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
        named = {f"out{i}": o for i, o in enumerate(outs)}
        return named | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}

    inputs_dtype = next((t.dtype for t in inputs.values() if t.is_floating_point()), None)
    if inputs_dtype is None:
        raise ValueError("gradient_errors: no floating-point input, so there is no gradient to compare")
    ours = run(op, lambda t: t)
    plain = run(reference, lambda t: t)
    exact = run(reference, lambda t: t.double())
    shapes = {n: (list(ours[n].shape), list(t.shape)) for n, t in exact.items() if n in ours}
    if ours.keys() != exact.keys() or any(a != b for a, b in shapes.values()):
        raise ValueError(f"gradient_errors: {len(ours)} results and {len(exact)} of the reference, shapes {shapes}")
    if any(t.numel() == 0 for t in exact.values()):
        raise ValueError(f"gradient_errors: empty results, so there is nothing to compare; shapes {shapes}")

    def error(x: torch.Tensor, ref: torch.Tensor) -> float:
        return ((x.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()

    return [GradientErrors(n, error(ours[n], exact[n]), error(plain[n], exact[n])) for n in exact]
