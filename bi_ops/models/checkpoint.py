"""Hugging Face checkpoints of any causal LM, read and written without loss."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bi_ops.core.files import sync, to_json, write_atomically, write_json, write_together
from bi_ops.models.config_fields import FILE

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

#: Stored dtypes, in the words of safetensors. Others are quantized weights, or lose bits.
DTYPES = ("BF16", "F16", "F32")

#: A shard as every publisher names it.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

#: Bytes of a file at most, if it holds more than one tensor. Larger checkpoints are written in shards, one after the
#: other, so no more than a shard is in the host's memory.
SHARD_BYTES = 5 << 30

#: How many tensors that do not fit are named in an error.
_NAMED = 20

#: Files beside the weights that travel with a model.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True)
class WeightSlice:
    """One tensor of the file: what `index` takes of the model's parameter `parameter`."""

    name: str
    parameter: str
    index: tuple[int | slice, ...] = ()

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The slice of the parameter, a view."""
        return parameter[self.index]


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


def _listed(path: Path) -> list[str]:
    """The names of the weight files in the index of `path`. Raises ValueError if it is damaged."""
    try:
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, INDEX, e) from e
    return names


def _weight_files(path: Path) -> list[Path]:
    """What a checkpoint's tensors are read from: the shards of the index, or the one file."""
    names = _listed(path) if (path / INDEX).is_file() else [WEIGHTS]
    if WEIGHTS not in names and (path / WEIGHTS).is_file():
        raise ValueError(
            f"checkpoint {path}: holds {WEIGHTS} and {INDEX}, which lists other files; they are two checkpoints. "
            "Delete the one that is not wanted"
        )
    lost = [n for n in names if not (path / n).is_file()]
    if lost:
        raise FileNotFoundError(f"checkpoint {path}: no {', '.join(lost)}; only safetensors are read, never pickles")
    return [path / n for n in names]


