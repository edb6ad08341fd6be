"""Launches of an operator, made again for arguments that differ in their addresses alone.

The layers of a model call an operator with one description of arguments after another: the same shapes, strides, dtypes
and numbers. What Python does between such a call and its launches is then always the same: checks, the choice of an
order and a config, Triton's search for the compiled kernel. `replayed(fn)` does it once for a description and keeps the
outcome: which memory is allocated, which compiled kernel is launched on which grid with which numbers, and which
argument each pointer is. The next call with that description allocates, launches and returns.

    description   of a tensor: shape, strides, dtype, device, address modulo 16; of anything else its type and value;
                  the current GPU, and whether a CUDA graph is being captured; and which tensors share an address
    kept          `CompiledKernel[grid]`, Triton's own handle, and its arguments without those that are addresses

All that Triton specialises a kernel on, and all that an order or a config may depend on, is in the description. So a
replay launches the same binary with the same numbers: the same bits. A call that raises is never kept, and one that
differs in anything is checked like any first one.

Not replayed, but called as ever: where a gradient may be asked for; what a tracer, a mode or a transform watches;
subclasses of tensors; and calls that launch nothing through `launches.recorded`, or launch on other memory than their
arguments and that of `launches.empty` and `launches.filled`, a copy of an argument for instance: `refusals` says which,
and why.

What a call does beside its launches is not seen. So a function that is given to `replayed` writes by such launches
alone, or by none; `tests/test_replay.py` compares results, versions and launches of each. On the CPU checks read the
values of tensors, so nothing is replayed there unless a test asks for it. Nor is anything before `enable`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch

from bi_ops.core import runtime
from bi_ops.core.launches import Launch, Recording, is_recording
from bi_ops.core.operators import dispatcher_is_watched, is_plain
from bi_ops.core.rows import ALIGNMENT

P = ParamSpec("P")
R = TypeVar("R")

#: Descriptions that are kept; past it all are forgotten. Each number of tokens makes another one.
MOST = 2048

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (int, float, bool, str, type(None))

#: Makes an argument of a launch from the address that it is about and the tensor that has the memory.
Make = Callable[[int, torch.Tensor], Any]
#: By the type of an argument that holds an address and is no tensor: (its address; the tensor whose memory it keeps, or
#: None; how to make it for another address), or None where that is not known. A module that has such a type, of TMA
#: descriptors say, registers it.
HOLDERS: dict[type, Callable[[Any], tuple[int, torch.Tensor | None, Make] | None]] = {}

_new = object()  # of no description yet
_kept: dict[tuple[Any, ...], _Replay | str] = {}  # a text: why calls of the description cannot be replayed
_pauses = int(runtime.INTERPRET)
_enabled = False


class _Refused(Exception):
    """Why a call cannot be replayed."""


class _Argument(NamedTuple):
    """An argument of a launch that holds an address: its place, which source it is of, bytes from that one's start.

    make: None where the address itself is the argument.
    """

    place: int
    source: int
    offset: int
    make: Make | None


def _pointer(address: int, t: torch.Tensor) -> torch.Tensor:
    """What the interpreter takes for an address."""
    return t if address == t.data_ptr() else t.view(-1)[(address - t.data_ptr()) // t.itemsize :]


class _Replay:
    """The launches of one call, for other addresses. Its sources of memory: the tensors given, then those allocated."""

    def __init__(self, recording: Recording, tensors: list[torch.Tensor], result: Any) -> None:
        """Raises `_Refused` where the launches do not say what the call did."""
        here = runtime.default_device()  # where a replay launches
        if not recording.launches:
            raise _Refused("launches nothing that is recorded")
        if any(t.device != here for t in tensors):
            raise _Refused("has tensors of another device than the current one")
        given = {t.data_ptr(): i for i, t in enumerate(tensors)}
        allocated = [t for t, _ in recording.allocated]
        made = {t.untyped_storage().data_ptr(): i for i, t in enumerate(allocated, len(tensors))}
        sources = [*tensors, *allocated]

        def split(launch: Launch) -> tuple[Callable[..., object], list[Any], list[_Argument]]:
            """(how to launch; arguments, None where they hold an address; and those)."""
            if launch.run is None:
                raise _Refused(f"launches {launch.kernel}, whose handle or arguments are not there")
            fixed = list(launch.arguments.values())
            moving: list[_Argument] = []
            for place, (name, a) in enumerate(launch.arguments.items()):
                if isinstance(a, _NUMBERS):
                    continue
                source = None
                make: Make | None = _pointer if runtime.INTERPRET else None
                memory = a if isinstance(a, torch.Tensor) else None
                if memory is not None:
                    address = memory.data_ptr()
                elif (held := HOLDERS.get(type(a), lambda _: None)(a)) is not None:
                    address, memory, make = held
                    # What it is about was there, and so were these, and still are. Later ones may have its memory.
                    before = enumerate(allocated[: launch.allocated], len(tensors))
                    source = given.get(address, next((i for i, t in before if t.data_ptr() == address), None))
                if source is None and memory is not None:
                    source = given.get(address, made.get(memory.untyped_storage().data_ptr()))
                if source is None:
                    raise _Refused(f"launches {launch.kernel} on a {name} that is neither an argument nor of `empty`")
                fixed[place] = None
                moving.append(_Argument(place, source, address - sources[source].data_ptr(), make))
            return launch.run, fixed, moving

        def index(t: Any) -> int:
            """Which source the tensor is, itself; one past the last for None."""
            for i, source in enumerate([*sources, None]):
                if source is t:
                    return i
            raise _Refused("returns or writes what is neither an argument nor of `empty`")

        self._made = [(value, t.shape, t.dtype, t.device) for t, value in recording.allocated]
        self._launches = [split(launch) for launch in recording.launches]
        self._written = [index(t) for t in recording.written]
        self._is_tuple = isinstance(result, tuple)
        self._result = [index(t) for t in (result if self._is_tuple else (result,))]

    def __call__(self, tensors: list[torch.Tensor], addresses: list[int]) -> Any:
        for value, shape, dtype, device in self._made:
            if value is None:
                t = torch.empty(shape, dtype=dtype, device=device)
            else:
                t = torch.full(shape, value, dtype=dtype, device=device)
            tensors.append(t)
            addresses.append(t.data_ptr())
        if self._written:
            torch.autograd.graph.increment_version([tensors[i] for i in self._written])
        for run, fixed, moving in self._launches:
            arguments = fixed.copy()
            for place, source, offset, make in moving:
                address = addresses[source] + offset
                arguments[place] = address if make is None else make(address, tensors[source])
            run(*arguments)
        returned = [*tensors, None]
        result = [returned[i] for i in self._result]
        return tuple(result) if self._is_tuple else result[0]


def replayed(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, whose launches are kept and made again where the module's docstring says so; else `fn` itself is called.

    Its attribute `of_plain` is the same for a caller that knows: tensors are plain and need no gradient, and nobody
    watches. Raises what `fn` raises.
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _pauses or not _enabled or torch.is_grad_enabled() or dispatcher_is_watched():
            return fn(*args, **kwargs)
        return _made(fn, args, kwargs, False)

    def of_plain(*args: Any) -> Any:
        return fn(*args) if _pauses or not _enabled else _made(fn, args, {}, True)  # type: ignore[call-arg]

    call.of_plain = of_plain  # type: ignore[attr-defined]
    return cast(Callable[P, R], call)


def _made(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool) -> Any:
    """The call's outcome: replayed, or the first of its description. plain: tensors are known to be such."""
    tensors: list[torch.Tensor] = []
    addresses: list[int] = []
    key: list[Any] = [fn, *kwargs]
    for a in (*args, *kwargs.values()):
        kind = type(a)
        if kind in _TENSORS:
            if not (plain or is_plain(a)) or a.layout is not torch.strided:
                return fn(*args, **kwargs)
            address = a.data_ptr()
            tensors.append(a)
            addresses.append(address)
            key += (kind, a.shape, a.stride(), a.dtype, a.device, address % ALIGNMENT)
        elif kind in _NUMBERS or kind is torch.dtype:
            key += (kind, a)
        elif kind is tuple and all(type(n) in _NUMBERS for n in a):
            key += (kind, *[type(n) for n in a], a)
        else:
            return fn(*args, **kwargs)
    if not runtime.INTERPRET:
        key += (torch.cuda.current_device(), torch.cuda.is_current_stream_capturing())
    if len(set(addresses)) < len(addresses):  # which of them a launch has got then does not matter
        key += map(addresses.index, addresses)
    described = tuple(key)
    replay = _kept.get(described, _new)
    if type(replay) is _Replay:
        return replay(tensors, addresses)
    if replay is not _new or is_recording():
        return fn(*args, **kwargs)
    with Recording() as recording:
        result = fn(*args, **kwargs)
    _keep(described, recording, tensors, result)
    return result


