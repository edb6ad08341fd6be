"""Other kernel configs for a check that none changes a bit. Here alone an operator is reached by its inner names."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from bi_ops.core import runtime

Change = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def _replaced(module: str, **functions: Callable[..., Any]) -> Iterator[None]:
    """Functions of a module of bi_ops, each followed by one that changes the config it chose."""
    owner = importlib.import_module(f"bi_ops.{module}")
    before = {name: getattr(owner, name) for name in functions}
    try:
        for name, choose in functions.items():
            setattr(owner, name, lambda *a, _c=choose, _b=before[name], **k: _c(_b(*a, **k)))
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def fields(module: str, function: str, **fields: Any) -> Change:
    """The usual config with these fields. Fields of a named tuple or a dataclass."""

    def choose(usual: Any) -> Any:
        return usual._replace(**fields) if hasattr(usual, "_replace") else replace(usual, **fields)

    return lambda: _replaced(module, **{function: choose})


def _attention() -> Mapping[str, Change]:
    config = importlib.import_module("bi_ops.attention.config").KernelConfig
    if runtime.INTERPRET:
        other = config(32, 2, 1, 1)
        names = ("forward", "dq", "dkv")
    else:
        other = config(64, 1, 4, 1)
        names = ("forward", "gluon_forward", "dq")
    return {
        str(other): lambda: _replaced("attention.config", **dict.fromkeys(names, lambda usual: usual and other)),
    }


def _moe() -> Mapping[str, Change]:
    changes = {"tiles of 32": fields("moe.launch", "grouped_config", block_m=32, block_n=32)}
    if not runtime.INTERPRET:
        changes["tiles of 64 rows"] = fields("moe.launch", "hopper_config", block_m=64, block_n=256, stages=4)
    return changes


def of(folder: str) -> Mapping[str, Change]:
    """Configs by name that compute an operator of this folder with the bits of the usual one."""
    if folder == "attention":
        return _attention()
    return {
        "norm": {"one row a program, read twice": fields("norm.ops", "row_config", rows=1, chunks=0)},
        "logprob": {"two rows a program": fields("logprob.ops", "row_config", rows=2)} if runtime.INTERPRET else {},
        "activation": {"two rows a program": fields("activation.ops", "tile_config", rows=2)},
        "embedding": {"two rows a program": fields("embedding.ops", "lookup_config", rows=2)},
        "rope": {"four rows a program": fields("rope.ops", "row_config", rows=4)},
        "reduction": {"two sums a program": fields("reduction.ops", "sum_config", rows=2, along_k=False, num_warps=8)},
        "moe": _moe(),
        "matmul": {"tiles of 64": fields("matmul.launch", "gemm_config", block_m=64, block_n=64)},
    }[folder]
