"""Runs a Gluon kernel's own source on the CPU: what it waits for, copies and addresses, not what it computes.

Scalars and indices are real, other tensors have shapes alone. The partitions of a CTA are threads, CTAs start in the
order of their ids, `resident` at a time, and a TMA copy into shared memory arrives at any time before a thread waits
for it. An error says that no thread can go on, that a tile is used before it has come or overwritten while it is read,
or that a shape or an index is out of bounds. `launch` also counts barriers that no CTA uses: the compiler would give
their place to other data.
"""

# Classes stand for Gluon's modules here, so a function's first argument is no self.
# mypy: disable-error-code="arg-type, attr-defined, call-overload"
from __future__ import annotations

import collections
import importlib.util
import random
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

import numpy as np
from gluon_values import Barrier, Failure, Index, Layout, Shared, Tensor, fail, here, lock, machine, until

# --------------------------------------------------------------------------------------------------------------
# what kernels call


class mbarrier:
    MBarrierLayout = Layout

    def init(bar, count):
        bar.root.barriers[bar.slot] = Barrier(int(count))

    def expect(bar, size, pred=True):
        if pred:
            bar.barrier.count(1, int(size))

    def arrive(bar, pred=True):
        if pred:
            bar.barrier.count(1, 0)

    def wait(bar, phase, pred=True):
        if pred:
            bar.barrier.used = True
            until(lambda: bar.barrier.phase & 1 != phase, f"barrier of {len(bar.root.barriers)}, {bar.slot}")


class tma:
    def async_load(descriptor, corner, bar, tile, pred=True):
        if not pred:
            return
        with lock:
            if any(c < 0 for c in corner):
                fail(f"{here.name}: corner {corner}")
            if descriptor.shared and not here.waited:
                fail(f"{here.name}: reads what the kernels before may write, without waiting for them")
            if tile.those(tile.root.readers):
                fail(f"{here.name}: copies over slot {tile.slot}, read by {tile.those(tile.root.readers)}")
            tile.root.coming[tile.slot] += 1
            descriptor.history[tuple(map(int, corner))].append(("load", here.program))
            machine.copies.append((bar.barrier, descriptor.block_type.nbytes, tile))

    def async_store(descriptor, corner, tile, how="set"):
        tile.use()
        with lock:
            if not 0 <= corner[0] < descriptor.shape[0]:
                fail(f"{here.name}: corner {corner} of {descriptor.shape}")
            tile.root.readers[tile.slot].append((here.name, tile.rows))
            here.leaving.append([tile])
            for events in (descriptor.log, descriptor.history):
                events[tuple(map(int, corner))].append((how, here.program))

    def async_atomic_add(descriptor, corner, tile):
        tma.async_store(descriptor, corner, tile, "add")

    def store_wait(n):
        _finish(here.leaving, n)

    def reinterpret(tile, shape, dtype=None, layout=None):
        return tile.view(shape, whole=False)


def _finish(groups, n):
    with lock:
        while len(groups) > n:
            for tile in groups.pop(0):
                tile.root.readers[tile.slot].remove((here.name, tile.rows))


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    if a.shape[1] != b.shape[0] or acc.shape != (a.shape[0], b.shape[1]):
        fail(f"{here.name}: {a.shape} @ {b.shape} to {acc.shape}")
    tiles = [x for x in (a, b) if isinstance(x, Shared)]
    with lock:
        for tile in tiles:
            tile.use()
            if tile.those(tile.root.writers):
                fail(f"{here.name}: reads slot {tile.slot}, of which {tile.those(tile.root.writers)} write")
            tile.root.readers[tile.slot].append((here.name, tile.rows))
    here.groups.append(tiles)
    if machine.random.random() < 0.1:
        time.sleep(1e-4)  # others go on while the product is in flight: what they overwrite too early is noticed
    return acc.like(acc.shape)


def warpgroup_mma_wait(n, deps):
    _finish(here.groups, n)
    return deps[0] if len(deps) == 1 else tuple(deps)


def acquire(semaphore, value):
    until(lambda: semaphore.memory[semaphore.at] == value, f"semaphore {semaphore.at} at {int(value)}")


def release(semaphore, after):
    tma.store_wait(0)
    with lock:
        seen = Index(after.memory[after.at])
        semaphore.memory[semaphore.at] += here.warps
        lock.notify_all()
        return seen


