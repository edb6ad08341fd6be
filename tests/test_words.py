"""Names use the field's words: those of CUTLASS, FlashAttention, Triton and PyTorch, none that a reader has to look up.

The words below were once names in this code. Ordinary words that a name may well have (total, groups, memory, top) are
not listed: only words that say nothing, or something else, to a reader from the field.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bi_ops").rglob("*.py"))

#: A word that is no part of any name, and what the field says.
WORDS = {
    "admit": "allow",
    "admitted": "allowlist",
    "attend": "attention_fn",
    "carried": "accumulated",
    "carry": "wgrad accumulation, serial split-K",
    "certificate": "bitwise verification cache",
    "certificates": "bitwise verification cache",
    "certified": "verified",
    "families": "operators",
    "family": "operator",
    "forced": "backend=",
    "house": "modules",
    "lattice": "KV-cache layout",
    "learned": "requires_grad",
    "obstacle": "unsupported_reason",
    "piece": "weight slice",
    "predictors": "logit indices",
    "processors": "num_sms",
    "provider": "backend",
    "providers": "backends",
    "recompose": "batch compositions",
    "rival": "baseline",
    "rivals": "baselines",
    "roof": "roofline",
    "rooms": "modules",
    "schedule": "kernel config",
    "settle": "tune",
    "settled": "tuned",
    "stranger": "distractor",
    "strangers": "distractors",
    "team": "consumer warp group",
    "teams": "consumer warp groups",
    "turn": "semaphore",
    "turns": "semaphores, ping-pong",
    "walk": "mainloop",
    "winner": "tuned",
    "winners": "tuned",
}

#: Whole names that are refused, though their words are ordinary.
NAMES = {
    "LATER": "dQ pipeline depth",
    "RING": "pipeline stages",
    "STAY": "persistent",
    "TOGETHER": "L2 swizzle group",
    "_HALVES": "16-bit dtypes",
    "_begin": "issue_mma",
    "_bring": "prefetch",
    "_close": "epilogue",
    "_fetch": "producer",
    "_halves": "16-bit dtypes",
    "_hand_over": "store_smem",
    "_leave": "store_smem",
    "_load": "producer",
    "_multiply": "consumer, mma",
    "_products": "consumer, mma",
    "_write": "store or reduce partition",
    "by_length": "longest_first",
    "capped": "softcap",
    "free_axis": "batch_axis",
    "inv": "rstd",
    "lists": "tile scheduler",
    "products": "GEMMs",
    "ring": "pipeline stages",
    "seen_keys": "mask bounds",
    "spread": "scatter",
    "stay": "persistent",
    "take": "get_tile",
    "tile_of": "get_tile",
    "way_out": "hint",
}


#: Names of modules that do not say what is in them.
MODULES = {"parts": "common, or what is in it: softmax, mask, seqlen_info"}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what a module defines: classes, functions, arguments, variables, attributes, aliases."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def words(name: str) -> list[str]:
    """`make_HTTPCache2` -> make, http, cache."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [p.lower() for p in parts]


def refused(name: str) -> str:
    """Why a name is refused: the word, and what the field says; empty if it is not."""
    if name in NAMES:
        return f"{name}: say {NAMES[name]}"
    return next((f"{name}: '{w}', say {WORDS[w]}" for w in words(name) if w in WORDS), "")


def offenders(source: str) -> list[tuple[int, str]]:
    """(line, why) of every refused name in a module."""
    return sorted({(line, why) for line, name in names(ast.parse(source)) if (why := refused(name))})


def test_names_use_the_words_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line} {why}"
        for path in FILES
        for line, why in offenders(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_modules_use_the_words_of_the_field():
    stems = {path.relative_to(ROOT): path.stem for path in FILES}
    assert {str(path): why for path, stem in stems.items() if (why := MODULES.get(stem) or refused(stem))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "def carry_split(): ...",
        "class TileSchedule: ...",
        "def f(provider): ...",
        "def f(*, provider='triton'): ...",
        "TURNS = 3",
        "for team in range(2): ...",
        "self.winners = {}",
        "with table as _HALVES: ...",
        "def wait_turn(): ...",
        "import a as certificate",
        "x = [walk_ahead for walk_ahead in ()]",
        "def take(): ...",
        "def _close(): ...",
        "FAMILIES = ()",
        "products = 3",
    ],
)
def test_a_home_made_word_is_caught(source):
    """Negative control: one name of each kind."""
    assert len(offenders(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def returns(): ...",
        "return_lse = 1",
        "total = groups = memory = top = 0",
        "x.take(1)",
        "LANES = 8",
        "'strangers'",
        "staying = 1",
    ],
)
def test_ordinary_words_pass(source):
    assert offenders(source) == []
