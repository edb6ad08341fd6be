"""Checkpoints of a run, each there whole or not at all; the same files whatever the layout of the ranks that wrote.

Each rank writes the bytes of its rows into one file of all (`core.tensor_files`), and reads those that it needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bi_ops.core import tensor_files
from bi_ops.core.files import sha256, sha256_of_parts, sync, write_atomically, write_json
from bi_ops.core.tensor_files import Rows
from bi_ops.optim import AdamW
from bi_ops.parallel import ALONE, Ranks

LATEST = "latest"
WEIGHTS, STATES = "model.safetensors", "optimizer.safetensors"

#: Of each of a model's parameters, by name, what this rank has, and what the optimizer updates.
Parameters = Mapping[str, tuple[Rows, torch.Tensor]]


def whole_parameters(model: torch.nn.Module) -> Parameters:
    """Those of a model that this rank has whole."""
    return {name: (tensor_files.whole(p), p) for name, p in model.named_parameters()}


def _masters(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Rows]:
    """The parameters, or what the optimizer keeps for them elsewhere (`optim.OffloadedAdamW`)."""
    masters: dict[torch.Tensor, torch.Tensor] = getattr(optimizer, "masters", {})
    return {name: rows._replace(tensor=masters.get(p, rows.tensor)) for name, (rows, p) in parameters.items()}


def _states(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Rows]:
    """AdamW's state as name.key; a parameter that never had a gradient has none."""
    return {
        f"{name}.{key}": rows._replace(tensor=value) if value.ndim else tensor_files.whole(value)
        for name, (rows, p) in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def save(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    ranks: Ranks = ALONE,
    parameters: Parameters | None = None,
    writes: bool = True,
) -> Path:
    """Write `folder`/step_NNNNNN (model, optimizer, state.json) and point `folder`/latest at it.

    Everything is written into a temporary folder and flushed to the disk before it gets its name, and `latest` moves
    last; a crash at any moment leaves the previous checkpoint the latest one. A folder of the same step is set aside
    until then, and comes back (see `latest`) if the new one never got its name.

    ranks: all make this call, and `folder` is one that all of them see. parameters: what each has; None: all of it, so
    the first rank writes. writes: False where another rank has, and writes, the same shards.

    Raises:
        RuntimeError: another rank could not write its rows; it is named.
    """
    final = folder / f"step_{step:06d}"
    fresh, aside = folder / f".{final.name}.tmp", _aside(final)
    shared = parameters is not None
    parameters = whole_parameters(model) if parameters is None else parameters
    files = {WEIGHTS: _masters(parameters, optimizer), STATES: _states(parameters, optimizer)}

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _recover(final)
        for leftover in (fresh, aside):  # of a run that died
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir()
        for name, tensors in files.items():
            tensor_files.create(fresh / name, tensors)

    def write() -> None:
        for name, tensors in files.items():
            own = [n for n, rows in tensors.items() if ranks.rank == 0 or (writes and shared and rows.is_shard)]
            if own:
                tensor_files.write(fresh / name, tensors, own)

    def end() -> None:
        digests = {name: sha256_of_parts(fresh / name) for name in files}
        write_json(fresh / "state.json", {"step": step, "sha256": digests, **extra})
        sync(fresh)
        if final.exists():
            os.replace(final, aside)
        os.replace(fresh, final)
        sync(folder)
        write_atomically(folder / LATEST, lambda partial: partial.write_text(final.name + "\n"))
        sync(folder)
        if aside.exists():
            shutil.rmtree(aside)

    try:
        ranks.on_first(begin)
        ranks.each(write)
        ranks.on_first(end)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(fresh, ignore_errors=True)  # a full disk gets its room back
        raise
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


def _open(path: Path) -> Any:
    """A file of tensors. Raises ValueError naming it and the way out if it is missing or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as e:
        raise _damaged(path, e) from e


def _check_digests(path: Path, digests: Mapping[str, str]) -> None:
    """Raises as `_open` where a file of the checkpoint has other bytes than were written."""
    for name, written in digests.items():
        if sha256_of_parts(path / name) != written:
            raise _damaged(path / name, SafetensorError("its SHA-256 is not that of what was written"))


def _read_state(path: Path) -> dict[str, Any]:
    """The fields of `path`/state.json. Raises as `_open`."""
    file = path / "state.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise _damaged(file, e) from e


def load(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Parameters | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Put a checkpoint's tensors into `model` and `optimizer`; returns what was saved in its state.json.

    parameters: what this rank has of the model, and reads; None: all of it. ranks: all make this call.

    Raises:
        ValueError: tensors missing, extra or of another shape or dtype (all are listed), or a damaged file. Neither
            the model nor the optimizer has changed then.
    """
    parameters = whole_parameters(model) if parameters is None else parameters
    masters, state = _masters(parameters, optimizer), _read_state(path)
    with _open(path / WEIGHTS) as weights, _open(path / STATES) as states:
        stored = {n: weights.get_slice(n) for n in weights.keys()}  # noqa: SIM118 (not a mapping)
        shapes = {n: tuple(part.get_shape()) for n, part in stored.items()}
        dtypes = {n: tensor_files.DTYPES.get(part.get_dtype(), part.get_dtype()) for n, part in stored.items()}
        wrong = [f"missing {n}" for n in masters if n not in stored]
        wrong += [f"extra {n}" for n in stored if n not in masters]
        wrong += [
            f"{n} is {list(shapes[n])}, the model has {list(rows.shape)}"
            for n, rows in masters.items()
            if n in stored and shapes[n] != rows.shape
        ]
        wrong += [
            f"{n} is {dtypes[n]}, the model has {rows.tensor.dtype}"
            for n, rows in masters.items()
            if n in stored and dtypes[n] != rows.tensor.dtype
        ]
        if wrong:
            raise ValueError(f"checkpoint: {path} does not fit the model: " + "; ".join(wrong))
        digests = state.pop("sha256", {})  # a checkpoint of an earlier release has none
        ranks.on_first(lambda: _check_digests(path, digests))
        kept: dict[str, dict[str, str]] = {}
        for n in states.keys():  # noqa: SIM118 (not a mapping)
            name, _, key = n.rpartition(".")
            kept.setdefault(name, {})[key] = n
        for name, (rows, p) in parameters.items():
            values = tensor_files.read(weights, name, rows)
            with torch.no_grad():
                masters[name].tensor.copy_(values)
                rows.tensor.copy_(values)  # rounded, where its master is elsewhere
            optimizer.state.pop(p, None)
            found = {key: tensor_files.read(states, n, rows) for key, n in kept.get(name, {}).items()}
            if found and isinstance(optimizer, AdamW):
                optimizer.set_state(p, found)
            elif found:
                # torch's keeps its step count on the CPU, its moments beside the parameter.
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
    return state


def sha256_of_weights(folder: Path) -> str:
    """SHA-256 over the bytes of the folder's *.safetensors files, in name order."""
    return sha256(*sorted(folder.glob("*.safetensors")))
