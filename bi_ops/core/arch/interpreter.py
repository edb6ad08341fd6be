"""Triton's interpreter on the CPU: it proves logic. A program costs milliseconds, so steps are few and wide."""

from __future__ import annotations

from bi_ops.core.arch.base import Arch

INTERPRETER = Arch(
    name="interpreter",
    orders="interpreter",
    interpreted=True,
    gemm_step=128,  # it rounds to fp32 once per tile step
    reduction_lanes=1024,
    reduction_steps=64,
    thread_sums="numpy",
)
