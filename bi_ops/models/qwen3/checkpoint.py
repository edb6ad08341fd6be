"""Hugging Face checkpoints, read and written without loss. The file has q, k, v and gate, up; the model fuses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bi_ops.core.files import write_atomically, write_json
from bi_ops.models.qwen3.config import Qwen3Config

if TYPE_CHECKING:
    from bi_ops.models.qwen3.model import Qwen3ForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

#: Files beside the weights that travel with a model.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True)
class Piece:
    """One tensor of the file: rows [start, start + rows) of the model's parameter `parameter`."""

    name: str
    parameter: str
    start: int
    rows: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.narrow(0, self.start, self.rows)


def pieces(config: Qwen3Config) -> Iterator[Piece]:
    """Every tensor of a checkpoint and where it lies in the model."""
    yield Piece(EMBEDDING, EMBEDDING, 0, config.vocab_size)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        fused = {
            "self_attn.qkv_proj": (("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size)),
            "mlp.gate_up_proj": (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
        }
        for parameter, parts in fused.items():
            start = 0
            for part, rows in parts:
                name = f"{layer}.{parameter.split('.')[0]}.{part}.weight"
                yield Piece(name, f"{layer}.{parameter}.weight", start, rows)
                start += rows
        own = {
            "self_attn.o_proj": config.hidden_size,
            "self_attn.q_norm": config.head_dim,
            "self_attn.k_norm": config.head_dim,
            "mlp.down_proj": config.hidden_size,
            "input_layernorm": config.hidden_size,
            "post_attention_layernorm": config.hidden_size,
        }
        for parameter, rows in own.items():
            yield Piece(f"{layer}.{parameter}.weight", f"{layer}.{parameter}.weight", 0, rows)
    yield Piece("model.norm.weight", "model.norm.weight", 0, config.hidden_size)
    if not config.tie_word_embeddings:
        yield Piece(HEAD, HEAD, 0, config.vocab_size)


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
def load(model: Qwen3ForCausalLM, path: Path) -> None:
    """Fill `model` from the safetensors in `path`. Raises as `Qwen3ForCausalLM.from_pretrained`."""
    parameters = dict(model.named_parameters())
    expected = {p.name: p for p in pieces(model.config)}
    with ExitStack() as stack:
        files = [stack.enter_context(_open(f)) for f in _weight_files(path)]
        found = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tied_copy = model.config.tie_word_embeddings and HEAD in found
        shapes = {name: list(file.get_slice(name).get_shape()) for name, file in found.items()}
        wanted = {name: list(p.of(parameters[p.parameter]).shape) for name, p in expected.items()}
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
        for name, piece in expected.items():
            piece.of(parameters[piece.parameter]).copy_(found[name].get_tensor(name))
    model.source, model.has_tied_copy = path, tied_copy


def _lossless_dtype(model: Qwen3ForCausalLM) -> torch.dtype:
    parameters = [p.detach() for p in model.parameters()]
    stored = model.config.dtype
    exact = all(torch.equal(p, p.to(stored).to(p.dtype)) for p in parameters)
    return stored if exact else parameters[0].dtype


@torch.no_grad()
def save(model: Qwen3ForCausalLM, path: Path, dtype: torch.dtype | None) -> None:
    """Write config.json, model.safetensors and the companions of the folder `model` was read from."""
    dtype = dtype or _lossless_dtype(model)
    parameters = dict(model.named_parameters())
    tensors = {
        p.name: p.of(parameters[p.parameter]).detach().to("cpu", dtype).contiguous().clone()
        for p in pieces(model.config)
    }
    if model.has_tied_copy:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_json(path / "config.json", model.config.with_dtype(dtype).to_dict())
    if model.source is not None and model.source.resolve() != path.resolve():
        for name in COMPANIONS:
            if (model.source / name).is_file():
                write_atomically(path / name, partial(shutil.copyfile, model.source / name))
