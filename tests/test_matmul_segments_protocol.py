"""The control flow of Hopper's GEMM with K in segments, run on the CPU: no deadlock, no race, sums that wait are read.

What the kernel computes is shown on the GPU alone (`test_matmul_segments.py`).
"""

from __future__ import annotations

import random

import gluon_model as model
import numpy as np
import pytest
from gluon_values import Descriptor, Failure, Pointer

from bi_ops.matmul import hopper_segments

BLOCK_K = 64


def run(m, n, sizes, segments, block_n, programs, stages=3, width=128, transposed=True, **how):
    """sizes: of each part of K what a segment has."""
    kernels = how.pop("kernels", hopper_segments)
    k = sum(sizes) * segments
    a, c = Descriptor([m, k], [64, BLOCK_K], 2), Descriptor([-(-m // 128) * 128, n], [64, width], 2)
    b = Descriptor(*(([n, k], [block_n, BLOCK_K]) if transposed else ([k, n], [BLOCK_K, block_n])), 2)
    wait = 2 if block_n == 256 else 8  # the smallest subtrees whose sums wait in memory
    levels = max(segments // wait, 1).bit_length() - 1
    parked = np.zeros(levels * programs * 2 * 64 * block_n, np.int64)
    parts = [*sizes, 0, 0][:3]
    unused = model.launch(
        *(kernels.matmul_segments_hopper_kernel, programs, a, b, c, Pointer(parked), m, n, *parts, segments),
        *(segments, stages, 2, transposed),
        **how,
    )
    assert unused == 0
    rows, columns_of_c = range(0, -(-m // 128) * 128, 64), range(0, -(-n // block_n) * block_n, width)
    assert {corner: [how for how, _ in events] for corner, events in c.log.items()} == {
        (row, column): ["set"] for row in rows for column in columns_of_c
    }
    steps = range(0, k, BLOCK_K)
    assert set(a.history) == {(row, step) for row in rows for step in steps}
    at_b = {(column, step) for column in range(0, n, block_n) for step in steps}
    assert set(b.history) == (at_b if transposed else {(step, column) for column, step in at_b})
    # Of a tile's sums those of all levels wait, of the lowest in half of the subtrees, of the next in a quarter.
    tiles = -(-m // 128) * -(-n // block_n)
    assert parked.sum() == tiles * 128 * block_n * max(segments // wait - 1, 0)
    assert (parked > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_any_size(seed):
    r = random.Random(seed)
    for block_n in (256, 128):
        m, n = r.choice([1, 128, 333]), r.choice([block_n, 3 * block_n])
        sizes = r.choice([[64], [128, 64, 64], [64, 192]])
        programs = r.randint(1, -(-m // 128) * n // block_n)
        run(
            *(m, n, sizes, r.choice([2, 4, 8, 16, 32]), block_n, programs),
            stages=r.choice([2, 3, 6]),
            width=r.choice([64, 128]),
            transposed=r.random() < 0.5,
            resident=r.choice([1, 2]),
            seed=seed,
        )


def test_one_segment():
    run(200, 512, [256], 1, 256, 2)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("mbarrier.wait(args.empty.index(stage), phase)", "pass"),
        ("mbarrier.wait(args.full.index(stage), phase)", "pass"),
        ("mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=k != 0)", "pass"),
        ("tma.store_wait(0)  # the sums of the tile before have left it", "pass"),
        ("tma.store_wait(0)  # the sums before have left shared memory", "pass"),
        ("begin = args.SEGMENTS * K_0 + segment * K_1", "begin = segment * K_1"),
        ("p_left += gl.num_programs(0) * 2 * HALF * BLOCK_N", "pass"),
        ("total, p_left = _add_left", "total, _ = _add_left"),
        ("(gl.program_id(0) * 2 + WARP_GROUP) * HALF", "gl.program_id(0) * 2 * HALF"),
    ],
)
def test_what_is_broken_is_caught(line, instead, tmp_path):
    """Negative control: each line left out is noticed."""
    other = model.edited(hopper_segments, line, instead, tmp_path)
    some = [(256, 512, [64, 128], 8, 256, 2), (384, 512, [64], 8, 256, 1), (256, 256, [64], 16, 128, 1)]
    [run(*sizes) for sizes in some]
    with pytest.raises((Failure, AssertionError)):
        [run(*sizes, kernels=other, seed=seed, resident=2) for seed in range(10) for sizes in some]
