"""Tasks: prompts fit the alphabet, and the right answer, and only that, earns everything."""

from __future__ import annotations

import random

import pytest

from bi_ops.rl.seeds import derive_seed
from bi_ops.rl.tasks import TASKS, Alphabet, fraction_right, make_task

ALPHABET = Alphabet.integers(32, 8)


def answer(name: str, prompt: tuple[int, ...], length: int) -> list[int]:
    """The right answer, worked out anew from the prompt."""
    body = [t for t in prompt if t != ALPHABET.separator]
    return {
        "repeat": lambda: body[:1] * length,
        "copy": lambda: body,
        "sort": lambda: sorted(body),
        "addition": lambda: [(sum(b - 1 for b in body)) % 8 + 1],
    }[name]()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_right_answer_earns_one_and_a_wrong_token_costs_its_share(name):
    task = make_task(name, ALPHABET, 5)
    assert task.name == name
    for seed in range(50):
        problem = task.sample(random.Random(seed))
        right = answer(name, problem.prompt, 5)
        assert len(right) == problem.answer_tokens <= 5
        assert set(problem.prompt) <= {*ALPHABET.symbols, ALPHABET.separator}
        assert problem.reward(right) == 1.0
        wrong = [31, *right[1:]]
        assert problem.reward(wrong) == pytest.approx(1 - 1 / len(right))
        assert problem.reward([]) == 0.0


def test_a_problem_is_fixed_by_its_generator():
    task = make_task("copy", ALPHABET, 5)
    a, b, c = (task.sample(random.Random(seed)).prompt for seed in (3, 3, 4))
    assert a == b
    assert a != c


def test_tokens_after_the_answer_neither_help_nor_hurt():
    assert fraction_right([1, 2])([1, 2, 9]) == 1.0


def test_an_alphabet_comes_from_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    vocab = {"?": 0, "=": 7, "1": 5, "0": 9, "b": 3}
    Tokenizer(models.WordLevel(vocab, unk_token="?")).save(str(path))
    assert Alphabet.from_tokenizer(path, 3) == Alphabet((9, 5, 3), 7)
    with pytest.raises(ValueError, match="3 single-token digits and letters"):
        Alphabet.from_tokenizer(path, 4)


def test_bad_tasks_are_named():
    with pytest.raises(ValueError, match="tasks are repeat, copy"):
        make_task("chess", ALPHABET, 4)
    with pytest.raises(ValueError, match="vocabulary of 8; use 2 to 7 symbols"):
        Alphabet.integers(8, 8)


def test_seeds_are_pinned_and_apart():
    # A pinned value: changing the hash would change every run.
    assert derive_seed(0, 2, 1, 0, 0) == 272148004915945314
    seeds = {derive_seed(s, p, step, i) for s in range(3) for p in range(3) for step in range(5) for i in range(5)}
    assert len(seeds) == 3 * 3 * 5 * 5
    assert all(0 <= s < 2**63 for s in seeds)
