"""Parameters of which a GPU takes all, and the interpreter a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from bi_ops.core import runtime


def sweep(names: str | tuple[str, ...], values: Iterable[Any], default: Collection[Any]) -> pytest.MarkDecorator:
    """As `pytest.mark.parametrize`; in the interpreter, values that are not in `default` carry the marker slow."""

    def param(value: Any) -> Any:
        given = (value,) if isinstance(names, str) else value
        left_out = runtime.INTERPRET and value not in default
        name = "-".join(str(part).removeprefix("torch.") for part in given)
        return pytest.param(*given, marks=pytest.mark.slow if left_out else (), id=name)

    values = list(values)
    # A GPU may have other values, larger ones.
    assert not runtime.INTERPRET or all(value in values for value in default), "a default that is no value"
    return pytest.mark.parametrize(names, [param(value) for value in values])
