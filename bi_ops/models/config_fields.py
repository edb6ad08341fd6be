"""config.json as publishers write it: read as transformers 5.24 reads it, or refused with field, value and a hint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "config.json"

#: transformers' base wavelength of a config that states none.
ROPE_THETA = 10_000.0

#: Where the rotary parameters stand; the older spelling wins, as it does in transformers.
ROPE_KEYS = ("rope_scaling", "rope_parameters")

#: Fields that change what a model computes: the values that are computed here (no such field, or null, is one too), and
#: what to do about others.
_COMPUTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False,), "no projection of attention has a bias here"),
    "mlp_bias": ((False,), "no projection of the MLP has a bias here"),
    "hidden_act": (("silu", "swish"), "the activation is silu"),
    "attention_dropout": ((0,), "set it to 0: training here drops nothing"),
    "partial_rotary_factor": ((1,), "whole heads are rotated"),
    "is_causal": ((True,), "attention is causal"),
    "use_bidirectional_attention": ((False,), "attention is causal"),
    "per_layer_config": (({},), "all layers are alike"),
    "transformers_weights": ((), "weights are read from model.safetensors or the shards of its index"),
}

#: The same of rotary parameters; `rope_theta` is read apart.
_ROPE_COMPUTED = {
    "rope_type": (("default",), "scaled positions are not computed; remove the scaling to use the trained length"),
    "type": (("default",), "scaled positions are not computed; remove the scaling to use the trained length"),
    "partial_rotary_factor": ((1,), "whole heads are rotated"),
}


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of `path`/config.json.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no JSON object.
    """
    file = Path(path) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a checkpoint folder (no {FILE} in it); download a model with "
            "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` and name that folder"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


def rope_theta(values: Mapping[str, Any]) -> Any:
    """The base wavelength: what stands in the rotary parameters, else beside them, else 10,000."""
    inside: Mapping[str, Any] = next((values[key] for key in ROPE_KEYS if values.get(key)), {})
    return inside.get("rope_theta", values.get("rope_theta", ROPE_THETA))


def _others(fields: Mapping[str, Any], computed: Mapping[str, tuple[tuple[Any, ...], str]]) -> list[str]:
    return [
        f"{name} {fields[name]!r} ({hint})"
        for name, (good, hint) in computed.items()
        if fields.get(name) is not None and fields[name] not in good
    ]


def _rope(values: Mapping[str, Any]) -> list[str]:
    """What of the rotary parameters is not computed."""
    given = [(key, values[key]) for key in ROPE_KEYS if values.get(key)]
    for key, rope in given:
        if not isinstance(rope, Mapping):
            return [f"{key} {rope!r} (it must be an object)"]
    if len(given) == 2 and given[0][1] != given[1][1]:
        return [f"rope_scaling {given[0][1]!r} beside another rope_parameters {given[1][1]!r} (remove one of them)"]
    if not given:
        return []
    key, rope = given[0]
    unread = {k: v for k, v in rope.items() if k not in _ROPE_COMPUTED and k != "rope_theta" and v is not None}
    found = _others(rope, _ROPE_COMPUTED)
    if unread and not found:
        found = [f"{key} {unread!r} (only rope_type and rope_theta are read)"]
    return found


def _windows(values: Mapping[str, Any]) -> list[str]:
    """Layers that attend to a window: as listed, else from layer `max_window_layers` on where windows are on."""
    types, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if types is None:
        first = values.get("max_window_layers", 28)
        on = values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None
        if not on or (isinstance(first, int) and isinstance(layers, int) and first >= layers):
            return []
        stated = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": first}
        found = ", ".join(f"{name} {values.get(name, default)!r}" for name, default in stated.items())
    elif not isinstance(types, list) or (isinstance(layers, int) and len(types) != layers):
        return [f"layer_types {types!r} (it must list num_hidden_layers {layers!r} layers)"]
    else:
        odd = sorted({str(t) for t in types} - {"full_attention", "attention"})
        if not odd:
            return []
        found = f"layer_types {', '.join(odd)}"
    return [f"{found} (all layers attend to the whole sequence here; set use_sliding_window to false to train so)"]


def unsupported(values: Mapping[str, Any]) -> list[str]:
    """What of a config.json a model here does not compute: each field with its value and what to do."""
    for name in ("quantization_config", "compression_config"):
        if stated := values.get(name):
            method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
            return [
                f"{name} with quant_method {method!r} (weights are read in bfloat16, float16 or float32; take the "
                "publisher's unquantized checkpoint, or dequantize this one)"
            ]
    return _others(values, _COMPUTED) + _rope(values) + _windows(values)


def wrong_type(name: str, kind: str, value: Any) -> str:
    """Why `value` cannot be the field `name` of the type `kind` ("int", "float" or "bool"); empty if it can."""
    if kind == "bool":
        good = isinstance(value, bool)
    elif kind == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "float":
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    else:
        return ""
    called = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}[kind]
    return "" if good else f"{name} is {value!r}, it must be {called} without quotes"
