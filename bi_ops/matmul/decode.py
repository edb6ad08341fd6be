"""GEMMs of few rows on Hopper, in Gluon, as decoding needs them: the weight is read once, at the memory's speed.

    out[M, N] = x[M, K] @ weight[N, K].T + bias[N]       `matmul_kernel`'s bits: K front to back, one fp32 accumulator

A CTA computes BLOCK_N columns of up to BLOCK_M rows. TMA brings x and the weight into stages of shared memory, so that
the SMs together have megabytes in flight. wgmma multiplies 64 rows whatever M is: of a tile of 8 to 64 rows, the others
are what follows in shared memory. Rows do not mix, and those are not stored. Triton 3.8 and later let no tile be read
past its end: there the rows of x are padded to 64 (`DecodeConfig.padded`), which leaves less memory for the weight.

A decoding step is a chain of such kernels, each hardly longer than its own launch and first load. So they overlap
(`bi_ops.core.pdl`): while the kernel before computes x, this one starts, and loads weights if it may.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL
from bi_ops.core.pdl import launch_dependents, wait_for_predecessors
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers, next_stage, previous_stage
from bi_ops.matmul.config import DecodeConfig, decode_config, padded_decode_config
from bi_ops.matmul.launch import TENSOR_CORE_DTYPES

#: Rows of a wgmma, and the most that are served.
ROWS = gl.constexpr(64)
#: Does this Triton let a tile of shared memory be read past its end? Up to 3.7 it does.
READS_PAST = triton.__version__.startswith(("3.6.", "3.7."))
#: Elements of K in a row of shared memory: the 128 bytes in which TMA swizzles.
BOX_K = gl.constexpr(64)


@gluon.jit
def _box(smem, stage, j, N_ROWS: gl.constexpr):
    """Elements [64 j, 64 j + 64) of K of a stage. N_ROWS past the stage's rows: those of the boxes that follow."""
    STEP: gl.constexpr = smem.shape[2] // BOX_K
    boxes = tma.reinterpret(smem.index(stage), [STEP, smem.shape[1], BOX_K])
    return tma.reinterpret(boxes.index(j), [N_ROWS, BOX_K])


@gluon.jit
def _copy_tile(desc, row, step, full, smem, stage, wanted):
    tma.async_load(desc, [row, step * smem.shape[2]], full.index(stage), smem.index(stage), pred=wanted)


@gluon.jit
def _x_box(smem, stage, j, STEP: gl.constexpr, PADDED: gl.constexpr):
    """`_box` of x, with 64 rows."""
    if PADDED:
        return smem.index(stage * STEP + j)
    else:  # the compiler reads what follows an `if`, and one function returns one type
        return _box(smem, stage, j, ROWS)


