"""What an architecture says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """The facts about an architecture that orders and backends ask for. Equal facts, equal orders.

    name: "sm_90", or "interpreter". orders: which set of orders it takes, "sm_90", "portable" or "interpreter".
    interpreted: kernels run in Triton's interpreter. gemm_step: elements of K that are summed before the accumulator
    is rounded to fp32. canonical_gemm: GEMMs of cuBLASLt and vLLM were shown to have the canonical order here.
    flash_attention_3: vLLM's FlashAttention 3 runs here. gluon: bi_ops' warp-specialised kernels run here.
    one_pass_backward: attention's backward at the head sizes that have such a kernel sums dQ over tiles of keys in one
    pass. pdl: kernels can be launched as programmatic dependents (`core.pdl`). reduction_lanes, reduction_steps: of
    `reduction`'s order. thread_sums: how `tl.sum` adds the elements that one thread holds, "sequential" or "pairwise",
    which the installed Triton decides. triton_releases: the releases that the kernels of this entry were built with, as
    prefixes; empty: any. reason: why a GPU took the portable orders; empty elsewhere.
    """

    name: str
    orders: str
    interpreted: bool = False
    gemm_step: int = 16
    canonical_gemm: bool = False
    flash_attention_3: bool = False
    gluon: bool = False
    one_pass_backward: bool = False
    pdl: bool = False
    reduction_lanes: int = 256
    reduction_steps: int = 16
    thread_sums: str = "sequential"
    triton_releases: tuple[str, ...] = ()
    reason: str = ""

    def __hash__(self) -> int:  # asked in every call of an operator
        return hash((self.name, self.orders, self.thread_sums))

    def knows_triton(self, version: str) -> bool:
        """Were this entry's kernels built with that release of Triton?"""
        return not self.triton_releases or any(version.startswith(f"{r}.") for r in self.triton_releases)
