"""The control flow of Hopper's GEMM with K in segments, run on the CPU: no deadlock, no race, and the tree's additions.

What else the kernel computes is shown on the GPU alone (`test_matmul_segments.py`).
"""

from __future__ import annotations

import itertools
import random
from types import FunctionType, SimpleNamespace

import gluon_model as model
import pytest
from gluon_values import Descriptor, Failure, Layout

from bi_ops.matmul import hopper_segments

BLOCK_K = 64


def run(m, n, sizes, segments, block_n, programs, stages=3, width=128, transposed=True, **how):
    """sizes: of each part of K what a segment has."""
    kernels = how.pop("kernels", hopper_segments)
    k = sum(sizes) * segments
    a, c = Descriptor([m, k], [64, BLOCK_K], 2), Descriptor([-(-m // 128) * 128, n], [64, width], 2)
    b = Descriptor(*(([n, k], [block_n, BLOCK_K]) if transposed else ([k, n], [BLOCK_K, block_n])), 2)
    parts = [*sizes, 0, 0][:3]
    unused = model.launch(
        *(kernels.matmul_segments_hopper_kernel, programs, a, b, c, m, n, *parts, segments),
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


@pytest.mark.parametrize("seed", range(4))
def test_any_size(seed):
    r = random.Random(seed)
    for block_n in (256, 128):
        m, n = r.choice([1, 128, 333]), r.choice([block_n, 3 * block_n])
        sizes = r.choice([[64], [128, 64, 64], [64, 192]])
        programs = r.randint(1, -(-m // 128) * n // block_n)
        run(
            *(m, n, sizes, r.choice([2, 4, 8] if block_n == 128 else [1, 2]), block_n, programs),
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
    ],
)
def test_what_is_broken_is_caught(line, instead, tmp_path):
    """Negative control: each line left out is noticed."""
    other = model.edited(hopper_segments, line, instead, tmp_path)
    some = [(256, 512, [64, 128], 2, 256, 2), (384, 512, [64], 2, 256, 1), (256, 256, [64], 8, 128, 1)]
    [run(*sizes) for sizes in some]
    with pytest.raises((Failure, AssertionError)):
        [run(*sizes, kernels=other, seed=seed, resident=2) for seed in range(model.TRIES) for sizes in some]


class Sum:
    """A warp group's sums, as the text of what was added; split, both halves."""

    def __init__(self, text, columns):
        self.text, self.shape, self.type = text, (64, columns), SimpleNamespace(layout=Layout())

    def __add__(self, other):
        assert self.shape == other.shape
        return Sum(f"({self.text} {other.text})", self.shape[1])


def added(segments, block_n, kernels=hopper_segments):
    """What a consumer stores of each of two tiles."""
    made: dict[object, FunctionType] = {}
    stored, waiting, numbers = [], {}, itertools.count()
    consumer = model.plain(kernels._consumer, made)

    def join(left, right, columns, layout):
        assert left.text == right.text
        return Sum(left.text, columns)

    ours = {
        "_segment": lambda args, stage, phase, *_: (Sum(str(next(numbers) % segments), block_n), stage, phase),
        "_store": lambda args, part, *_: stored.append(part.text),
        "_put_aside": lambda part, smem: waiting.update({smem: part}),
        "_add_waiting": lambda part, smem: waiting.pop(smem) + part,
        "_corner": lambda args, tile, columns: (0, 0),
        "split_columns": lambda part, columns: (Sum(part.text, columns // 2),) * 2,
        "join_columns": join,
        "tma": SimpleNamespace(store_wait=lambda n: None),
        "gl": SimpleNamespace(
            NVMMADistributedLayout=Layout,
            float32=None,
            zeros=lambda shape, *_: Sum("?", shape[1]),
            cdiv=lambda a, b: a // b,
            program_id=lambda axis: 0,
            num_programs=lambda axis: 1,
        ),
    }
    for f in made.values():
        f.__globals__.update(ours)
    b_smem = SimpleNamespace(type=SimpleNamespace(shape=[3, block_n, BLOCK_K]))
    consumer(
        SimpleNamespace(
            **{"TRANSPOSED": True, "b_smem": b_smem, "c_smem_0": "c_smem", "segments": segments, "SEGMENTS": segments},
            **{"M": 128, "N": 2 * block_n},
        ),
        0,
    )
    assert not waiting
    return stored


def tree(first, last):
    middle = (first + last) // 2
    return f"({tree(first, middle)} {tree(middle, last)})" if last - first > 1 else str(first)


@pytest.mark.parametrize(("segments", "block_n"), [(1, 128), (2, 128), (4, 128), (8, 128), (1, 256), (2, 256)])
def test_segments_are_added_pairwise(segments, block_n):
    assert added(segments, block_n) == 2 * [tree(0, segments)]


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("segment % 4 == 3:", "segment % 4 == 1:"),
        ("total = held_pair + total", "total = total + held_pair"),
        ("segment % 4 == 1:", "segment % 4 == 3:"),
        ("args.SEGMENTS > 4 and segment == 3:", "args.SEGMENTS > 4 and segment == 4:"),
        ("left = held + left", "left = left + held"),
    ],
)
def test_another_tree_is_caught(line, instead, tmp_path):
    """Negative control."""
    other = model.edited(hopper_segments, line, instead, tmp_path)
    with pytest.raises((KeyError, AssertionError)):
        assert [added(8, 128, other), added(2, 256, other)] == [2 * [tree(0, 8)], 2 * [tree(0, 2)]]
