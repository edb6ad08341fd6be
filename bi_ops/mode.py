"""Ordinary PyTorch code under the contract, forward and backward.

Between `enable_batch_invariant_backward_mode()` and `disable_...`, torch's own operators on the kernels' device
(CUDA; the CPU where kernels are interpreted) run through bi_ops: `nn.Linear`, `torch.matmul`, `F.rms_norm`,
`F.embedding`, softmax, log_softmax, sum, mean, cross_entropy, scaled_dot_product_attention and their gradients. What
cannot depend on the batch passes. Anything else raises NotImplementedError.

How: a TorchDispatchMode sees every aten operator below autograd, so the gradients are torch's own formulas over
operators that are again seen, in the thread that calls backward and in autograd's threads, which inherit the mode. It
registers nothing with the dispatcher and so gets along with vLLM's `init_batch_invariance`, before or after. A
TorchFunctionMode catches what torch takes apart earlier (attention, RMS norm).

torch.compile: torch runs a compiled function eagerly while a dispatch mode is on, so it keeps the contract at eager
speed; with fullgraph=True torch raises instead. The backward of a function that ran compiled before the mode was
enabled raises. What was called first under the mode may stay eager after it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from bi_ops import _aten
from bi_ops.core import runtime

__all__ = [
    "allow_operator",
    "batch_invariant_backward_mode",
    "disable_batch_invariant_backward_mode",
    "enable_batch_invariant_backward_mode",
    "is_batch_invariant_backward_mode_enabled",
]

# --------------------------------------------------------------------------------------------------------------
# torch.bmm: vLLM replaces it by a Python function without autograd, which no mode can see


class _TorchBmm:
    """`torch.bmm` is torch's own while any thread has the mode on; what was there comes back after the last."""

    own: Any = staticmethod(torch._C._VariableFunctions.bmm)

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.replaced: Any = None

    def acquire(self) -> None:
        with self.lock:
            self.users += 1
        self.restore()

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.replaced is not None:
                torch.bmm, self.replaced = self.replaced, None  # type: ignore[assignment]

    def restore(self) -> None:
        """Put torch's own back."""
        with self.lock:
            if torch.bmm is not self.own and self.users > 0:
                self.replaced, torch.bmm = torch.bmm, self.own  # type: ignore[assignment]

    def refuse(self, code: CodeType) -> None:
        """Raise RuntimeError if `code` is the replacement's: someone still holds it, and it has no gradient."""
        if code is getattr(self.replaced, "__code__", None):
            name = f"{self.replaced.__module__}.{self.replaced.__qualname__}"
            raise RuntimeError(
                f"batch-invariant mode: torch.bmm had been replaced by {name}, which has no gradient. "
                "torch's own is back: call torch.bmm again"
            )


_bmm = _TorchBmm()

# --------------------------------------------------------------------------------------------------------------
# the modes


class _DispatchMode(TorchDispatchMode):
    """Sends every aten operator through `_aten.call`."""

    def __init__(self) -> None:
        super().__init__()
        self.suspended = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        if any(t.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in types):
            return NotImplemented  # a tensor subclass unwraps itself first; its parts come back here
        if torch.bmm is not _bmm.own:
            _bmm.restore()

        def decompose():
            with self:
                return func.decompose(*args, **kwargs)

        return _aten.call(func, args, kwargs, decompose)


def _is_ours(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == runtime.device_type() and x.is_floating_point()


def _softmax(input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # F.softmax's own rule
    return _aten.softmax(input, dim, dtype)


def _torch_softmax(input, dim, dtype=None):
    return _aten.softmax(input, dim, dtype)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _aten.scaled_dot_product_attention,
    F.rms_norm: _aten.rms_norm,
    torch.rms_norm: _aten.rms_norm,
}
_SOFTMAXES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.softmax: _softmax,
    torch.softmax: _torch_softmax,
    torch.special.softmax: _torch_softmax,
    torch.Tensor.softmax: _torch_softmax,
}
_BACKWARDS = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


def _refuse_compiled_graph(outputs: list[torch.Tensor]) -> None:
    """Raise if the graph of `outputs` holds a compiled function: its backward would run Inductor's own reductions."""
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() == "CompiledFunctionBackward":
            raise NotImplementedError(
                "batch-invariant mode: the graph holds a function that torch.compile compiled before the mode was "
                "enabled, and its backward would not keep the contract. Run its forward under the mode, or call "
                "backward outside it"
            )
        new = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(new)
        todo.extend(new)


class _FunctionMode(TorchFunctionMode):
    """Catches the functions that are taken apart before the dispatcher."""

    def __init__(self, dispatch: _DispatchMode) -> None:
        super().__init__()
        self.dispatch = dispatch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dispatch.suspended:
            return func(*args, **kwargs)
        if torch.bmm is not _bmm.own:
            _bmm.restore()
        if _bmm.replaced is not None:
            _bmm.refuse(sys._getframe(1).f_code)
        if func in _BACKWARDS:
            return self._backward(func, args, kwargs)
        served = _FUNCTIONS.get(func)
        if func in _SOFTMAXES and _aten.softmax_was_replaced():
            served = _SOFTMAXES[func]
        if served is not None and _is_ours(args[0] if args else kwargs.get("input", kwargs.get("query"))):
            return served(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, func, args, kwargs):
        """backward or grad with this mode on, so that what checkpointing recomputes is caught too.

        torch takes a mode off while it handles a call, and looks for modes by tensors: gradient edges pass unseen.
        """
        outputs = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
        inputs = args[1:] if func is torch.autograd.grad else ()
        inputs = [inputs[0]] if inputs and isinstance(inputs[0], torch.Tensor) else list(*inputs[:1])
        if not all(isinstance(t, torch.Tensor) and t.requires_grad for t in (*outputs, *inputs)):
            return func(*args, **kwargs)  # an error of torch's own, or edges already
        _refuse_compiled_graph(outputs)
        if kwargs.get("inputs") is not None or kwargs.get("materialize_grads"):
            return func(*args, **kwargs)  # these ask for tensors
        edges = [get_gradient_edge(t) for t in outputs]
        with self:
            if func is torch.autograd.grad:
                return func(edges, [get_gradient_edge(t) for t in inputs], *args[2:], **kwargs)
            if "gradient" in kwargs:  # Tensor.backward
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            return torch.autograd.backward(edges, *args[1:], **kwargs)


# --------------------------------------------------------------------------------------------------------------
# the switch, one per thread


class _Thread(threading.local):
    depth = 0
    dispatch: _DispatchMode | None = None
    function: _FunctionMode | None = None


_thread = _Thread()


def enable_batch_invariant_backward_mode() -> None:
    """Turn the mode on in this thread, forward and backward; counted, so each call needs one `disable_...`."""
    if _thread.depth == 0:
        _bmm.acquire()
        _thread.dispatch = _DispatchMode()
        _thread.function = _FunctionMode(_thread.dispatch)
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
        _bmm.release()
    _thread.depth -= 1


def _active() -> _DispatchMode | None:
    """The mode of this thread, or the one that an autograd thread inherited."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, _DispatchMode):
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
    if mode is None:
        yield
        return
    mode.suspended += 1
    try:
        yield
    finally:
        mode.suspended -= 1


def allow_operator(name: str) -> None:
    """Let the operator `name` (``"namespace::operator"``) pass: the caller vouches that it keeps the contract.

    Raises:
        ValueError: no such form of name.
    """
    if name.count("::") != 1:
        raise ValueError(f"allow_operator: {name!r} is no operator name; write it as 'namespace::operator'")
    _aten.trusted_operators.add(name)
