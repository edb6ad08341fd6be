"""Models by the `model_type` of their config.json: the one place that knows which there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bi_ops.models.base import CausalLM
from bi_ops.models.config import CausalLMConfig
from bi_ops.models.config_fields import read_config
from bi_ops.nn.recompute import Recompute


class Entry(NamedTuple):
    """The classes of one model."""

    config_class: type[CausalLMConfig]
    model_class: type[CausalLM]


_TABLE: dict[str, Entry] = {}


def register(model_type: str, config_class: type[CausalLMConfig], model_class: type[CausalLM]) -> None:
    """Make a model known by the `model_type` of its config.json; one of that name is replaced."""
    _TABLE[model_type] = Entry(config_class, model_class)


def unregister(model_type: str) -> None:
    """Forget a model."""
    del _TABLE[model_type]


def known() -> tuple[str, ...]:
    """Every model_type that can be loaded."""
    return tuple(sorted(_TABLE))


def lookup(values: Mapping[str, Any], where: str = "config") -> Entry:
    """The classes for the fields of a config.json.

    Raises:
        TypeError: no mapping. ValueError: no model_type, or an unknown one; the known ones are listed.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: the fields of a config.json are a mapping, got {type(values).__name__}")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _TABLE:
        raise ValueError(f"{where}: model_type is {model_type!r}; models that can be loaded: {', '.join(known())}")
    return _TABLE[model_type]


def config_from(values: Mapping[str, Any]) -> CausalLMConfig:
    """A model's config from the fields of a config.json. Raises ValueError, as `lookup` and the config itself."""
    return lookup(values).config_class.from_dict(values)


def make_model(config: Mapping[str, Any], **options: Any) -> CausalLM:
    """A model with uninitialised weights from the fields of a config.json; options as `CausalLM`.

    Raises TypeError and ValueError, as `lookup`, the config and `CausalLM`.
    """
    entry = lookup(config)
    return entry.model_class(entry.config_class.from_dict(config), **options)


def load_config(path: str | Path) -> CausalLMConfig:
    """The config of the checkpoint in `path`.

    Raises:
        FileNotFoundError: no config.json there. ValueError: it is not JSON, of an unknown model, or one with parts that
            are not built.
    """
    values = read_config(path)
    return lookup(values, str(path)).config_class.from_dict(values)


def load_model(
    path: str | Path,
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    recompute: Recompute = "selective",
    segments: int = 1,
) -> CausalLM:
    """The model in the checkpoint folder `path`, whatever it is. Raises as `load_config` and `from_pretrained`."""
    entry = lookup(read_config(path), str(path))
    return entry.model_class.from_pretrained(path, param_dtype, compute_dtype, device, recompute, segments)
