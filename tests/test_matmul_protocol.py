"""The control flow of both wgrad kernels, run on the CPU: no deadlock, no race, slices of a tile added front to back.

What the kernel computes is shown on the GPU alone (`test_matmul_properties.py`).
"""

from __future__ import annotations

import random

import gluon_model as model
import numpy as np
import pytest
from gluon_values import Descriptor, Failure, Pointer

from bi_ops.matmul import hopper, hopper_tile

ROWS, BLOCK_N, BLOCK_T = 128, 128, 64


def run_wgrad(m, n, t, programs, n_split, slices, kernels=hopper, stages=4, accumulate=True, **options):
    """The last `n_split` tiles of C are split into slices of the tokens, at most one slice for each program.

    accumulate: C holds a sum, else nothing that may be read but what a slice before left.
    """
    tiles = -(-m // ROWS) * -(-n // BLOCK_N)
    n_whole, slice_tokens = tiles - n_split, -(-t // (slices * BLOCK_T)) * BLOCK_T
    g, x = Descriptor([t, m], [BLOCK_T, 64], 2), Descriptor([t, n], [BLOCK_T, BLOCK_N], 2)
    c = Descriptor([-(-m // ROWS) * ROWS, n], [64, BLOCK_N // 2], 4)  # rows past the last are left out by TMA
    semaphores = Pointer([0] * (2 * n_split))
    unused = model.launch(
        *(kernels.wgrad_kernel, programs, g, x, c, semaphores, m, n, t, n_whole, slice_tokens, stages, 8, accumulate),
        **options,
    )
    assert unused == (0 if accumulate or slice_tokens < t else 2)  # a first sum of whole tiles waits for no C
    corners = {(i, j) for i in range(0, -(-m // ROWS) * ROWS, 64) for j in range(0, -(-n // BLOCK_N) * BLOCK_N, 64)}
    assert set(c.history) == corners
    orders = list(c.history.values())
    for events in orders:
        # A slice is loaded when the slice before is stored, and slices are taken by programs in ascending order.
        if not accumulate:
            assert events[0][0] == "set"
            events.insert(0, ("load", events[0][1]))
        assert [how for how, _ in events] == ["load", "set"] * (len(events) // 2)
        assert [p for _, p in events[::2]] == [p for _, p in events[1::2]] == sorted(p for _, p in events[::2])
    many = -(-t // slice_tokens)
    assert sum(len(events) == 2 * many for events in orders) == (len(orders) if many == 1 else 4 * n_split)


@pytest.mark.parametrize("seed", range(4))
def test_any_size(seed):
    r = random.Random(seed)
    for _ in range(3):
        m, n, t = r.choice([64, 256, 320]), r.choice([128, 384]), r.choice([64, 200, 1024])
        tiles, programs = -(-m // ROWS) * -(-n // BLOCK_N), r.choice([1, 2, 3, 5])
        programs = min(programs, tiles)
        n_split = tiles % programs if t == 1024 else 0
        slices = programs // n_split if n_split else 1
        resident = r.choice([1, 2, programs])
        how = {"stages": r.choice([2, 4]), "resident": resident, "seed": seed}
        run_wgrad(m, n, t, programs, n_split, slices, **how)
        run_wgrad(m, n, t, programs, n_split, slices, accumulate=False, **how)


BROKEN = [
    ("mbarrier.wait(args.empty.index(stage), phase)", "pass"),
    ("acquire(p_semaphore, work.n_before * WARPS)", "pass"),
    ("tma.store_wait(0)  #", "pass  #"),
    ("mbarrier.wait(c_full, c_phase, pred=is_sum)", "pass"),
]
#: What a first sum would go wrong by.
BROKEN_FIRST = [
    ("is_sum = follows & (i + 1 == slice_item)", "is_sum = follows & (i + 1 < 0)"),
    ("is_sum = follows & (i + 1 == slice_item)", "pass"),
    ("if args.ACCUMULATE:  # else C is loaded for one item at most", "if True:"),
    ("acquire(p_semaphore, work.n_before * WARPS)", "pass"),
]


@pytest.mark.parametrize(
    ("broken", "accumulate"),
    [*((b, True) for b in BROKEN), *((b, False) for b in BROKEN_FIRST)],
    ids=range(len(BROKEN) + len(BROKEN_FIRST)),
)
def test_what_is_broken_is_caught(broken, accumulate, tmp_path):
    """Negative control: each line left out is noticed."""
    line, instead = broken
    other = model.edited(hopper, line, instead, tmp_path)
    some = [(256, 640, 1024, 4, 2, 2), (256, 640, BLOCK_T, 2, 0, 1), (384, 384, 1024, 3, 1, 3)]
    [run_wgrad(*sizes, accumulate=accumulate) for sizes in some]
    how = {"kernels": other, "accumulate": accumulate, "resident": 4}
    with pytest.raises((Failure, AssertionError)):
        [run_wgrad(*sizes, seed=seed, **how) for seed in range(model.TRIES) for sizes in some]


def run_tiles(m, n, t, groups, block_n, block_t, stages, transposed=False, accumulate=True, kernels=hopper_tile, **how):
    """C[m, n], or its transpose, by a program for each tile. Every element is written once, and none outside."""
    a, b = Descriptor([t, m], [block_t, 64], 2), Descriptor([t, n], [block_t, block_n], 2)
    written = np.zeros(m * n, np.int64)
    programs = -(-m // (64 * groups)) * -(-n // block_n)
    unused = model.launch(
        *(kernels.wgrad_tile_kernel, programs, a, b, Pointer(written), m, n, t, stages, groups, accumulate, transposed),
        **how,
    )
    assert unused == 0
    assert (written == 1).all()
    steps = range(0, t, block_t)
    rows, columns = range(0, programs * 64 * groups // -(-n // block_n), 64), range(0, n, block_n)
    assert set(a.history) == {(step, row) for step in steps for row in rows}
    assert set(b.history) == {(step, column) for step in steps for column in columns}


#: Rows of a tile in warp groups, its columns; the last has no producer of its own.
TILES = [(2, 128), (3, 128), (3, 256)]


@pytest.mark.parametrize(("groups", "block_n"), TILES)
@pytest.mark.parametrize("seed", range(3))
def test_a_program_for_each_tile(groups, block_n, seed):
    r = random.Random(seed)
    m, n, t = r.choice([64, 192, 328]), r.choice([128, 260]), r.choice([16, 128, 1000])
    for transposed, accumulate in ((False, True), (True, False)):
        run_tiles(m, n, t, groups, block_n, r.choice([16, 64]), r.choice([4, 7]), transposed, accumulate, seed=seed)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("mbarrier.wait(args.empty.index(stage), phase)", "pass"),
        ("mbarrier.wait(args.empty.index(two_before), gl.where(two_before > stage, phase ^ 1, phase))", "pass"),
        ("gl.where(two_before > stage, phase ^ 1, phase)", "phase"),
        ("mbarrier.wait(args.full.index(stage), phase)", "pass"),
        ("mbarrier.arrive(args.empty.index(before), pred=t > 0)", "pass"),
        ("(t >= 2 * BLOCK_T) & (refill < args.T)", "t >= 2 * BLOCK_T"),
        ("& (o_n < N)[None, :]", "& (o_n < N + 4)[None, :]"),
    ],
)
def test_what_is_broken_in_tiles_is_caught(line, instead, tmp_path):
    """Negative control: each line left out is noticed."""
    other = model.edited(hopper_tile, line, instead, tmp_path)
    sizes = [(192, 260, 512, *tile, 16, 4) for tile in TILES]
    [run_tiles(*s) for s in sizes]
    with pytest.raises((Failure, AssertionError)):
        [run_tiles(*s, kernels=other, seed=seed, resident=4) for seed in range(model.TRIES) for s in sizes]