def _without_prefix(found: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether the tensors are those of the model below the head, stored under names without `model.`"""
    found = set(found)
    return not found & set(wanted) and EMBEDDING.removeprefix("model.") in found


def _problems(path: Path, lines: list[str]) -> ValueError:
    rest = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return ValueError(f"checkpoint {path} does not fit its config:\n  " + "\n  ".join(lines[:_NAMED] + rest))


@torch.no_grad()
def load(model: CausalLM, path: Path) -> None:
    """Fill `model` from the safetensors in `path`. Raises as `CausalLM.from_pretrained`."""
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        files = [stack.enter_context(_open(f)) for f in _weight_files(path)]
        held = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118 (not a mapping)
        found = dict(held)
        apart, fused = ({s.name: s for s in model.weight_slices(fused)} for fused in (False, True))
        has_fused_experts = bool(found.keys() & (fused.keys() - apart.keys()))
        expected = fused if has_fused_experts else apart
        if _without_prefix(found, expected):
            raise ValueError(
                f"checkpoint {path}: its tensors have no prefix `model.`, as an embedding model's, which scores no "
                "tokens; read it with transformers.AutoModelForCausalLM and save_pretrained it to get a causal LM's"
            )
        tied_copy = model.config.tie_word_embeddings and HEAD in found
        shapes = {name: list(file.get_slice(name).get_shape()) for name, file in found.items()}
        wanted = {name: list(s.of(parameters[s.parameter]).shape) for name, s in expected.items()}
        problems = [f"twice: {n}" for n, count in Counter(n for n, _ in held).items() if count > 1]
        problems += [f"missing: {n} {s}" for n, s in wanted.items() if n not in shapes]
        problems += [
            f"unknown: {n} {s}" for n, s in shapes.items() if n not in wanted and not (n == HEAD and tied_copy)
        ]
        problems += [
            f"shape: {n} is {shapes[n]}, the config says {s}" for n, s in wanted.items() if shapes.get(n, s) != s
        ]
        dtypes = {n: file.get_slice(n).get_dtype() for n, file in found.items() if n in wanted}
        problems += [
            f"dtype: {n} is stored as {dtype}; {', '.join(DTYPES)} are read"
            for n, dtype in dtypes.items()
            if dtype not in DTYPES
        ]
        if tied_copy and not torch.equal(found[HEAD].get_tensor(HEAD), found[EMBEDDING].get_tensor(EMBEDDING)):
            problems.append(f"tied: {HEAD} differs from {EMBEDDING}, but the config says they are one")
        if problems:
            raise _problems(path, problems)
        for name, part in expected.items():
            part.of(parameters[part.parameter]).copy_(found[name].get_tensor(name))
    model.source, model.has_tied_copy, model.has_fused_experts = path, tied_copy, has_fused_experts


def _shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The names of the files, and of the tensors in each, in their order. sizes: bytes of each tensor."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if parts[-1] and held + size > SHARD_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts)}


def _lossless_dtype(stored: torch.dtype, parameters: Iterable[torch.Tensor]) -> torch.dtype:
    parameters = list(parameters)
    exact = all(torch.equal(p, p.to(stored).to(p.dtype)) for p in parameters)
    return stored if exact else parameters[0].dtype


def _superseded(path: Path, names: set[str]) -> list[Path]:
    """The files of an earlier checkpoint in `path` that a reader might take in place of `WEIGHTS`: index and shards.

    Raises:
        ValueError: another file holds tensors of the same names, and nothing says that it may be deleted.
    """
    index = path / INDEX
    try:
        listed = _listed(path) if index.is_file() else []
    except ValueError:  # damaged, so nobody's checkpoint
        listed = []
    old = [index] if index.is_file() else []
    for file in sorted(path.glob("*.safetensors")):
        if file.name == WEIGHTS:
            continue
        if file.name in listed or _SHARD.fullmatch(file.name):
            old.append(file)
            continue
        try:
            with safe_open(file, framework="pt") as other:
                same = names & set(other.keys())
        except SafetensorError:  # nobody can read it
            continue
        if same:
            raise ValueError(
                f"checkpoint {path}: {file.name} holds {min(same)} too, and readers of every *.safetensors would mix "
                "the two; move it elsewhere, or save into another folder"
            )
    return old


def _differs(source: Path, target: Path) -> bool:
    """Whether there is a file `source` that `target` is no copy of."""
    return source.is_file() and not (target.is_file() and filecmp.cmp(source, target, shallow=False))


def _is_there(file: Path, value: Any) -> bool:
    """Whether a JSON file holds `value`."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) == value
    except (OSError, ValueError):
        return False


@torch.no_grad()
def save(
    model: CausalLM, path: Path, dtype: torch.dtype | None, parameters: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write config.json, model.safetensors, or its shards, and the companions of the folder `model` was read from.

    What `path` held before stays whole until the new weights are on the disk. If the weights are all that changes, one
    rename puts them in place. Otherwise config.json goes first and comes back last, so that a folder in which a crash
    left parts of two checkpoints is none to any reader. Raises as `CausalLM.save_pretrained`.
    """
    parameters = {n: p.detach() for n, p in (parameters or dict(model.named_parameters())).items()}
    dtype = dtype or _lossless_dtype(model.config.dtype, parameters.values())
    views = {s.name: s.of(parameters[s.parameter]).detach() for s in model.weight_slices(model.has_fused_experts)}
    if model.has_tied_copy:
        views[HEAD] = views[EMBEDDING]
    shards = _shards({name: t.numel() * dtype.itemsize for name, t in views.items()})
    path.mkdir(parents=True, exist_ok=True)
    old, config, companions = _superseded(path, set(views)), model.config.with_dtype(dtype).to_dict(), []
    if model.source is not None and model.source.resolve() != path.resolve():
        companions = [name for name in COMPANIONS if _differs(model.source / name, path / name)]
    only_weights = len(shards) == 1 and not old and not companions and _is_there(path / FILE, config)

    def withdraw() -> None:
        if not only_weights:
            (path / FILE).unlink(missing_ok=True)
            sync(path)

    def write(names: list[str], file: Path) -> None:
        tensors = {name: views[name].to("cpu", dtype).contiguous().clone() for name in names}
        save_file(tensors, file, metadata={"format": "pt"})

    files: dict[Path, Callable[[Path], object]] = {path / n: partial(write, names) for n, names in shards.items()}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.numel() * dtype.itemsize for t in views.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        files[path / INDEX] = lambda file: file.write_text(to_json(index, indent=2), encoding="utf-8")
        old.append(path / WEIGHTS)
    write_together(files, withdraw)
    for file in old:
        if file not in files:
            file.unlink(missing_ok=True)
    for name in companions:
        write_atomically(path / name, partial(shutil.copyfile, cast(Path, model.source) / name))
    if not only_weights:
        sync(path)
        write_json(path / FILE, config)
    sync(path)