def fetch_add(counter):
    with lock:
        counter.memory[counter.at] += 1
        return Index(counter.memory[counter.at] - 1)


def _both(scalar, array):
    def f(a, b):
        if isinstance(a, Tensor):
            return a.apply(array, b)
        return b.apply(array, a) if isinstance(b, Tensor) else Index(scalar(a, b))

    return f


def _same(x, *args, **kwargs):
    return x.like(x.shape)


def _reduce(x, axis):
    return Tensor(x.shape[:axis] + x.shape[axis + 1 :], None, Layout(x.type.layout))


class gl:
    SliceLayout = BlockedLayout = NVMMADistributedLayout = DotOperandLayout = DistributedLinearLayout = Layout
    NVMMASharedLayout = SwizzledSharedLayout = Layout
    float32, int32, int64, uint32 = "float32", "int32", "int64", "uint32"
    static_range, allocate_shared_memory = range, Shared
    maximum, minimum = _both(max, np.maximum), _both(min, np.minimum)
    exp2 = log2 = zeros_like = full_like = staticmethod(_same)
    max = sum = staticmethod(_reduce)
    permute = Tensor.permute

    def cdiv(a, b):
        return (a + b - 1) // b

    def split(x):
        return x.like(x.shape[:-1]), x.like(x.shape[:-1])

    def join(a, b):
        return a.like([*a.shape, 2])

    def static_assert(holds):
        assert holds

    def program_id(axis):
        return Index(here.program)

    def num_programs(axis):
        return Index(here.programs)

    def arange(start, end, layout=None):
        return Tensor((end - start,), np.arange(start, end), layout)

    def zeros(shape, dtype, layout=None):
        return Tensor(shape, None, layout)

    def full(shape, value, dtype, layout=None):
        return Tensor(shape, None, layout)

    def where(condition, a, b):
        given = condition, a, b
        tensors = [x for x in given if isinstance(x, Tensor)]
        if not tensors:
            return Index(a if condition else b)
        values = [x.value if isinstance(x, Tensor) else int(x) if isinstance(x, int) else None for x in given]
        value = None if any(v is None for v in values) else np.where(*values)
        return tensors[0].like(np.broadcast_shapes(*(x.shape for x in tensors)), value)

    def fma(a, b, c):
        return _same(c)

    def broadcast(a, b):
        return _same(b), b

    def convert_layout(x, layout, assert_trivial=False):
        return Tensor(x.shape, x.value, layout)

    def inline_asm_elementwise(asm, constraints, args, **kwargs):
        return _same(args[0])

    def load(pointer, mask=None, other=None, cache_modifier=""):
        if pointer.shared and not here.waited:
            fail(f"{here.name}: reads what the kernels before may write, without waiting for them")
        if isinstance(pointer.at, Tensor):
            return pointer.at.like(pointer.at.shape)
        return Index(pointer.memory[pointer.at])

    def store(pointer, x, mask=None):
        if not isinstance(pointer.at, Tensor):
            pointer.memory[pointer.at] = int(x)
            return
        at = np.broadcast_arrays(pointer.at.value, True if mask is None else mask.value)
        at = at[0][at[1]]
        if at.size and not 0 <= at.min() <= at.max() < len(pointer.memory):
            fail(f"{here.name}: writes {at.min()} to {at.max()} of {len(pointer.memory)}")
        if pointer.shared and not here.waited:
            fail(f"{here.name}: writes what the kernels before may read, without waiting for them")
        with lock:
            np.add.at(pointer.memory, at, 1)

    def warp_specialize(parts: Any, warps, registers):
        program, waited = (here.program, here.programs), here.waited

        def run(i, part, args):
            (here.program, here.programs), here.warps, here.waited = program, [4, *warps][i], waited
            here.name = f"program {here.program}, part {i} {part.__name__}"
            try:
                part(*args)
                warpgroup_mma_wait(0, (None,))
                tma.store_wait(0)
            finally:
                with lock:
                    machine.alive -= 1
                    lock.notify_all()

        _run([(run, (i, part, args)) for i, (part, args) in enumerate(parts)], -1)


def _run(threads, change):
    """All of them, and then what follows; an error in one ends the others."""

    def guarded(f, args):
        try:
            f(*args)
        except Failure:
            pass
        except BaseException:
            machine.failed = machine.failed or traceback.format_exc()

    started = [threading.Thread(target=guarded, args=each, daemon=True) for each in threads]
    with lock:
        machine.alive += len(started) + change
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    with lock:
        machine.alive -= change


