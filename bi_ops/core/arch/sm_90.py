"""Hopper: H100 and H200. Fingerprints of both are equal (bench/results)."""

from __future__ import annotations

from bi_ops.core.arch.base import Arch

SM_90 = Arch(
    name="sm_90",
    orders="sm_90",
    canonical_gemm=True,  # the tensor cores sum 16 elements of K per step whatever the tile
    flash_attention_3=True,
    gluon=True,
    one_pass_backward=True,
    pdl=True,
    triton_releases=("3.6", "3.7", "3.8", "3.9"),  # Gluon changes from one release to the next
)
