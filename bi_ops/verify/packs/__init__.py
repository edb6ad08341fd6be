"""Subjects by name: bi_ops' own, those of other libraries, and a user's."""

from __future__ import annotations

import functools
import importlib
import os
import sys

from bi_ops.verify.subject import Subject

#: Pack to its module, which has a function `subjects()`; it raises ValueError where the library is missing.
PACKS = {"bi_ops": "bi_ops", "torch": "torch", "vllm": "vllm", "flash-attn": "flash_attn", "liger": "liger"}


@functools.cache
def subjects(pack: str) -> dict[str, Subject]:
    """The subjects of a pack, by name.

    Raises:
        ValueError: an unknown pack, or a library that is not installed or cannot run here.
    """
    if pack not in PACKS:
        raise ValueError(f"verify: unknown subjects {pack!r}; known are {', '.join(PACKS)}")
    found = importlib.import_module(f"bi_ops.verify.packs.of_{PACKS[pack]}").subjects()
    return {s.name: s for s in found}


@functools.cache
def _imported(module: str, attribute: str) -> Subject:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"verify: cannot import {module}: {error}") from error
    value = getattr(found, attribute, None)
    if not isinstance(value, Subject):
        example = f'Subject("{attribute}", {attribute}, inputs=lambda m: {{"x": m.x()}}, batch={{"x": 0}})'
        raise ValueError(
            f"verify: {module}:{attribute} is {type(value).__name__}, no description. Write one, of bi_ops.verify: "
            f"{attribute.upper()} = {example}; see examples/verify_operator.py"
        )
    return value


def find(spec: str) -> Subject:
    """The subject called ``pack:name``, or ``module:attribute`` of a user's module.

    Raises:
        ValueError: there is none.
    """
    pack, _, name = spec.partition(":")
    if pack not in PACKS:
        return _imported(pack, name)
    if name not in subjects(pack):
        raise ValueError(f"verify: {pack} has no subject {name!r}; it has {', '.join(subjects(pack))}")
    return subjects(pack)[name]


def resolve(op: str) -> str:
    """The spec of what `--op` names: a subject of bi_ops by its name, ``pack:name``, or ``module:attribute``."""
    spec = op if ":" in op else f"bi_ops:{op}"
    find(spec)
    return spec
