"""Batches that hypothesis draws, and shrinks to the smallest that fails."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bi_ops.verify.contract import PROPERTIES, Setting, first_difference, shows_something
from bi_ops.verify.subject import Batch, Results, Subject, make_batch, results
from bi_ops.verify.values import KINDS

if TYPE_CHECKING:
    from bi_ops.verify.suite import Level


def require() -> None:
    """Raises ValueError if hypothesis is missing."""
    if importlib.util.find_spec("hypothesis") is None:
        raise ValueError("verify: the full level draws its batches with hypothesis: pip install hypothesis")


class _Differs(Exception):
    """What a drawn batch showed."""


def run(
    s: Subject, dtype: torch.dtype, size: tuple[int, int], properties: Sequence[str], level: Level, device: torch.device
) -> Iterator[tuple[str, int, str, float]]:
    """(property, pairs compared, what was wrong with the smallest batch that fails, seconds) of each property."""
    made: Made = {}
    for name in properties:
        start = time.perf_counter()
        count, message = _drawn(s, dtype, size, name, level, device, made)
        yield name, count, message, round(time.perf_counter() - start, 4)


#: Batches and their results, by rows, values and seed: the same are drawn for every property.
Made = dict[tuple[tuple[int, ...], str, int], tuple[Batch, Results, bool]]


def _drawn(
    s: Subject, dtype: torch.dtype, size: tuple[int, int], name: str, level: Level, device: torch.device, made: Made
) -> tuple[int, str]:
    import hypothesis
    from hypothesis import strategies as st

    counted = 0
    longest, many = max(level.lengths), min(level.items, 12 if s.sequences else level.items)
    drawn = st.lists(st.integers(1, longest), min_size=1, max_size=many) if s.sequences else st.integers(1, many)

    @hypothesis.settings(
        max_examples=level.examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(drawn, st.sampled_from(list(KINDS)), st.integers(0, 2**16), st.integers(1, 64))
    def holds(rows: Any, values: str, seed: int, m: int) -> None:
        nonlocal counted
        items = tuple(rows) if s.sequences else (1,) * rows
        key = (items, values, seed)
        if key not in made:
            batch = make_batch(s, items, size, dtype, device, kind=values, seed=seed)
            made[key] = (batch, base := results(s, batch), shows_something(base))
        batch, base, shows = made[key]
        hypothesis.assume(shows)
        for comparison in PROPERTIES[name](s, batch, base, Setting(runs=1, sizes=(m,), seed=seed)):
            counted += len(comparison.expected)
            if difference := first_difference(comparison):
                shape = f"sequences of {list(items)}" if s.sequences else f"{len(items)} rows"
                raise _Differs(f"{shape}, {values} values, seed {seed}: {difference}")

    try:
        holds()
    except _Differs as found:
        return counted, str(found)
    except Exception as error:
        return counted, f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return counted, ""
