"""Liger's kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from bi_ops.core import runtime
from bi_ops.verify import operators
from bi_ops.verify.subject import Subject

Tensor = torch.Tensor


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, operators.EPS)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits.clone(), ids, reduction="none")  # it writes the gradient into its input


def subjects() -> Sequence[Subject]:
    """Raises ValueError without liger-kernel and a GPU."""
    if runtime.INTERPRET or importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("verify: Liger is not installed, or there is no CUDA GPU; pip install liger-kernel")
    two = {"gate": 0, "up": 0}
    return [
        Subject("rms_norm", _rms_norm, operators.normed, {"x": 0}, compiled=False),
        Subject("swiglu", _swiglu, lambda m: {"gate": m.x(), "up": m.x()}, two, compiled=False),
        Subject("cross_entropy", _cross_entropy, operators.scored, {"logits": 0, "ids": 0}, compiled=False),
    ]
