"""The hyperparameters that decoder-only models share, as Hugging Face's config.json writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bi_ops.models import config_fields
from bi_ops.models.config_fields import FILE, read_config

if TYPE_CHECKING:
    from typing_extensions import Self

#: Stored dtypes that the operators take.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Names and meanings are those of `config.json`; `others` keeps every field the model has no use for.

    A model derives its own: `model_type` and `architecture` name it in the file, `unsupported` says what of the file
    it cannot compute, and fields may be added. A file without `rope_theta` has 10,000, whatever the model's default is.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    #: Fields that a config.json may spell otherwise: that spelling to the field's name.
    aliases: ClassVar[Mapping[str, str]] = {}

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
        wrong = [config_fields.wrong_type(f.name, str(f.type), getattr(self, f.name)) for f in fields(self)]
        if any(wrong):
            raise ValueError(f"{name}: {'; '.join(filter(None, wrong))}")
        for f in fields(CausalLMConfig):
            if f.type == "int" and getattr(self, f.name) < 1:
                raise ValueError(f"{name}: {f.name} must be at least 1, got {getattr(self, f.name)}")
        if self.rms_norm_eps < 0 or self.rope_theta <= 0:
            raise ValueError(
                f"{name}: rms_norm_eps {self.rms_norm_eps} must not be negative, rope_theta {self.rope_theta} must be "
                "positive"
            )
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
        """What of a config.json asks for what the model does not compute: field, value and hint of each."""
        return config_fields.unsupported(values)

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
            raise ValueError(f"{name}: this checkpoint has what is not built: {'; '.join(unsupported)}")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw and f.name not in ("dtype", "others")}
        for spelling, field_name in cls.aliases.items():
            if spelling not in raw:
                continue
            if known.setdefault(field_name, raw[spelling]) != raw[spelling]:
                raise ValueError(
                    f"{name}: {field_name} {raw[field_name]!r} beside another {spelling} {raw[spelling]!r} (they are "
                    "one thing; remove one of them)"
                )
        if known.get("num_key_value_heads") is None:
            known["num_key_value_heads"] = raw.get("num_attention_heads")
        stated = known.get("head_dim", cls.__dataclass_fields__["head_dim"].default)
        if stated is None or stated is MISSING:
            known["head_dim"] = _even_head_dim(raw, name)
        known["rope_theta"] = config_fields.rope_theta(raw)
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [n for n in needed if known.get(n) is None]
        if missing:
            raise ValueError(f"{name}: {FILE} lacks {', '.join(missing)}")
        stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
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
        read = asdict(self.from_dict(self.others))
        changed = {n: v for n, v in ours.items() if v != read[n]}
        spelt = {n: spelling for spelling, n in self.aliases.items() if spelling in self.others}
        out = {**self.others, **{n: v for n, v in changed.items() if n not in spelt or n in self.others}}
        out |= {spelling: changed[n] for n, spelling in spelt.items() if n in changed}
        for key in config_fields.ROPE_KEYS if "rope_theta" in changed else ():
            if out.get(key):
                out[key] = {**out[key], "rope_theta": self.rope_theta}
        for spelling in ("dtype", "torch_dtype"):
            if spelling in out:
                out[spelling] = stored
        return out if "dtype" in out or "torch_dtype" in out else {**out, "dtype": stored}

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """The same model stored in another dtype."""
        return replace(self, dtype=dtype)


def _even_head_dim(values: Mapping[str, Any], name: str) -> int | None:
    """The head size of a config without one: the hidden size shared by the heads; None where these are not known."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return None
    if hidden % heads:
        raise ValueError(f"{name}: no head_dim is given, and hidden_size {hidden} is no multiple of {heads} heads")
    return hidden // heads
