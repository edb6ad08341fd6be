"""The error of what the mode cannot serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core import checks

_HINT_ALWAYS = (
    "run it outside the contract inside `with bi_ops.mode.batch_invariant_backward_mode(enabled=False)`, "
    "or, if you know that it keeps the contract, `bi_ops.mode.allow_operator({name!r})`"
)

#: What to write instead, by the beginning of the operator's name. tests/test_mode_hints.py follows each.
_HINTS = {
    "_scaled_dot_product": "call torch.nn.functional.scaled_dot_product_attention directly, not a backend of it",
    "scaled_dot_product": "pass dropout_p=0",
    "softmax": "call torch.nn.functional.softmax directly: aten's own was replaced by one without autograd",
}


def unsupported(
    op: str, tensors: Sequence[torch.Tensor], why: str = "has no batch-invariant implementation"
) -> Exception:
    """The error of an operator that cannot be served: its name, its shapes and the way out."""
    what = ", ".join(checks.describe(t) for t in tensors) or "no tensors"
    base = op.removeprefix("aten::")
    hint = next((h for prefix, h in _HINTS.items() if base.startswith(prefix)), None)
    always = _HINT_ALWAYS.format(name=op if "::" in op else f"aten::{op}")
    return NotImplementedError(
        f"batch-invariant mode: {op} on {what} {why}. "
        + (f"Way out: {hint}; or {always}" if hint else f"Way out: {always}")
    )
