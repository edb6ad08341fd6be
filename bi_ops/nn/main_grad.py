"""Weight gradients summed over micro-batches in fp32, in one order: `main_grad` buffers of a model's layers.

Autograd adds up one rounded sum per micro-batch, so another cut of the batch has other bits. A buffer carries the sum
itself from one backward to the next. Matrices get a `MainGrad`, which takes its memory in the backward, when the
activations of later layers are gone; the many small buffers of norms share allocations that are filled at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from bi_ops.core.integers import cdiv
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.pairwise import pairwise_
from bi_ops.embedding import tied
from bi_ops.nn.experts import GroupedLinear
from bi_ops.nn.layers import Embedding, Linear, RMSNorm

#: Layers that can carry a weight gradient.
Layer = Linear | RMSNorm | Embedding | GroupedLinear

#: Of the sum of a layer, and of a tied table `MainGrad.touched`.
Memory = tuple[torch.Tensor, torch.Tensor | None]

#: Elements that share an allocation at most, because each allocation costs a launch: 256 MiB of fp32.
ELEMENTS = 1 << 26


def _layers(op: str, module: torch.nn.Module) -> Iterator[Layer]:
    """The layers in `module`, in the order of `module.modules()`. Layers that share a weight are all listed.

    Every step asks, so this does not go through `named_modules`, whose names take longer than all the rest.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{op}: module must be a torch.nn.Module, got {type(module).__name__}")
    waiting, seen = [module], set()
    while waiting:
        layer = waiting.pop()
        if layer in seen:
            continue
        seen.add(layer)
        if isinstance(layer, Layer) and layer.weight is not None:
            yield layer
        waiting += [child for child in reversed(layer._modules.values()) if child is not None]


def zeros(weights: Sequence[torch.Tensor], elements: int = ELEMENTS) -> list[torch.Tensor]:
    """fp32 zeros [*weight.shape], contiguous, for each weight. Up to `elements` of one device share an allocation."""
    buffers: list[torch.Tensor] = []
    while len(buffers) < len(weights):
        part, ends = weights[len(buffers) :], [0]
        for weight in part:
            end = ends[-1] + cdiv(weight.numel(), 64) * 64  # all begin at multiples of 256 bytes
            if len(ends) > 1 and (end > elements or weight.device != part[0].device):
                break
            ends.append(end)
        flat = torch.zeros(ends[-1], dtype=torch.float32, device=part[0].device)
        each = flat.split([b - a for a, b in itertools.pairwise(ends)])
        buffers += [t if t.shape == w.shape else t[: w.numel()].view(w.shape) for t, w in zip(each, part, strict=False)]
    return buffers


def _summed(layer: Layer) -> torch.Tensor:
    """A view of the weight of the shape of its sums; several stay apart until they are collected."""
    n = _sums(layer)
    return layer.weight if n == 1 else layer.weight.expand(n, *layer.weight.shape)


def _sums(layer: Layer) -> int:
    """Of a layer: segments of a norm per head, or ranks that send rows to experts."""
    if isinstance(layer, RMSNorm):
        return layer.segments
    return layer.sources if isinstance(layer, GroupedLinear) else 1


def _touched(layers: Sequence[Layer]) -> dict[Layer, torch.Tensor]:
    """`MainGrad.touched` of each table that is the weight of one head too: its sum is then added to the head's by rows.

    Of more layers that share a weight the order of the additions counts, and a table that is not tied has to be whole.
    """
    tables = []
    for table in [layer for layer in layers if isinstance(layer, Embedding)]:
        weight = table.weight
        sharers = [layer for layer in layers if layer.weight is weight]
        if len(sharers) == 2 and any(isinstance(layer, Linear) for layer in sharers):
            tables.append(table)
    return {t: torch.empty(t.weight.shape[0] + 1, dtype=torch.bool, device=t.weight.device) for t in tables}


def main_grad_memory(module: torch.nn.Module) -> dict[torch.nn.Module, Memory]:
    """Memory for the sum of every layer of `module` that gets one, for `allocate_main_grads` of many steps.

    Raises TypeError for what is no module.
    """
    layers = [layer for layer in _layers("main_grad_memory", module) if layer.weight.requires_grad]
    touched = _touched(layers)
    sums = zeros([_summed(layer) for layer in layers])
    return {layer: (own, touched.get(layer)) for layer, own in zip(layers, sums, strict=True)}


