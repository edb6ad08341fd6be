"""Custom operators of torch, on the GPU of their tensors, and past the dispatcher where nothing listens to it."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from bi_ops.core import launches
from bi_ops.core.transforms import check_no_tangent, is_transformed, no_second, transformable

Fn = Callable[..., Any]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def on_device_of_first(fn: Fn) -> Fn:
    """`fn(tensor, ...)`, called while the tensor's GPU is the current one: Triton launches on that and no other."""

    @functools.wraps(fn)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return fn(first, *rest)
        with torch.cuda.device(first.device):
            return fn(first, *rest)

    return run


class CapturedHook:
    """A hook of a module that launches work, if anything: a CUDA graph captures it, so that a replay needs no call."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)


def has_hooks(module: torch.nn.Module, captured: bool = True) -> bool:
    """Does somebody watch this module's forward or backward? captured: a `CapturedHook` counts too."""
    m = module
    hooks = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(hooks) and (captured or any(not isinstance(h, CapturedHook) for each in hooks for h in each.values()))


def dispatcher_is_watched() -> bool:
    """Is a call traced or transformed, or does a mode wait for it?"""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_plain(t: Any) -> bool:
    """Is `t` a tensor whose values are what its memory holds: no subclass, no meta tensor, no negative view?

    Nor a wrapper of torch.func, which may outlive its transform in what a backward saved.

    The others are resolved by the dispatcher, so that a kernel that is launched without it would read something else.
    """
    return type(t) in _PLAIN and not (t.is_meta or t.is_neg() or _is_wrapped(t))


class Operator:
    """A custom operator of torch whose first argument is a tensor.

    `torch.compile`, transforms, modes and subclasses of tensors meet an ordinary custom operator, and so does what the
    dispatcher converts or refuses: an argument of another type than the function declares. Elsewhere its way through
    torch, all in Python, would take longer than a small kernel does. There the function is called as it is, and where
    a gradient is asked for by an `autograd.Function` with the same backward.
    """

    def __init__(self, fn: Fn, name: str, mutates: Iterable[str]) -> None:
        self._run, self._name = on_device_of_first(fn), name
        # Of a function whose launches are replayed, what checks nothing again (`core.replay`).
        self._run_plain = on_device_of_first(getattr(fn, "of_plain", fn))
        self._op = torch.library.custom_op(name, self._run, mutates_args=mutates)
        hints = typing.get_type_hints(fn)
        del hints["return"]
        self._kinds = [typing.get_args(h) or (h,) for h in hints.values()]
        self._kinds = [(*k, torch.nn.Parameter) if torch.Tensor in k else k for k in self._kinds]
        self._mutated = [list(hints).index(m) for m in mutates]
        if not self._mutated:
            self._op.register_autograd(no_second(name))  # until there is one: torch's error names no way out
        self._defaults = inspect.unwrap(fn).__defaults__ or ()
        self._function: type[torch.autograd.Function] | None = None
        self._transformed = transformable(name, self, None, None)

    def register_fake(self, fn: Fn) -> Fn:
        """Shapes, strides and dtypes of the results, for tracing."""
        return self._op.register_fake(fn)

    def register_autograd(self, backward: Fn, *, setup_context: Fn) -> None:
        """As torch's: setup_context(ctx, inputs, output), and backward(ctx, *grads) with a gradient per argument."""
        self._op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run_plain(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name, (torch.autograd.Function,), members)
        self._transformed = transformable(self._name, self, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        if 0 < (missing := len(self._kinds) - len(args)) <= len(self._defaults):
            args += self._defaults[-missing:]  # `setup_context` and `backward` count them all
        if dispatcher_is_watched():
            return self._watched(*args)
        requires_grad = False
        for a, kinds in zip(args, self._kinds, strict=False):  # a wrong number is the function's to refuse
            if type(a) not in kinds:
                return self._op(*args)
            if isinstance(a, torch.Tensor):
                if not is_plain(a):
                    return self._op(*args)
                requires_grad = requires_grad or a.requires_grad
        if requires_grad and torch.is_grad_enabled():
            # Without a backward of its own the operator raises when a gradient reaches it, as torch's do.
            return self._op(*args) if self._function is None else self._function.apply(*args)
        for i in self._mutated:
            launches.written(args[i])
        return self._run_plain(*args)

    def _watched(self, *args: Any) -> Any:
        """Through the dispatcher, or as one whole under a transform of torch.func."""
        if torch.compiler.is_compiling() or not is_transformed():
            return self._op(*args)
        if not torch._C._are_functorch_transforms_active():
            check_no_tangent(self._name, args)
            return self._op(*args)
        if self._mutated:
            raise NotImplementedError(f"{self._name}: writes into its argument, which torch.func cannot transform")
        return self._transformed.apply(*args)


def custom_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Fn], Operator]:
    """Make a function `name`, "bi_ops::...", an `Operator`. mutates_args: the arguments that it writes to."""
    return lambda fn: Operator(fn, name, mutates_args)
