"""The gradient of a function that is put together from other operators, below autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor
_keys = torch._C.DispatchKey


def gradient(fn: Callable[..., Tensor], inputs: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each of `inputs`, where g is that of fn(*inputs).

    A mode of the dispatcher runs below autograd, which is switched off there: this switches it on again for what `fn`
    does, and the mode that is on sees the parts of the forward and of the backward.
    """
    on = [torch._C._SetExcludeDispatchKeyGuard(k, False) for k in (_keys.AutogradFunctionality, _keys.ADInplaceOrView)]
    with on[0], on[1], torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(fn(*leaves), leaves, g, materialize_grads=True)
    return tuple(t.contiguous() for t in grads)
