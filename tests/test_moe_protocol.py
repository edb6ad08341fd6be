"""The control flow of the grouped GEMMs, run on the CPU: no deadlock, no race, every element of a result written once.

What the kernels compute is shown on the GPU alone (`test_moe_hopper.py`).
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import gluon_model as model
import numpy as np
import pytest
import torch
from gluon_values import Descriptor, Failure, Pointer

from bi_ops.core import runtime
from bi_ops.moe.hopper import grouped_gemm, wgrad
from bi_ops.moe.launch import _tile_table

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="a model on the CPU")


def starts(counts):
    return [0, *itertools.accumulate(counts)]


def tile_rows(counts, rows, block_m):
    """The tile table, flat: their number; then expert, first row, end of the expert's rows."""
    table, ends = [], [*starts(counts), rows]
    for e, (first, last) in enumerate(itertools.pairwise(ends)):
        table += [[e, m, last, 0] for m in range(first, last, block_m)]
    return [len(table), 0, 0, 0, *itertools.chain(*table)]


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("counts", [(3, 0, 200, 128, 1), (0, 0, 0), (64, 64), (0, 700)])
def test_the_tile_table(counts, block_m, device):
    offsets, rows = torch.tensor(starts(counts), dtype=torch.int32, device=device), sum(counts) + 70
    expected = tile_rows(counts, rows, block_m)
    found = _tile_table(offsets, rows, block_m)
    assert found.shape[0] * 4 >= len(expected)
    assert found[0, 0] == expected[0]
    assert found[1 : expected[0] + 1, :3].flatten().tolist() == [x for i, x in enumerate(expected[4:]) if i % 4 != 3]


def run_matmul(
    counts,
    extra,
    n,
    k,
    programs,
    split_n,
    transposed,
    weights=False,
    prefetch=False,
    kernels=grouped_gemm,
    **options,
):
    rows, experts, width, block_n, block_k = sum(counts) + extra, len(counts), 32, 64, 64
    table = Pointer(tile_rows(counts, rows, 64 if split_n else 128), shared=not prefetch)
    w_width = width if split_n else block_n
    x = Descriptor([rows, k], [64, block_k], 2, shared=True)
    w_shape = ([experts * k, n], [block_k, w_width]) if transposed else ([experts * n, k], [w_width, block_k])
    w = Descriptor(*w_shape, 2, shared=not prefetch)
    y, written = Descriptor([rows, n], [64, width], 2), np.zeros(rows * n, dtype=np.int64)
    some = Pointer([0], shared=True)
    unused = model.launch(
        *(kernels.grouped_matmul_hopper_kernel, programs, x, w, y, table, Pointer(written, shared=True), some, some),
        *(n, k, experts, 3, split_n, 2, transposed, weights, prefetch),
        **options,
    )
    assert unused == (0 if sum(counts) else 2)
    written = written.reshape(rows, n)
    for (m, first), events in y.log.items():
        assert m + 64 <= rows
        written[m : m + 64, first : first + width] += len(events)
    assert (written == 1).all()
    return x.history


@pytest.mark.parametrize("split_n", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_every_element_of_y_is_written_once(split_n, transposed, prefetch):
    r = random.Random(split_n + 2 * transposed)
    for counts in ((130, 0, 64, 7), (0, 0), (300,), (1, 1, 1)):
        how = {"resident": r.choice([1, 3]), "seed": r.random(), "prefetch": prefetch}
        size = r.choice([64, 136, 200]), r.choice([64, 256])
        run_matmul(counts, r.choice([0, 70]) or 1, *size, r.choice([1, 2, 5]), split_n, transposed, **how)


def test_no_half_of_x_behind_an_experts_rows_is_loaded():
    found = run_matmul((64, 16, 130), 1, 64, 64, 1, False, False)
    assert sorted(found) == [(m, 0) for m in (0, 64, 80, 144, 208)]


def run_wgrad(counts, n, k, programs, accumulate, kernels=wgrad, **options):
    counts = [-(-c // 16) * 16 for c in counts]
    rows, experts, block_n = sum(counts), len(counts), 64
    g, x = Descriptor([rows, n], [16, 64], 2), Descriptor([rows, k], [16, block_n], 2)
    dw = Descriptor([experts * n, k], [64, block_n // 2], 4)
    model.launch(
        *(kernels.grouped_wgrad_hopper_kernel, programs, g, x, dw, Pointer(starts(counts)), n, k, experts),
        *(4, 8, accumulate),
        **options,
    )
    columns = range(0, -(-k // block_n) * block_n, block_n // 2)
    full = [e for e, c in enumerate(counts) if c or not accumulate]
    corners = {(e * n + m, j) for e in full for m in range(0, n, 64) for j in columns}
    assert set(dw.history) == corners
    for events in dw.history.values():
        assert [how for how, _ in events] == (["load", "set"] if accumulate else ["set"])


@pytest.mark.parametrize("accumulate", [False, True])
def test_every_element_of_dw_is_written_once(accumulate):
    r = random.Random(accumulate)
    for counts in ((130, 0, 64, 7), (0, 0), (300, 16), (0, 1, 0, 1, 0)):
        how = {"resident": r.choice([1, 3]), "seed": r.random()}
        run_wgrad(counts, r.choice([128, 256]), r.choice([64, 136]), r.choice([1, 2, 5]), accumulate, **how)


BROKEN = [
    (grouped_gemm, "mbarrier.wait(args.empty.index(stage), phase)", "pass"),
    (grouped_gemm, "tma.store_wait(0)  #", "pass  #"),
    (grouped_gemm, "if m + HALF <= last:", "if m <= last:"),
    (grouped_gemm, "m += WARP_GROUP * HALF", "pass"),
    (grouped_gemm, "for _ in range(n_multiplied, end, BLOCK_K):", "for _ in range(0):"),
    (grouped_gemm, "wait_for_predecessors()\n    launch", "launch"),
    (grouped_gemm, "wait_for_predecessors()\n    n_m", "n_m"),
    (grouped_gemm, "_load_weight(args, expert, n, k, full, stage, step >= n_ahead)", "pass"),
    (
        grouped_gemm,
        "for k in range(0, gl.where(expert < args.E, args.K, 0), BLOCK_K):",
        "for k in range(0, args.K, BLOCK_K):",
    ),
    (wgrad, "mbarrier.wait(args.empty.index(stage), phase)", "pass"),
    (wgrad, "tma.store_wait(0)  #", "pass  #"),
    (wgrad, "if end > begin:", "if True:"),
    (wgrad, "dw_phase ^= is_sum.to(gl.int32)", "dw_phase ^= 1"),
    (wgrad, "mbarrier.wait(dw_full, dw_phase, pred=is_sum)", "pass"),
]


@pytest.mark.parametrize(("module", "line", "instead"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_is_caught(module, line, instead, tmp_path):
    """Negative control: each line left out is noticed."""
    other = model.edited(module, line, instead, tmp_path)
    matmul = (130, 0, 64, 7), 70, 136, 256, 2, False, False
    run: Any
    run, sizes = (run_wgrad, ((130, 0, 64, 0, 7), 128, 136, 2, True)) if module is wgrad else (run_matmul, matmul)
    with pytest.raises((Failure, AssertionError)):
        [run(*sizes, kernels=other, seed=seed) for seed in range(model.TRIES)]
