"""New weights for a vLLM whose worker is another process: vLLM's own transfer by CUDA IPC, and checksums on both sides.

The worker reads the trainer's memory and loads it as it loads a checkpoint, into the tensors that CUDA graphs read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from bi_ops.rollout.vllm_weights import named_as_vllm

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

#: vLLM's weight_transfer_config.
CONFIG = {"backend": "ipc"}

#: Words of 4 bytes whose checksum is taken at once: they become 64 bits wide.
_CHUNK = 1 << 24


def require(op: str, backend: str) -> None:
    """Raise RuntimeError if vLLM's transfer cannot be imported: some releases import what they do not install.

    backend: of vLLM's weight_transfer_config.
    """
    try:
        importlib.import_module(f"vllm.distributed.weight_transfer.{backend}_engine")
    except ModuleNotFoundError as e:
        raise RuntimeError(
            f"{op}: vLLM's transfer of weights to another process imports {e.name}, which is missing; "
            f"pip install {e.name}"
        ) from e


@torch.no_grad()
def weighted_sum(t: torch.Tensor) -> torch.Tensor:
    """A number of all bits of a tensor and of their places, int64 [], on its device.

    Integers: no order of the sum changes it. Another bit, and two 4-byte words that change places, always change it.
    """
    data = t.detach().contiguous().view(-1).view(torch.uint8)
    if len(data) % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        total += (part * torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=t.device)).sum()
    return total


def checksum(t: torch.Tensor) -> int:
    """`weighted_sum` as a number."""
    return int(weighted_sum(t))


def checksums(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """`checksum` of those parameters that have the shapes given; an engine may have added rows, which are left out."""
    return {
        n: checksum(p[: shapes[n][0]])
        for n, p in model.named_parameters()
        if n in shapes and p.shape[1:] == shapes[n][1:] and p.shape[0] >= shapes[n][0]
    }


def send(llm: Any, stored: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Have vLLM's worker, on the GPU of these tensors, load them. A copy in `dtype` lives until it has.

    stored: names of a checkpoint, and tensors on a GPU.
    """
    names, copies = [], []
    for name, t in stored:
        names.append(name)
        copies.append(t.detach().to(dtype).contiguous())
    gpu = str(torch.cuda.get_device_properties(copies[0].device).uuid)
    torch.cuda.synchronize()  # another process reads them
    info = {
        "names": names,
        "dtype_names": [str(dtype).removeprefix("torch.")] * len(names),
        "shapes": [list(t.shape) for t in copies],
        "ipc_handles": [{gpu: reduce_tensor(t)[1]} for t in copies],
    }
    llm.start_weight_update()
    llm.update_weights({"update_info": info})
    llm.finish_weight_update()
    del copies
    torch.cuda.ipc_collect()


def update(llm: Any, model: CausalLM, dtype: torch.dtype) -> None:
    """Send the model's weights, rounded to `dtype`, and compare the bits that vLLM has then.

    Raises:
        RuntimeError: some have other bits, or are missing; all are listed.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    send(llm, ((w.name, w.of(parameters[w.parameter])) for w in model.weight_slices()), dtype)
    named = {n: p.detach() for n, p in named_as_vllm(model).items()}
    [theirs] = llm.apply_model(functools.partial(checksums, shapes={n: tuple(p.shape) for n, p in named.items()}))
    differ = sorted(n for n, p in named.items() if theirs.get(n) != checksum(p.to(dtype)))
    if differ:
        raise RuntimeError(f"update_weights: vLLM has other bits than the trainer in {', '.join(differ)}")
