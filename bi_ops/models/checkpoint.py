"""Hugging Face checkpoints of any causal LM, read and written without loss."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bi_ops.core.files import write_atomically, write_json
from bi_ops.models.config import FILE

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

#: Files beside the weights that travel with a model.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True)
class WeightSlice:
    """One tensor of the file: rows [start, start + rows) of the model's parameter `parameter`."""

    name: str
    parameter: str
    start: int
    rows: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The slice of the parameter, a view."""
        return parameter.narrow(0, self.start, self.rows)


def _damaged(path: Path, name: str, cause: Exception) -> ValueError:
    return ValueError(
        f"checkpoint {path}: {name} cannot be read ({type(cause).__name__}: {cause}), it is damaged or was not copied "
        "whole; copy or download it again"
    )


def _open(file: Path) -> Any:
    """`file`, opened for the tensors in it. Raises ValueError naming folder and file if it is not whole."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise _damaged(file.parent, file.name, e) from e


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        try:
            names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _damaged(path, INDEX, e) from e
        files = [path / n for n in sorted(names)]
    else:
        files = [path / WEIGHTS]
    lost = [f.name for f in files if not f.is_file()]
    if lost:
        raise FileNotFoundError(f"checkpoint {path}: no {', '.join(lost)}; only safetensors are read, never pickles")
    return files


@torch.no_grad()
def load(model: CausalLM, path: Path) -> None:
    """Fill `model` from the safetensors in `path`. Raises as `CausalLM.from_pretrained`."""
    parameters = dict(model.named_parameters())
    expected = {s.name: s for s in model.weight_slices()}
    with ExitStack() as stack:
        files = [stack.enter_context(_open(f)) for f in _weight_files(path)]
        found = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tied_copy = model.config.tie_word_embeddings and HEAD in found
        shapes = {name: list(file.get_slice(name).get_shape()) for name, file in found.items()}
        wanted = {name: list(s.of(parameters[s.parameter]).shape) for name, s in expected.items()}
        problems = [f"missing: {n} {s}" for n, s in wanted.items() if n not in shapes]
        problems += [
            f"unknown: {n} {s}" for n, s in shapes.items() if n not in wanted and not (n == HEAD and tied_copy)
        ]
        problems += [
            f"shape: {n} is {shapes[n]}, the config says {s}" for n, s in wanted.items() if shapes.get(n, s) != s
        ]
        if tied_copy and not torch.equal(found[HEAD].get_tensor(HEAD), found[EMBEDDING].get_tensor(EMBEDDING)):
            problems.append(f"tied: {HEAD} differs from {EMBEDDING}, but the config says they are one")
        if problems:
            raise ValueError(f"checkpoint {path} does not fit its config:\n  " + "\n  ".join(problems))
        for name, part in expected.items():
            part.of(parameters[part.parameter]).copy_(found[name].get_tensor(name))
    model.source, model.has_tied_copy = path, tied_copy


def _lossless_dtype(model: CausalLM) -> torch.dtype:
    parameters = [p.detach() for p in model.parameters()]
    stored = model.config.dtype
    exact = all(torch.equal(p, p.to(stored).to(p.dtype)) for p in parameters)
    return stored if exact else parameters[0].dtype


@torch.no_grad()
def save(model: CausalLM, path: Path, dtype: torch.dtype | None) -> None:
    """Write config.json, model.safetensors and the companions of the folder `model` was read from."""
    dtype = dtype or _lossless_dtype(model)
    parameters = dict(model.named_parameters())
    tensors = {
        s.name: s.of(parameters[s.parameter]).detach().to("cpu", dtype).contiguous().clone()
        for s in model.weight_slices()
    }
    if model.has_tied_copy:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_json(path / FILE, model.config.with_dtype(dtype).to_dict())
    if model.source is not None and model.source.resolve() != path.resolve():
        for name in COMPANIONS:
            if (model.source / name).is_file():
                write_atomically(path / name, partial(shutil.copyfile, model.source / name))
