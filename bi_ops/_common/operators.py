"""Custom operators of torch whose kernels run on the GPU that holds their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch


def on_device_of_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(tensor, ...)`, called while the tensor's GPU is the current one: Triton launches on that and no other."""

    @functools.wraps(fn)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return fn(first, *rest)
        with torch.cuda.device(first.device):
            return fn(first, *rest)

    return run


def custom_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` for functions whose first argument is a tensor, on the GPU of that tensor."""

    def register(fn: Callable[..., Any]) -> Any:
        return torch.library.custom_op(name, on_device_of_first(fn), mutates_args=mutates_args)

    return register
