"""The hyperparameters that decoder-only models share, as Hugging Face's config.json writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "config.json"

#: Stored dtypes that the operators take.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Names and meanings are those of `config.json`; `others` keeps every field the model has no use for.

    A model derives its own: `model_type` and `architecture` name it in the file, `unsupported` says what of the file
    it cannot compute, and fields may be added.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: torch.dtype = torch.bfloat16
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for f in fields(CausalLMConfig):
            if f.type == "int" and getattr(self, f.name) < 1:
                raise ValueError(f"{name}: {f.name} must be at least 1, got {getattr(self, f.name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{name}: {self.num_attention_heads} attention heads cannot be shared evenly by "
                f"{self.num_key_value_heads} key/value heads"
            )

    @property
    def q_size(self) -> int:
        """Columns of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key, and of the value, projection."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def unsupported(cls, values: Mapping[str, Any]) -> list[str]:
        """The fields of a config.json that ask for what the model does not compute."""
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        asked = {
            "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
            "attention_bias": bool(values.get("attention_bias")),
            "mlp_bias": bool(values.get("mlp_bias")),
            "hidden_act": values.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(values.get("use_sliding_window")),
        }
        return [name for name, bad in asked.items() if bad]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read `path`/config.json.

        Raises:
            FileNotFoundError: no such file. ValueError: another model, or one with parts that are not built.
        """
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the fields of a config.json; raises as `from_pretrained`."""
        raw, name = dict(values), cls.__name__
        if (found := raw.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"{name}: model_type {found!r} is not supported; supported: {cls.model_type!r}")
        if unsupported := cls.unsupported(raw):
            raise ValueError(f"{name}: this checkpoint sets {', '.join(unsupported)} to something that is not built")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw and f.name not in ("dtype", "others")}
        known.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if "rope_theta" not in known and "rope_theta" in rope:
            known["rope_theta"] = rope["rope_theta"]
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [n for n in needed if not isinstance(known.get(n), int)]
        if missing:
            raise ValueError(f"{name}: {FILE} lacks {', '.join(missing)}")
        stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
        dtype = getattr(torch, stored, None)
        if dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {stored!r} is not supported; supported: bfloat16, float16, float32")
        return cls(**known, dtype=dtype, others=raw)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json; what `from_dict` read comes back as it was."""
        ours = {n: v for n, v in asdict(self).items() if n not in ("dtype", "others")}
        stored = str(self.dtype).removeprefix("torch.")
        if not self.others:
            head = {"architectures": [self.architecture], "model_type": self.model_type, "hidden_act": "silu"}
            return {**head, **ours, "attention_bias": False, "torch_dtype": stored}
        out = dict(self.others)
        out.update({n: v for n, v in ours.items() if n in out})
        out["torch_dtype" if "torch_dtype" in out else "dtype"] = stored
        return out

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """The same model stored in another dtype."""
        return replace(self, dtype=dtype)