def _nothing():
    pass


def _wait_for_predecessors():
    here.waited = True


def _layout(*args):
    return Layout()


def _clear_rows(tile, n_valid, warps):
    """Of what others may read as soon as they do not wait for it."""
    tile.use()
    mine = here.name, tile.rows
    with lock:
        tile.root.writers[tile.slot].append(mine)
    if machine.random.random() < 0.3:
        time.sleep(1e-3)  # others go on, and read it too early
    with lock:
        tile.store(None)
        tile.root.writers[tile.slot].remove(mine)


#: What kernels call by these names, and what runs instead.
OURS = {
    **{"gl": gl, "mbarrier": mbarrier, "tma": tma, "acquire": acquire, "release": release, "fetch_add": fetch_add},
    **{"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait},
    **{"launch_dependents": _nothing, "wait_for_predecessors": _wait_for_predecessors},
    **{"fence_async_shared": _nothing, "barrier": _nothing, "wgmma_layout": _layout, "row_layout": _layout},
    "clear_rows": _clear_rows,
    "clear_end": lambda tile, n_valid, n_copied, copied: copied and tile.store(None),
    "range": lambda *args: map(Index, range(*args)),
}


def struct(aggregate):
    """An aggregate of kernel values as a class of Python."""
    return collections.namedtuple(aggregate.__name__, aggregate.field_names)


def plain(kernel, made):
    """A kernel, or a function that one calls, as a function of Python."""
    f = kernel.fn
    if f not in made:
        names = dict(f.__globals__)
        made[f] = types.FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
        for name, value in f.__globals__.items():
            if name not in OURS and hasattr(value, "fn") and hasattr(value, "arg_names"):
                names[name] = plain(value, made)
            elif hasattr(value, "field_names"):
                names[name] = struct(value)
            elif type(value).__name__ == "constexpr":
                names[name] = value.value
        names.update(OURS)
    return made[f]


def launch(kernel, programs, *args, resident=2, seed=0, **kwargs):
    """Run a kernel of Gluon, and return how many of its barriers no program has used.

    Args:
        args, kwargs: `Descriptor`, `Pointer`, numbers and constants.

    Raises:
        Failure: see above.
    """
    machine.random, machine.failed, machine.alive = random.Random(seed), None, 0
    machine.copies, machine.shared, machine.waiting = [], collections.defaultdict(list), {}
    f, ids = plain(kernel, {}), iter(range(programs))
    given = [Index(a) if type(a) is int else a for a in args]

    def multiprocessor():
        try:
            while not machine.failed:
                with lock:
                    here.program, here.programs = next(ids, None), programs
                if here.program is None:
                    break
                here.allocated, here.waited = 0, False
                f(*given, **kwargs)
        finally:
            with lock:
                machine.alive -= 1
                lock.notify_all()

    _run([(multiprocessor, ())] * min(resident, programs), 0)
    if machine.failed:
        raise Failure(machine.failed)
    rings = [[b for tiles in of_one for b in tiles.barriers.values()] for of_one in machine.shared.values()]
    return sum(bool(ring) and not any(b.used for b in ring) for ring in rings)


#: Seeds after which a fault counts as unnoticed. The first few find it, as a rule; how threads take turns depends on
#: what else runs here.
TRIES = 60


def edited(
    module: types.ModuleType, line: str, instead: str, folder: Path, *users: types.ModuleType
) -> types.ModuleType:
    """A copy of a module in which its one occurrence of `line` is replaced: for negative controls.

    users: where the kernel is in another module, from one that uses the edited one to the kernel's. Of each a copy is
    made that uses the copy before, and the last one is returned.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1
    (folder / "edited.py").write_text(source.replace(line, instead), encoding="utf-8")
    made = _loaded("edited", folder / "edited.py")
    for i, used_by in enumerate(users):
        assert used_by.__file__ is not None
        user, before, after = _loaded(f"user_of_edited_{i}", Path(used_by.__file__)), vars(module), vars(made)
        for name in vars(user).keys() & before.keys():
            if vars(user)[name] is before[name]:
                setattr(user, name, after[name])
        module, made = used_by, user
    return made


def _loaded(name: str, path: Path) -> types.ModuleType:
    """The module in a file, under another name than its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made
