"""Operators under torch.func: reverse mode by their own gradients, vmap slice by slice, no forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Fn = Callable[..., Any]
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def is_transformed() -> bool:
    """Is a transform of torch.func active that has to see the operator whole, or a level of forward-mode gradients?

    functionalize takes operators of the dispatcher as they are.
    """
    if torch._C._are_functorch_transforms_active():
        top = torch._C._functorch.peek_interpreter_stack()
        return top is not None and top.key() != torch._C._functorch.TransformType.Functionalize
    return forward_ad._current_level >= 0


def no_forward_mode(op: str) -> NotImplementedError:
    """The error of a forward-mode gradient."""
    return NotImplementedError(
        f"{op}: has no forward-mode gradient (jvp, jacfwd, hessian, dual numbers). Use reverse mode: torch.func.vjp, "
        "grad or jacrev; for a Hessian jacrev(jacrev(f)) where the operator has a second derivative"
    )


def no_second(op: str) -> Fn:
    """The backward of an operator without a derivative."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{op}: has no derivative: what it is the gradient of is differentiable once. Way out: compute what is "
            "differentiated twice by torch's own operators, inside "
            "`with bi_ops.mode.batch_invariant_backward_mode(enabled=False)` where the mode is on"
        )

    return backward


def check_no_tangent(op: str, args: tuple[Any, ...]) -> None:
    """Raise NotImplementedError if one of `args` carries a forward-mode tangent, which a kernel would drop."""
    if forward_ad._current_level < 0 or torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
        return  # below autograd, in a mode of the dispatcher, torch's formulas see to the tangents
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise no_forward_mode(op)


def transformable(op: str, call: Fn, setup_context: Fn | None, backward: Fn | None) -> type[torch.autograd.Function]:
    """The operator `op` for torch.func.

    Args:
        call: computes it, on whatever tensors are left below the transform. setup_context, backward: as
            `torch.library.register_autograd` takes them; None for an operator without a gradient.
    """

    def vmapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Slice by slice: each has the bits that it has alone."""
        slices: list[Any] = [
            node.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if not slices:
            raise ValueError(f"{op}: vmap over an axis of size 0")
        if isinstance(slices[0], torch.Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])

    def no_jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(op)

    members = {
        "forward": staticmethod(lambda *args: call(*args)),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward or no_second(op)),
        "jvp": staticmethod(no_jvp),
        "vmap": staticmethod(vmapped),
    }
    node: Any = type(op, (torch.autograd.Function,), members)
    return node


class Node(torch.autograd.Function):
    """A node of autograd that is no custom operator, because it writes into a buffer or holds a whole chunk loop.

    Subclasses name the public function in `operator`. torch.func is refused by that name.
    """

    operator = ""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's.

        Raises:
            NotImplementedError: under a transform of torch.func, or with forward-mode tangents.
        """
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{cls.operator}: is not served under torch.func (vmap, grad, vjp, jvp, ...). Call it outside, or "
                "without main_grad; torch.autograd.grad differentiates it"
            )
        check_no_tangent(cls.operator, args)
        return super().apply(*args)