@gluon.jit
def _copy_x(desc, row, step, full, smem, stage, wanted, STEP: gl.constexpr, PADDED: gl.constexpr):
    if PADDED:  # box by box, each into the first of 64 rows
        BLOCK_M: gl.constexpr = desc.block_type.shape[0]
        for j in gl.static_range(STEP):
            rows = tma.reinterpret(smem.index(stage * STEP + j), [ROWS // BLOCK_M, BLOCK_M, BOX_K])
            tma.async_load(desc, [row, (step * STEP + j) * BOX_K], full.index(stage), rows.index(0), pred=wanted)
    else:
        _copy_tile(desc, row, step, full, smem, stage, wanted)


# M is the batch: a new one must not compile a new kernel. Nor must a captured graph, whose kernels are loaded before.
@gluon.jit(do_not_specialize=["M", "prefetch"])
def decode_matmul_kernel(
    d_x,  # descriptor of x [M, K] with tiles [BLOCK_M, BLOCK_K], or [BLOCK_M, BOX_K] if PADDED
    d_w,  # descriptor of the weight [N, K] with tiles [BLOCK_N, BLOCK_K]
    p_bias,  # [N], added to the fp32 accumulator
    p_out,  # [M, N]
    M,
    N,
    K,
    stride_out,
    prefetch,  # 1: no kernel in flight writes the weight, so it is loaded before the kernels before have ended
    STAGES: gl.constexpr,
    PADDED: gl.constexpr,  # each box of x has the 64 rows that wgmma reads
    HAS_BIAS: gl.constexpr,
):
    BLOCK_M: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_w.block_type.shape[0]
    BLOCK_K: gl.constexpr = d_w.block_type.shape[1]
    STEP: gl.constexpr = BLOCK_K // BOX_K
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if PADDED:
        x_smem = gl.allocate_shared_memory(d_x.dtype, [STAGES * STEP, ROWS, BOX_K], d_x.layout)
    else:
        # wgmma reads 64 rows from the last box on.
        PAST: gl.constexpr = (ROWS // BLOCK_M - 2 + STEP) // STEP
        x_smem = gl.allocate_shared_memory(d_x.dtype, [STAGES + PAST, BLOCK_M, BLOCK_K], d_x.layout)
    w_smem = gl.allocate_shared_memory(d_w.dtype, [STAGES, BLOCK_N, BLOCK_K], d_w.layout)
    full = allocate_barriers(STAGES)
    init_barriers(full, 1)
    launch_dependents()

    n_m = gl.cdiv(M, BLOCK_M)  # tiles that share a weight's are neighbours: memory is asked for it once
    m = gl.program_id(0) % n_m * BLOCK_M
    n = gl.program_id(0) // n_m * BLOCK_N
    n_steps = gl.cdiv(K, BLOCK_K)
    N_BYTES: gl.constexpr = d_x.block_type.nbytes * (STEP if PADDED else 1) + d_w.block_type.nbytes
    if prefetch == 0:
        wait_for_predecessors()
    for s in gl.static_range(STAGES):
        mbarrier.expect(full.index(s), N_BYTES, pred=s < n_steps)
        _copy_tile(d_w, n, s, full, w_smem, s, s < n_steps)
    wait_for_predecessors()
    for s in gl.static_range(STAGES):
        _copy_x(d_x, m, s, full, x_smem, s, s < n_steps, STEP, PADDED)

    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    stage = 0
    phase = 0
    for i in range(0, n_steps):
        mbarrier.wait(full.index(stage), phase)
        for j in gl.static_range(STEP):
            b_x, b_w = _x_box(x_smem, stage, j, STEP, PADDED), _box(w_smem, stage, j, BLOCK_N)
            acc = warpgroup_mma(b_x, b_w.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(STEP, deps=(acc,))  # the step before is done with its stage
        emptied = previous_stage(stage, STAGES)
        more = (i > 0) & (i - 1 + STAGES < n_steps)
        mbarrier.expect(full.index(emptied), N_BYTES, pred=more)
        _copy_tile(d_w, n, i - 1 + STAGES, full, w_smem, emptied, more)
        _copy_x(d_x, m, i - 1 + STAGES, full, x_smem, emptied, more, STEP, PADDED)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o_n = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    m_n = o_n < N
    if HAS_BIAS:
        acc += gl.load(p_bias + o_n, mask=m_n, other=0.0).to(gl.float32)[None, :]
    m_out = ((o_r < BLOCK_M) & (m + o_r < M))[:, None] & m_n[None, :]
    p_out += (m + o_r).to(gl.int64)[:, None] * stride_out + o_n[None, :]
    gl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m_out)


def serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Can `launch` compute out = x @ weight.T + bias?"""
    (m, k), n = x.shape, weight.shape[0]
    few = 0 < m <= ROWS.value and 0 < k < SMALL and 0 < n < SMALL
    dense = x.stride(1) == weight.stride(1) == out.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    if not (few and dense) or x.dtype not in TENSOR_CORE_DTYPES or weight.dtype != x.dtype:
        return False
    starts = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    return starts and _row_stride(weight) % 8 == 0 and _row_stride(x) % 8 == 0


def _row_stride(t: torch.Tensor) -> int:
    """Elements from row to row; any number serves where there is one row."""
    return t.stride(0) if t.shape[0] > 1 else cdiv(t.shape[1], 8) * 8


def _descriptor(t: torch.Tensor, rows: int, block_k: int) -> TensorDescriptor:
    return tma.descriptor(t, (t.shape[0], t.shape[1]), _row_stride(t), (rows, block_k))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    prefetch: bool = False,
    config: DecodeConfig | None = None,
) -> None:
    """out[M, N] = x[M, K] @ weight[N, K].T + bias[N], the bias in the accumulator, of operands that `serves` accepts.

    prefetch: no kernel in flight writes the weight (`bi_ops.core.pdl`, rule 3). config: None for the one of this size.
    """
    (m, k), n = x.shape, weight.shape[0]
    c = config or (decode_config if READS_PAST else padded_decode_config)(m, n, k)
    decode_matmul_kernel[(cdiv(m, c.block_m) * cdiv(n, c.block_n),)](
        _descriptor(x, c.block_m, BOX_K.value if c.padded else c.block_k),
        _descriptor(weight, c.block_n, c.block_k),
        bias,
        out,
        m,
        n,
        k,
        out.stride(0),
        int(prefetch),
        STAGES=c.stages,
        PADDED=c.padded,
        HAS_BIAS=bias is not None,
        num_warps=4,
        launch_pdl=True,
        **PINNED,
    )
