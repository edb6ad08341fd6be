"""A malformed call raises its documented error, which names the call, or is legal and gives torch's shape and dtype.

Every public function of every public module is called with each argument replaced, left out and unknown.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types

import pytest
import torch
from malformed import ERRORS, Target, calls
from malformed_targets import MODULES, NOT_CALLED, TARGETS

from bi_ops.core import runtime

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="written for tensors on the CPU")


def test_every_public_function_is_called():
    public = {
        f"{module.__name__.removeprefix('bi_ops.')}.{name}"
        for module in MODULES
        for name in module.__all__
        if callable(getattr(module, name)) and not isinstance(getattr(module, name), types.ModuleType)
    }
    covered = {name.partition(",")[0] for name in TARGETS}
    assert public - covered - set(NOT_CALLED) == set()
    assert (covered | set(NOT_CALLED)) - public == set()


def documented(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The errors that the docstring of a public name says it raises, or those of what it refers to."""
    module, _, function = name.partition(".")
    owner = importlib.import_module(f"bi_ops.{module}")
    text = inspect.getdoc(getattr(owner, function)) or ""
    if (forward := getattr(getattr(owner, function), "forward", None)) is not None:
        text += inspect.getdoc(forward) or ""
    said = re.search(r"(Raises|errors as|Arguments, errors)(.|\n)*", text)
    errors = set(re.findall(r"\w+Error", said[0])) if said else set()
    for other in re.findall(r"`([\w.]+)`", text):
        other = other.removeprefix("bi_ops.") if "." in other else f"{module}.{other}"
        if other in TARGETS and other not in seen:
            errors |= documented(other, seen | {name})
    return errors


def shapes(out) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in (out if isinstance(out, tuple) else (out,))]


def outcome(target: Target, argument: str, args, errors: set[str]) -> str:
    """ "raised" or "legal"; what was wrong otherwise. errors: those that are documented."""
    try:
        out = target.call(**args)
    except ERRORS as e:
        language = isinstance(e, TypeError) and "argument" in str(e)  # one left out, or one too many
        if argument in target.torchs or language:
            return "raised"
        if not target.names_itself(str(e)):
            return f"raised {type(e).__name__} without the name of the call: {e}"
        known = any(kind.__name__ in errors for kind in type(e).__mro__)
        return "raised" if known else f"raised {type(e).__name__}, documented are {sorted(errors)}: {e}"
    except Exception as e:
        return f"crashed: {type(e).__name__}: {e}"
    if target.reference is None:
        return "legal"
    try:
        expected = shapes(target.reference(**args))
    except Exception as e:
        return f"served {shapes(out)}, but torch: {type(e).__name__}: {e}"
    return "legal" if shapes(out) == expected else f"gave {shapes(out)}, not {expected}"


@pytest.mark.parametrize("name", TARGETS)
def test_a_malformed_call_raises_its_documented_error_or_is_legal(name):
    target, found, errors = TARGETS[name], {}, documented(name.partition(",")[0])
    for what, argument, args in calls(target):
        found[what] = outcome(target, argument, args, errors)
    wrong = [f"{what}: {result}" for what, result in found.items() if result not in ("raised", "legal")]
    assert not wrong, "\n".join(wrong)
    assert sum(result == "raised" for result in found.values()) >= len(found) * 0.4


def test_there_are_a_thousand():
    """Of which two fifths at least raise, by the test above."""
    assert sum(1 for target in TARGETS.values() for _ in calls(target)) * 0.4 >= 1000
