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

_WORDS = {2: torch.int16, 4: torch.int32}
#: Elements whose checksum is taken at once: they become 64 bits wide.
_CHUNK = 1 << 24


def require(op: str) -> None:
    """Raise RuntimeError if vLLM's transfer cannot be imported: some releases import what they do not install."""
    try:
        importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    except ModuleNotFoundError as e:
        raise RuntimeError(
            f"{op}: vLLM's transfer of weights to another process imports {e.name}, which is missing; "
            f"pip install {e.name}"
        ) from e


@torch.no_grad()
def checksum(t: torch.Tensor) -> int:
    """A number of the bits of a 2- or 4-byte tensor and of their places. Integers: no order of the sum changes it."""
    words = t.detach().contiguous().view(-1).view(_WORDS[t.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(part), device=t.device)
        total += (part * (2 * places + 1)).sum()
    return int(total)


def checksums(model: torch.nn.Module, rows: Mapping[str, int]) -> dict[str, int]:
    """`checksum` of the parameters that `rows` names, of their first rows: an engine may have padded them."""
    return {n: checksum(p[: rows[n]]) for n, p in model.named_parameters() if n in rows}


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
    [theirs] = llm.apply_model(functools.partial(checksums, rows={n: p.shape[0] for n, p in named.items()}))
    differ = sorted(n for n, p in named.items() if theirs.get(n) != checksum(p.to(dtype)))
    if differ:
        raise RuntimeError(f"update_weights: vLLM has other bits than the trainer in {', '.join(differ)}")
