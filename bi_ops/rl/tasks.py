"""Verifiable tasks generated on the spot: a prompt, and a function that says how right an answer is."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Reward = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Problem:
    """One question. prompt: token ids. answer_tokens: how many tokens to sample. reward: of a completion's ids."""

    prompt: tuple[int, ...]
    answer_tokens: int
    reward: Reward


@dataclass(frozen=True)
class Alphabet:
    """The token ids that tasks write with: `symbols`, in their order, and a `separator` before the answer."""

    symbols: tuple[int, ...]
    separator: int

    @classmethod
    def integers(cls, vocab_size: int, count: int) -> Alphabet:
        """For a model without a tokenizer: the separator is 0, the symbols are 1 to `count`.

        Raises:
            ValueError: a vocabulary without room for them.
        """
        if count < 2 or vocab_size < count + 1:
            raise ValueError(
                f"tasks: {count} symbols and a separator do not fit a vocabulary of {vocab_size}; "
                f"use 2 to {vocab_size - 1} symbols"
            )
        return cls(tuple(range(1, count + 1)), 0)

    @classmethod
    def from_tokenizer(cls, path: str | Path, count: int) -> Alphabet:
        """The first `count` of 0-9, a-z, A-Z that are one token each in a `tokenizer.json`; the separator is "=".

        Raises:
            ValueError: fewer such tokens than `count`, or no token for "=".
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        ids = [tokenizer.token_to_id(c) for c in string.digits + string.ascii_letters]
        known = [i for i in ids if i is not None]
        separator = tokenizer.token_to_id("=")
        if count < 2 or len(known) < count or separator is None:
            raise ValueError(
                f"tasks: {path} has {len(known)} single-token digits and letters and "
                f"{'no' if separator is None else 'a'} '=' token; {count} symbols and '=' are needed"
            )
        return cls(tuple(known[:count]), separator)


class Task(Protocol):
    """A source of problems."""

    @property
    def name(self) -> str: ...

    def sample(self, rng: random.Random) -> Problem:
        """One problem; everything random in it comes from `rng`."""
        ...


def fraction_right(answer: Sequence[int]) -> Reward:
    """The reward of a completion: the fraction of the answer's positions that hold the right token."""
    right = tuple(answer)

    def reward(completion: Sequence[int]) -> float:
        return sum(a == b for a, b in zip(completion, right, strict=False)) / len(right)

    return reward


@dataclass(frozen=True)
class Repeat:
    """One to three copies of a symbol; go on repeating it. A rule on the last token alone: the quickest to learn."""

    alphabet: Alphabet
    length: int
    name: str = "repeat"

    def sample(self, rng: random.Random) -> Problem:
        symbol = rng.choice(self.alphabet.symbols)
        return Problem((symbol,) * rng.randint(1, 3), self.length, fraction_right((symbol,) * self.length))


@dataclass(frozen=True)
class Copy:
    """Up to `length` symbols and the separator; write the symbols again."""

    alphabet: Alphabet
    length: int
    name: str = "copy"

    def sample(self, rng: random.Random) -> Problem:
        symbols = tuple(rng.choices(self.alphabet.symbols, k=rng.randint(1, self.length)))
        return Problem((*symbols, self.alphabet.separator), len(symbols), fraction_right(symbols))


@dataclass(frozen=True)
class Sort:
    """Up to `length` symbols and the separator; write them in the alphabet's order."""

    alphabet: Alphabet
    length: int
    name: str = "sort"

    def sample(self, rng: random.Random) -> Problem:
        symbols = rng.choices(self.alphabet.symbols, k=rng.randint(1, self.length))
        answer = sorted(symbols, key=self.alphabet.symbols.index)
        return Problem((*symbols, self.alphabet.separator), len(symbols), fraction_right(answer))


@dataclass(frozen=True)
class Addition:
    """Two symbols and the separator; write the symbol of their sum, modulo the number of symbols."""

    alphabet: Alphabet
    length: int
    name: str = "addition"

    def sample(self, rng: random.Random) -> Problem:
        symbols = self.alphabet.symbols
        a, b = rng.randrange(len(symbols)), rng.randrange(len(symbols))
        answer = (symbols[(a + b) % len(symbols)],)
        return Problem((symbols[a], symbols[b], self.alphabet.separator), 1, fraction_right(answer))


TASKS: dict[str, Callable[[Alphabet, int], Task]] = {
    "repeat": Repeat,
    "copy": Copy,
    "sort": Sort,
    "addition": Addition,
}


def make_task(name: str, alphabet: Alphabet, length: int) -> Task:
    """The task called `name`, with answers of at most `length` tokens. Raises ValueError listing the tasks."""
    if name not in TASKS:
        raise ValueError(f"tasks: no task {name!r}; tasks are {', '.join(TASKS)}")
    return TASKS[name](alphabet, length)