def _keep(described: tuple[Any, ...], recording: Recording, tensors: list[torch.Tensor], result: Any) -> None:
    """Keep what a call has launched, or that calls of its description cannot be replayed."""
    replay: _Replay | str
    try:
        replay = _Replay(recording, tensors, result)
    except _Refused as why:
        replay = str(why)
    if len(_kept) >= MOST:
        _kept.clear()
    _kept[described] = replay


def enable() -> None:
    """Have calls replayed in this process from now on. Before, `replayed` changes nothing."""
    global _enabled
    _enabled = True


def refusals() -> list[str]:
    """Which functions were called in a way that cannot be replayed, and why; of the descriptions that are kept."""
    return sorted({f"{key[0].__name__} {why}" for key, why in list(_kept.items()) if isinstance(why, str)})


def forget() -> None:
    """Forget all that is kept: what chooses orders, backends or configs has changed."""
    _kept.clear()


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """While this is entered calls are replayed, on a CPU too, and begin with none kept; what was kept comes back."""
    global _enabled, _pauses, _kept
    before = _enabled, _pauses, _kept
    _enabled, _pauses, _kept = True, 0, {}
    try:
        yield
    finally:
        _enabled, _pauses, _kept = before


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """While this is entered, in any thread, nothing is replayed or recorded."""
    global _pauses
    _pauses += 1
    try:
        yield
    finally:
        _pauses -= 1