def allocate_main_grads(
    module: torch.nn.Module,
    memory: Mapping[torch.nn.Module, Memory] | None = None,
    *,
    tensors: bool = False,
) -> None:
    """From now on a backward adds the weight gradients of `module`'s bi_ops layers to fp32 buffers, not to `.grad`.

    Each sum over tokens goes on from one backward to the next, so a batch ends in the same bits however it is cut into
    micro-batches, if they are packed with align=TOKEN_STEP. `collect_main_grads` ends it. Layers that share a weight
    get a buffer each. Frozen weights get none; biases, and parameters of other layers, keep autograd's `.grad`. The
    memory of a matrix's buffer is taken by the first backward that adds to it.

    Args:
        memory: of `main_grad_memory`, where sums then are in every step; what it held is lost. None: new memory.
        tensors: every buffer is a tensor of zeros from the start. torch.compile takes no other; the bits are the same.

    Raises TypeError for what is no module.
    """
    layers = [layer for layer in _layers("allocate_main_grads", module) if layer.weight.requires_grad]
    filled = [layer for layer in layers if tensors or isinstance(layer, RMSNorm)]
    if memory is None and tensors:
        # Apart: Inductor of torch 2.11 reads a slice of a larger buffer, if it copies one, from twice its offset.
        weights = [_summed(layer) for layer in filled]
        buffers = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
    elif memory is None:
        buffers = zeros([_summed(layer) for layer in filled])
    else:
        buffers = [memory[layer][0] for layer in filled]
        if buffers:
            torch._foreach_zero_(buffers)
    for layer, buffer in zip(filled, buffers, strict=True):
        layer.main_grad = buffer.view(-1) if isinstance(layer, RMSNorm) and layer.segments == 1 else buffer
    touched = _touched(layers) if memory is None and not tensors else {}
    for layer in layers:
        if not (tensors or isinstance(layer, RMSNorm)):
            given = (None, touched.get(layer)) if memory is None else memory[layer]
            layer.main_grad = MainGrad(_summed(layer).shape, layer.weight.device, *given)


def without_main_grad(module: torch.nn.Module) -> list[str]:
    """Names of the trainable parameters that get no buffer: biases, and those of other layers."""
    accumulated = {id(layer.weight) for layer in _layers("without_main_grad", module)}
    each = (p for m in module.modules() for p in m._parameters.values() if p is not None)
    if all(id(p) in accumulated for p in each if p.requires_grad):
        return []  # as in every step; names take longer
    return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in accumulated]


def collect_main_grads(module: torch.nn.Module) -> None:
    """Hand the finished sums over as `.grad`, in the dtype of the weight, or in its `grad_dtype`.

    The buffers of layers that share a weight are added here, in the order of `module.modules()`; of a tied table only
    the rows that the step touched. A backward that comes later raises. Raises TypeError for what is no module.
    """
    sums: dict[torch.Tensor, torch.Tensor] = {}
    tables: dict[torch.Tensor, MainGrad] = {}
    for layer in _layers("collect_main_grads", module):
        if layer.main_grad is None:
            continue
        if isinstance(layer.main_grad, MainGrad) and layer.main_grad.touched is not None:
            tables[layer.weight], layer.main_grad = layer.main_grad, None
            continue
        found = layer.main_grad.collect() if isinstance(layer.main_grad, MainGrad) else layer.main_grad
        if _sums(layer) > 1:
            found = pairwise_(found)
        if layer.weight in sums:
            sums[layer.weight] += found
        else:
            sums[layer.weight] = found
        layer.main_grad = None
    for weight, table in tables.items():
        if weight not in sums:  # of a part of the model, say
            sums[weight] = table.collect()
            continue
        rows, touched = table.collect_rows()
        assert touched is not None
        tied.add_touched_rows(sums[weight], rows, touched)
    for weight, total in sums.items():
        dtype = getattr(weight, "grad_dtype", None) or weight.dtype  # fp32 of bf16 weights whose masters are elsewhere
        total = total if total.shape == weight.shape else total.view(weight.shape)
        weight.grad = total if total.dtype == dtype else total.to(dtype)
