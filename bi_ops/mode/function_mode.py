"""The mode of Python functions: what torch takes apart early, and calls of backward."""

from __future__ import annotations

import sys

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from bi_ops.mode import allowlist, attention, functions
from bi_ops.mode.dispatch import DispatchMode
from bi_ops.mode.served import refuse
from bi_ops.mode.torch_bmm import BMM

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
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


class FunctionMode(TorchFunctionMode):
    """Catches the functions that are taken apart before the dispatcher."""

    def __init__(self, dispatch: DispatchMode) -> None:
        super().__init__()
        self.dispatch = dispatch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dispatch.suspended:
            return func(*args, **kwargs)
        if torch.bmm is not BMM.own:
            BMM.restore()
        if BMM.replaced is not None:
            BMM.refuse(sys._getframe(1).f_code)
        if func in _BACKWARDS:
            return self._backward(func, args, kwargs)
        if func in attention.COMPOSED:
            with self:
                return attention.body(func)(*args, **kwargs)
        if allowlist.trusted_operators and f"aten::{func.__name__}" in allowlist.trusted_operators:
            return func(*args, **kwargs)
        try:
            result = functions.replaced(func, args, kwargs)
        except (TypeError, ValueError, IndexError) as error:
            with self.dispatch.suspend():
                refuse(func, args, kwargs, error)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _backward(self, func, args, kwargs):
        """backward or grad with this mode on, so that what checkpointing recomputes is caught too.

        torch takes a mode off while it handles a call, and looks for modes by tensors: gradient edges pass unseen.
        """
        outputs = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
        if torch.is_inference_mode_enabled() or any(map(_is_wrapped, outputs)):
            return func(*args, **kwargs)  # without edges of their own
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
