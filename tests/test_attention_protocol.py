"""The Hopper kernels' own control flow, run on the CPU: each element written once, nobody waits for ever, no race.

What they compute is shown on the GPU alone (`test_attention_hopper.py`).
"""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any

import gluon_model as model
import numpy as np
import pytest
from gluon_values import Descriptor, Failure, Pointer

from bi_ops.attention.hopper import (
    backward,
    backward_ahead,
    backward_consumer,
    decode,
    dkv,
    dq,
    forward,
    forward_consumer,
    forward_copies,
    mainloop,
)
from bi_ops.attention.order import OnePass

EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 192, 193, 257, 300)


def starts(lengths):
    return [0, *itertools.accumulate(lengths)]


def lists(lengths, block):
    """As `tile_scheduler.lpt_order` makes them."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return starts(-(-lengths[i] // block) for i in longest_first)[:-1] + longest_first


def tile_list(lens_q, lens_k, block, causal, size):
    """As `tile_scheduler.tile_list` makes them; behind the last, memory that held a tile before."""
    tiles = [
        (-((m - n) // block + i) if causal else -m, b, -i, (b, i * block, n, m))
        for b, (n, m) in enumerate(zip(lens_q, lens_k, strict=True))
        for i in range(-(-n // block))
    ]
    starts_q, starts_k = starts(lens_q), starts(lens_k)
    records = [[b, m, starts_q[b], n, starts_k[b], k, 0, 0] for *_, (b, m, n, k) in sorted(tiles)]
    records += [records[0]] * (size - len(records))
    return [*itertools.chain(*records), len(tiles)]


def grid(lengths, longest, block, tokens=None):
    """(tiles, whether all sequences count as equal) of the launches."""
    tokens = sum(lengths) if tokens is None else tokens
    equal = longest * len(lengths) == tokens
    return (-(-longest // block) * len(lengths) if equal else tokens // block + len(lengths)), equal


def inside(lengths, before=0):
    """Starts of sequences after `before` rows that belong to none."""
    return [before + n for n in starts(lengths)]


def pointers(*lists_of_numbers):
    return [Pointer(list(numbers)) for numbers in lists_of_numbers]


def outputs(*sizes):
    return [Pointer(np.zeros(n, np.int64)) for n in sizes]


def once(*written):
    return all((w.memory == 1).all() for w in written)


def run_forward(
    lens_q,
    lens_k,
    kernels=forward,
    h=4,
    heads=2,
    teams=2,
    stages=2,
    queries=2,
    overlap=False,
    consumers_clear=False,
    ahead=False,
    **options,
):
    causal, page, pack = options.pop("causal", True), options.pop("page", 0), math.gcd(heads, 8)
    before, after = options.pop("outside", (0, 0))  # rows of q that belong to no sequence
    d, block_n, block_m, t = 64, 64, 64 * teams // pack, before + sum(lens_q) + after
    n_tiles, equal = grid(lens_q, options.pop("longest", 0) or max(lens_q), block_m, t)
    programs = min(n_tiles * h // pack, 3)
    d_q, d_k = Descriptor([t, h * d], [64 // pack, d], 2), Descriptor([sum(lens_k), h // heads * d], [block_n, d], 2)
    cu_k, table = starts(lens_k), None
    layout: tuple[Any, ...] = (None,) * 4
    if page:
        cu_k, (d_k, table, columns) = lens_k, paged_cache(lens_k, page, h // heads, d, block_n)
        layout = (columns, page, 0, d)
    out, lse = outputs(t * h * d, t * h)
    numbers = pointers(inside(lens_q, before), cu_k)
    tiles = tile_list(lens_q, lens_k, block_m, causal, n_tiles)
    for i in range(2, len(tiles) - 1, 8):
        tiles[i] += before
    numbers += [table, *pointers(tiles, [0], [-1] * (programs * queries))]
    unused = model.launch(
        *(kernels.attention_forward_kernel, programs, d_q, d_k, d_k, out, lse, *numbers, 1.0),
        *(t, len(lens_q), n_tiles, *layout, h, heads, d, block_n, teams, stages, queries),
        *(causal, overlap, equal, page, consumers_clear, pack, ahead),
        **options,
    )
    assert once(out, lse)
    return unused


def paged_cache(lengths, page, hkv, d, block_n, block_d=64):
    """(descriptor, block table, its columns): of keys in pages; what is no page of a sequence is out of bounds."""
    columns = max(-(-n // page) for n in lengths) + 1
    pages, table = itertools.count(), []
    for n in lengths:
        own = [next(pages) for _ in range(-(-n // page))]
        table += own + [-(10**6)] * (columns - len(own))
    box = math.gcd(page, block_n)
    return Descriptor([next(pages) * page, hkv * d], [box, block_d], 2), *pointers(table), columns


def run_decode(n_queries, lengths, kernels=decode, hkv=2, heads=2, page=16, slots=3, causal=True, **options):
    before, after = options.pop("outside", (0, 0))
    d, block_d, block_n, t = options.pop("head_dim", 64), 64, 64, before + sum(n_queries) + after
    cache, table, columns = paged_cache(lengths, page, hkv, d, block_n, block_d)
    n_seqs, tiles = len(lengths), len(lengths)
    if not options.pop("decoding", False) or max(n_queries) * heads > 64:
        tiles += t * heads // 64
    q, out = outputs(0, t * hkv * heads * d)
    cu_q, used = pointers(inside(n_queries, before), lengths)
    prefetch = options.pop("prefetch", 0)
    for memory in (cache, q, out, *(() if prefetch else (cu_q, used, table))):
        memory.shared = True
    unused = model.launch(
        *(kernels.attention_decode_kernel, tiles * hkv, cache, cache, q, out),
        *(cu_q, used, table, 1.0, t, n_seqs, hkv * heads * d, d, columns),
        *(
            page,
            0,
            d,
            page,
            0,
            d,
            prefetch,
            hkv,
            heads,
            d,
            block_d,
            block_n,
            page,
            slots,
            1,
            causal,
            options.pop("large", False),
        ),
        **options,
    )
    assert once(out)
    return unused


def run_backward(
    lens_q, lens_k, kernels=backward, hkv=2, heads=2, d=64, stages=None, together=4, side_by_side=2, **options
):
    causal, tokens, keys, n_seqs = options.pop("causal", True), sum(lens_q), sum(lens_k), len(lens_q)
    stages = stages or (4 if d == 64 else 2)
    programs, equal = grid(lens_k, options.pop("longest", 0) or max(lens_k), 128)
    h, n_tiles = hkv * heads, tokens // 64 + n_seqs
    n_slots = backward.n_slots(tokens, keys, n_seqs, OnePass(64, 128))
    last = max(n_seqs * hkv - side_by_side, 0) // together * together
    d_q, d_k = Descriptor([tokens, h * d], [64, d], 2), Descriptor([keys, hkv * d], [128, d], 2)
    numbers = Descriptor([h * n_tiles * 64], [64], 4)
    sums = Descriptor([h * n_slots * d // 4, 256], [d // (4 if d == 64 else 8), 256], 4)
    dq, dk, dv = outputs(tokens * h * d, keys * hkv * d, keys * hkv * d)
    turns, cu_q, cu_k, order = pointers([0] * (h * n_slots), starts(lens_q), starts(lens_k), lists(lens_k, 128))
    unused = model.launch(
        *(kernels.attention_backward_kernel, programs * hkv, d_q, d_q, d_k, d_k, numbers, numbers, sums, turns),
        *(dq, dk, dv, cu_q, cu_k, order, 1.0, n_seqs, together, last, n_tiles, n_slots),
        *(hkv, heads, d, 64, 128, stages, causal, equal),
        **options,
    )
    assert once(dk, dv)
    # `attention_prepare_kernel` writes the tiles that see no key.
    wanted = [
        not (n == 0 or (causal and (i // 64 + 1) * 64 <= m - n))
        for m, n in zip(lens_q, lens_k, strict=True)
        for i in range(m)
    ]
    assert (dq.memory.reshape(tokens, h * d) == np.array(wanted)[:, None]).all()
    assert all([how for how, _ in log] == ["set"] + ["add"] * (len(log) - 1) for log in sums.log.values())
    # Parts of a tile of dQ come from its sequence's first tile of keys to its last: from programs that started so.
    assert all([p for _, p in log] == sorted(p for _, p in log) for log in sums.log.values())
    return unused


def run_dkv(lens_q, lens_k, kernels=dkv, hkv=2, heads=2, causal=True, processors=5, **options):
    d, tokens, keys = 256, sum(lens_q), sum(lens_k)
    programs, equal = grid(lens_k, options.pop("longest", 0) or max(lens_k), 64)
    d_q, d_k = Descriptor([tokens, hkv * heads, d], [64 // heads, heads, d], 2), Descriptor([keys, hkv * d], [64, d], 2)
    dk, dv, numbers = outputs(keys * hkv * d, keys * hkv * d, 0)
    unused = model.launch(
        *(kernels.attention_dkv_hopper_kernel, programs * hkv, d_q, d_q, d_k, d_k, numbers, numbers, dk, dv),
        *(*pointers(starts(lens_q), starts(lens_k), lists(lens_k, 64)), 1.0, tokens, len(lens_q), processors),
        *(hkv, heads, d, causal, equal),
        **options,
    )
    assert once(dk, dv)
    return unused


def run_dq(lens_q, lens_k, kernels=dq, h=4, heads=2, causal=True, **options):
    d, tokens = 256, sum(lens_q)
    n_tiles, equal = grid(lens_q, options.pop("longest", 0) or max(lens_q), 128)
    programs = min(n_tiles * h, 3)
    d_q, d_k = Descriptor([tokens, h * d], [64, d], 2), Descriptor([sum(lens_k), h // heads * d], [64, d], 2)
    dq, numbers = outputs(tokens * h * d, 0)
    lists_of_numbers = pointers(starts(lens_q), starts(lens_k), lists(lens_q, 128), [0], [-1] * (programs * 2))
    unused = model.launch(
        *(kernels.attention_dq_hopper_kernel, programs, d_q, d_q, d_k, d_k, numbers, numbers, dq, *lists_of_numbers),
        *(1.0, tokens, len(lens_q), n_tiles, h, heads, d, causal, equal),
        **options,
    )
    assert once(dq)
    return unused


WAYS = [
    {"teams": 2, "stages": 2, "queries": 1},
    {"teams": 3, "stages": 2},
    {"teams": 2, "stages": 2, "ahead": True, "consumers_clear": True},
    {"teams": 2, "stages": 2, "ahead": True},
    {"teams": 3, "stages": 8, "overlap": True},
    {"teams": 2, "stages": 3, "overlap": True},
    {"teams": 2, "stages": 3, "consumers_clear": True},
    {"teams": 3, "stages": 3, "overlap": True, "ahead": True},
]
BACKWARDS = [{"d": 64, "stages": 3}, {"d": 64, "stages": 4}, {"d": 128, "stages": 2}, {"d": 128, "stages": 3}]
RUNS = {
    "forward": lambda r, q, k, **options: run_forward(
        *(q, k),
        **r.choice([{"h": 1, "heads": 1}, {"h": 6, "heads": 3}, {"h": 4, "heads": 4}, {"h": 4, "heads": 2}]),
        page=r.choice([0, 0, 16, 48, 256]),
        **r.choice(WAYS),
        **options,
    ),
    "backward": lambda r, q, k, **options: run_backward(
        *(q, k),
        **{"hkv": r.choice([1, 3]), "heads": r.choice([1, 2, 3])},
        **{"together": r.choice([1, 2, 5, 8]), "side_by_side": r.choice([0, 1, 3, 100])},
        **r.choice(BACKWARDS),
        **options,
    ),
    "dq": lambda r, q, k, **options: run_dq(q, k, h=r.choice([1, 6]), heads=1, **options),
    "dkv": lambda r, q, k, **options: run_dkv(
        q, k, hkv=r.choice([1, 3]), heads=r.choice([1, 4, 16]), processors=r.choice([1, 2, 132]), **options
    ),
}


@pytest.mark.parametrize("kernel", RUNS)
@pytest.mark.parametrize("seed", range(4))
def test_any_lengths(kernel, seed):
    """Packed and equal, empty ones, more queries than keys and fewer, a longest one that is longer than any."""
    r = random.Random(seed)
    some = [[r.choice(EDGES) for _ in range(r.choice([1, 2, 3, 5]))] for _ in range(3)]
    for lens in (*some, [r.choice(EDGES[1:])] * 3, [r.choice(EDGES[1:])]):
        lens[0] = max(lens[0], 1)
        others = [max(r.choice(EDGES), i == 0) for i in range(len(lens))]
        lens_q, lens_k = r.choice(((lens, lens), (lens, others), (others, lens)))
        longest = max(lens_q if kernel in ("forward", "dq") else lens_k) + r.choice([0, 0, 1, 150])
        options = {"causal": r.random() < 0.7, "longest": longest, "resident": r.choice([1, 2, 4]), "seed": seed}
        RUNS[kernel](r, lens_q, lens_k, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_backward_with_and_without_grouped_heads(causal, heads, head_dim):
    for lengths in ([300, 1, 0, 129], [257, 257], [640]):
        run_backward(lengths, lengths, hkv=2, heads=heads, d=head_dim, causal=causal)


@pytest.mark.parametrize("seed", range(4))
def test_any_lengths_decode(seed):
    r = random.Random(seed)
    for heads in (1, 2, 5, 7, 64, 71):
        for longest in (max(64 // heads, 1), max(200 // heads, 2)):  # decoding, and prefill in the same grid
            n_queries = [r.randint(i == 0, longest) for i in range(r.choice([1, 3, 6]))]
            n_queries[0] = max(n_queries[0], 1)
            run_decode(
                *(n_queries, [r.choice(EDGES) for _ in n_queries]),
                **{"hkv": r.choice([1, 2]), "heads": heads, "page": r.choice([8, 16, 48, 64, 256])},
                **{"slots": r.choice([2, 3, 4, 5, 16]), "causal": r.random() < 0.7, "seed": seed},
                **{"head_dim": r.choice([40, 64]), "decoding": r.random() < 0.5, "prefetch": r.choice([0, 1])},
            )


@pytest.mark.parametrize("outside", [(0, 1), (3, 0), (70, 200)])
def test_rows_that_belong_to_no_sequence_are_written_once(outside):
    for lengths in ([65, 0, 3], [1], [64, 64]):
        for way in WAYS:
            run_forward(lengths, lengths, outside=outside, **way)
        run_decode([1, 3], [65, 0], outside=outside)
    assert sum(outside) != 1 or grid([127], 128, 128, 128) == (1, True)
    for way in WAYS:  # these count as equal lengths
        run_forward([127], [127], outside=(0, 1), longest=128, **way)
        for lengths in ([1, 127], [127, 0]):
            run_forward(lengths, lengths, outside=(0, 256 - sum(lengths)), longest=128, **way)


@pytest.mark.parametrize("seed", range(20))
def test_slots_of_dq_do_not_overlap_and_grow_with_tokens(seed):
    """Each tile of dQ that takes more than one tile of keys has a slot of its own among `n_slots`."""
    r, order = random.Random(seed), OnePass(64, 128)
    n_seqs = r.choice([1, 2, 30, 300])
    lens_q, lens_k = ([r.choice(EDGES[: r.choice([4, 12])]) for _ in range(n_seqs)] for _ in range(2))
    cu_q, cu_k = starts(lens_q), starts(lens_k)
    slots = backward.n_slots(cu_q[-1], cu_k[-1], n_seqs, order)
    taken = [
        cu_q[b] // 64 + min(b, cu_k[b] // 128) + i
        for b in range(n_seqs)
        if lens_k[b] > 128
        for i in range(-(-lens_q[b] // 64))
    ]
    assert len(set(taken)) == len(taken)
    assert all(0 <= slot < slots for slot in taken)
    assert slots * 64 <= cu_q[-1] + cu_k[-1] / 2


def workspace(n_tokens, n_seqs, heads, head_dim):
    """(bytes that the backward takes beside its gradients, bytes of those), of as many query heads as KV heads."""
    buffers = backward.workspace(n_tokens, n_tokens, n_seqs, heads, head_dim, OnePass(64, 128))
    return sum(math.prod(shape) * 4 for shape in buffers), 3 * n_tokens * heads * head_dim * 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_workspace_of_many_short_sequences_is_about_that_of_one(head_dim):
    one, gradients = workspace(2**20, 1, 32, head_dim)
    assert one < gradients  # fp32 dQ and two statistics
    for n_seqs in (32_768, 65_536):
        many, _ = workspace(2**20, n_seqs, 32, head_dim)
        assert many < 1.8 * gradients, many / gradients


def test_every_barrier_is_used():
    """What nobody uses has no place of its own: the compiler gives it to what is written."""
    lengths = [130, 300]
    assert not any(run_forward(lengths, lengths, **way) for way in WAYS)
    assert run_backward(lengths, lengths) == run_backward(lengths, lengths, d=128) == 0
    assert run_dkv(lengths, lengths) == run_decode([1, 3], lengths) == 0
    assert run_dq(lengths, lengths) == 0


#: Of attention's backward at head_dim 128.
run_two_halves = functools.partial(run_backward, d=128)
#: With metadata that no kernel in flight writes, and a sequence without keys, whose producers copy nothing.
run_ahead = functools.partial(run_decode, prefetch=1, outside=(1, 1))


def run_clearing(_first, _second, run=run_forward, **options):
    """Of lengths whose last tiles are not full."""
    ways = {"consumers_clear": True, "ahead": True} if run is run_forward else {}
    lengths = [100, 300, 45, 200]
    return run(lengths, lengths, **ways, **options)


run_clearing_halves = functools.partial(run_clearing, run=run_two_halves)
run_clearing_keys = functools.partial(run_clearing, run=run_dq)

BROKEN = [
    (forward, run_forward, "(v_empty.index(i), count=WARP_GROUPS)", "(v_empty.index(i), count=1)"),
    (forward_copies, run_forward, "wait_empty(empty, step)", "pass"),
    (forward_copies, run_forward, "return step - 1, tails", "return step, tails"),
    (mainloop, run_clearing, "mbarrier.wait(args.v_tail, tails & 1)", "pass"),
    (backward_consumer, run_clearing_halves, "wait_full(args.cleared, step)", "pass"),
    (backward, run_backward, "last_group = (HKV - 1) // swizzle * swizzle", "last_group = n_pairs * 100"),
    (backward_ahead, run_backward, "wait_empty(args.ds_empty, step)", "pass"),
    (backward_ahead, run_backward, "arrive(args.ds_empty, step)", "pass"),
    (backward_ahead, run_backward, "wait_full(args.g_full, step)", "pass"),
    (backward_consumer, run_two_halves, "wait_empty(args.ds_empty, step)", "pass"),
    (backward, run_backward, "// BLOCK_M, end)\n    if n_keys", "// BLOCK_M + 1, end)\n    if n_keys"),
    (dkv, run_dkv, "wait_empty(args.empty, step)", "pass"),
    (dq, run_dq, "mbarrier.wait(args.v_empty, (step & 1) ^ 1)", "pass"),
    (dq, run_clearing_keys, "mbarrier.wait(args.cleared, tails & 1)", "pass"),
    (dq, run_clearing_keys, "mbarrier.wait(args.cleared, tails & 1)", "mbarrier.wait(args.cleared, 0)"),
    (dq, run_clearing_keys, "_clear_share(args, i, k_len - (i - step) * BLOCK_N, WARP_GROUP)", "pass"),
    (decode, run_decode, "return gl.maximum(2 * i - 1, 0)", "return 2 * i"),
    (decode, run_decode, "    if prefetch == 0:\n        wait_for_predecessors()", "    pass"),
    (decode, run_ahead, "BOX, BOXES)\n        wait_for_predecessors()", "BOX, BOXES)"),
    (decode, run_ahead, "    wait_for_predecessors()\n    _store_q(args)", "    _store_q(args)"),
    (decode, run_ahead, "last steps\n        wait_for_predecessors()", "last steps"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: f"{b[0].__name__[24:]}-{BROKEN.index(b)}")
def test_what_is_broken_is_caught(broken, tmp_path):
    """Negative control: each line left out or changed is noticed."""
    module, run, line, instead = broken
    users = {
        **{backward_ahead: (backward,), backward_consumer: (backward,)},
        **{forward_copies: (forward,), mainloop: (forward_consumer, forward)},
    }
    other = model.edited(module, line, instead, tmp_path, *users.get(module, ()))
    first = [1, 3] if module is decode else [128, 640]
    second = [0, 128] if run is run_ahead else [128, 640]
    with pytest.raises((Failure, AssertionError)):
        [run(first, second, kernels=other, seed=seed) for seed in range(model.TRIES)]
