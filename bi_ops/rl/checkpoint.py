"""Checkpoints of a run, each there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bi_ops.core.files import sync, write_atomically, write_json
from bi_ops.optim import AdamW

LATEST = "latest"


def _masters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The model's parameters, or what the optimizer keeps for them elsewhere (`optim.OffloadedAdamW`)."""
    masters: dict[torch.Tensor, torch.Tensor] = getattr(optimizer, "masters", {})
    return {name: masters.get(p, p) for name, p in model.named_parameters()}


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as name.key; a parameter that never had a gradient has none."""
    return {
        f"{name}.{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> Path:
    """Write `folder`/step_NNNNNN (model, optimizer, state.json) and point `folder`/latest at it.

    Everything is written into a temporary folder and flushed to the disk before it gets its name, and `latest` moves
    last; a crash at any moment leaves the previous checkpoint the latest one. A folder of the same step is set aside
    until then, and comes back (see `latest`) if the new one never got its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:06d}"
    fresh, aside = folder / f".{final.name}.tmp", _aside(final)
    _recover(final)
    for leftover in (fresh, aside):  # of a run that died
        if leftover.exists():
            shutil.rmtree(leftover)
    fresh.mkdir()
    weights = {n: p.detach().contiguous() for n, p in _masters(model, optimizer).items()}
    save_file(weights, fresh / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), fresh / "optimizer.safetensors")
    write_json(fresh / "state.json", {"step": step, **extra})
    for path in fresh.iterdir():
        sync(path)
    sync(fresh)
    if final.exists():
        os.replace(final, aside)
    os.replace(fresh, final)
    sync(folder)
    write_atomically(folder / LATEST, lambda partial: partial.write_text(final.name + "\n"))
    sync(folder)
    if aside.exists():
        shutil.rmtree(aside)
    return final


def _aside(path: Path) -> Path:
    """Where a checkpoint waits while another of its step takes its name."""
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Give a checkpoint that was set aside its name back, if none has it."""
    if not path.exists() and _aside(path).exists():
        os.replace(_aside(path), path)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None.

    Raises:
        ValueError: `latest` names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    _recover(path)
    if not (path / "state.json").is_file():
        raise ValueError(f"checkpoint: {pointer} names {path.name}, which is not there; write another name into it")
    return path


def _damaged(path: Path, cause: Exception) -> ValueError:
    return ValueError(
        f"checkpoint: {path} cannot be read ({cause}), it is damaged; write the name of an earlier checkpoint into "
        f"{path.parents[1] / LATEST}"
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file. Raises ValueError naming it and the way out if it is missing or not whole."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as e:
        raise _damaged(path, e) from e


def _read_state(path: Path) -> dict[str, Any]:
    """The fields of `path`/state.json. Raises as `_read`."""
    file = path / "state.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise _damaged(file, e) from e


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's tensors into `model` and `optimizer`; returns its state.json.

    Raises:
        ValueError: tensors missing, extra or of another shape or dtype (all are listed), or a damaged file. Neither
            the model nor the optimizer has changed then.
    """
    weights = _read(path / "model.safetensors")
    parameters = _masters(model, optimizer)
    wrong = [f"missing {n}" for n in parameters if n not in weights]
    wrong += [f"extra {n}" for n in weights if n not in parameters]
    wrong += [
        f"{n} is {list(weights[n].shape)}, the model has {list(p.shape)}"
        for n, p in parameters.items()
        if n in weights and weights[n].shape != p.shape
    ]
    wrong += [
        f"{n} is {weights[n].dtype}, the model has {p.dtype}"
        for n, p in parameters.items()
        if n in weights and weights[n].dtype != p.dtype
    ]
    if wrong:
        raise ValueError(f"checkpoint: {path} does not fit the model: " + "; ".join(wrong))
    moments, state = _read(path / "optimizer.safetensors"), _read_state(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameters[name].copy_(weights[name])
            parameter.copy_(weights[name])  # rounded, where its master is elsewhere
    for name, parameter in model.named_parameters():
        optimizer.state.pop(parameter, None)
        found = {k.removeprefix(f"{name}."): v for k, v in moments.items() if k.rpartition(".")[0] == name}
        if found and isinstance(optimizer, AdamW):
            optimizer.set_state(parameter, found)
        elif found:
            # torch's keeps its step count on the CPU, its moments beside the parameter.
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
    return state


def sha256_of_weights(folder: Path) -> str:
    """SHA-256 over the bytes of the folder's *.safetensors files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
