"""Qwen3's hyperparameters as Hugging Face writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Qwen3Config:
    """Names and meanings are those of `config.json`; `others` keeps every field the model has no use for."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: torch.dtype = torch.bfloat16
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"Qwen3Config: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"Qwen3Config: {self.num_attention_heads} attention heads cannot be shared evenly by "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 16:
            raise ValueError(f"Qwen3Config: head_dim must be a multiple of 16 (norm.qk_norm_rope), got {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Columns of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key, and of the value, projection."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Qwen3Config:
        """Read `path`/config.json.

        Raises:
            FileNotFoundError: no such file. ValueError: not a dense Qwen3, or one with parts that are not built.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"Qwen3Config: {file} does not exist; give a folder that holds a checkpoint")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"Qwen3Config: {file} is not JSON: {e}") from e
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen3Config:
        """From the fields of a config.json; raises as `from_pretrained`."""
        raw = dict(values)
        if raw.get("model_type", "qwen3") != "qwen3":
            raise ValueError(f"Qwen3Config: model_type {raw['model_type']!r} is not supported; supported: 'qwen3'")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        unsupported = {
            "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
            "attention_bias": bool(raw.get("attention_bias")),
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(raw.get("use_sliding_window")),
        }
        if any(unsupported.values()):
            names = ", ".join(n for n, bad in unsupported.items() if bad)
            raise ValueError(f"Qwen3Config: this checkpoint sets {names} to something that is not built")
        known = {n: raw[n] for n in cls.__dataclass_fields__ if n in raw and n not in ("dtype", "others")}
        known.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        if "rope_theta" not in known and "rope_theta" in rope:
            known["rope_theta"] = rope["rope_theta"]
        needed = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads"),
        )
        missing = [n for n in needed if not isinstance(known.get(n), int)]
        if missing:
            raise ValueError(f"Qwen3Config: config.json lacks {', '.join(missing)}")
        name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
        dtype = getattr(torch, name, None)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"Qwen3Config: dtype {name!r} is not supported; supported: bfloat16, float16, float32")
        return cls(**known, dtype=dtype, others=raw)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json; what `from_dict` read comes back as it was."""
        ours = {n: v for n, v in asdict(self).items() if n not in ("dtype", "others")}
        name = str(self.dtype).removeprefix("torch.")
        if not self.others:
            return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", **ours} | {
                "attention_bias": False,
                "torch_dtype": name,
            }
        out = dict(self.others)
        out.update({n: v for n, v in ours.items() if n in out})
        out["torch_dtype" if "torch_dtype" in out else "dtype"] = name
        return out

    def with_dtype(self, dtype: torch.dtype) -> Qwen3Config:
        """The same model stored in another dtype."""
        return replace(self, dtype=dtype)
