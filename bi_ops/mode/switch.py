"""The switch, one per thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bi_ops.mode.dispatch import DispatchMode
from bi_ops.mode.function_mode import FunctionMode
from bi_ops.mode.torch_bmm import BMM


class _Thread(threading.local):
    depth = 0
    dispatch: DispatchMode | None = None
    function: FunctionMode | None = None


_thread = _Thread()


def enable_batch_invariant_backward_mode() -> None:
    """Turn the mode on in this thread, forward and backward; counted, so each call needs one `disable_...`."""
    if _thread.depth == 0:
        BMM.acquire()
        _thread.dispatch = DispatchMode()
        _thread.function = FunctionMode(_thread.dispatch)
        _thread.dispatch.__enter__()
        _thread.function.__enter__()
    _thread.depth += 1


def disable_batch_invariant_backward_mode() -> None:
    """Undo one `enable_...` of this thread.

    Raises:
        RuntimeError: the mode is not on, or another torch mode that was entered after it is still on.
    """
    if _thread.depth == 0:
        raise RuntimeError("batch-invariant mode: disable without a matching enable in this thread")
    if _thread.depth == 1:
        dispatch, function = _thread.dispatch, _thread.function
        assert dispatch is not None and function is not None  # noqa: PT018  (depth says so)
        tops = _get_current_dispatch_mode_stack()[-1:], _get_current_function_mode_stack()[-1:]
        if tops != ([dispatch], [function]):
            raise RuntimeError("batch-invariant mode: leave the torch modes that were entered after it first")
        function.__exit__(None, None, None)
        dispatch.__exit__(None, None, None)
        _thread.dispatch = _thread.function = None
        BMM.release()
    _thread.depth -= 1


def _active() -> DispatchMode | None:
    """The mode of this thread, or the one that an autograd thread inherited."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, DispatchMode):
            return mode
    return None


def is_batch_invariant_backward_mode_enabled() -> bool:
    """Whether operators of this thread run under the contract now."""
    mode = _active()
    return mode is not None and mode.suspended == 0


@contextlib.contextmanager
def batch_invariant_backward_mode(enabled: bool = True) -> Iterator[None]:
    """The mode inside the block; with ``enabled=False``, torch's own operators inside a block that has it on.

    A backward is governed where it is called, not where its forward ran: call it inside.
    """
    if enabled:
        enable_batch_invariant_backward_mode()
        mode = _thread.dispatch
        before, mode.suspended = mode.suspended, 0  # type: ignore[union-attr]
        try:
            yield
        finally:
            mode.suspended = before  # type: ignore[union-attr]
            disable_batch_invariant_backward_mode()
        return
    mode = _active()
    with contextlib.nullcontext() if mode is None else mode.suspend():
        yield
