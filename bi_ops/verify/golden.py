"""Digests of every operator's bits, from inputs that integer arithmetic makes, so that machines can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bi_ops.core import runtime
from bi_ops.core.provenance import device_name, now, versions
from bi_ops.verify.integers import fingerprint, mixed, wide
from bi_ops.verify.subject import Batch, Subject, results
from bi_ops.verify.values import Make, Shape

Tensor = torch.Tensor

#: Tables by architecture, of the releases that bits were recorded with.
FOLDER = Path(__file__).parent / "golden"

#: Packages whose release decides bits.
DECIDING = ("torch", "triton")


class IntegerMake(Make):
    """Inputs that are the same on every machine: torch's normal numbers depend on the CPU's vector instructions."""

    made = 0

    def randn(self, *size: int) -> Tensor:
        self.made += 1
        return wide(*size, seed=self.made, device=self.device).to(self.dtype)

    def ints(self, high: int, *size: int) -> Tensor:
        self.made += 1
        return (mixed(torch.Size(size).numel(), self.made, self.device) % high).view(size)


def digests_of(s: Subject, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, str]:
    """Digests of the outputs and gradients of a subject, by its name, dtype and size, and the result's."""
    device = runtime.default_device()
    few = (5, 1, 9) if runtime.INTERPRET else (1, 70, 257, 5, 130)
    lengths = few if s.sequences else (1,) * (18 if runtime.INTERPRET else 300)
    make = IntegerMake(Shape((sum(lengths),), *size), dtype, device, lengths=lengths)
    batch = Batch(dict(s.inputs(make)), lengths, torch.arange(sum(lengths)), sum(lengths))
    where = f"{s.name} {str(dtype).removeprefix('torch.')} {size[0]}"
    return {f"{where}: {name}": fingerprint(r.tensor) for name, r in results(replace(s, decode=None), batch).items()}


def record(digests: Mapping[str, str]) -> dict[str, Any]:
    """Digests, with where they were made."""
    where = {"architecture": runtime.architecture(), "device": device_name(), "versions": versions(), "date": now()}
    return {**where, "digests": dict(sorted(digests.items()))}


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs, a line each: the architecture, deciding versions, and digests that both have.

    Raises:
        ValueError: `other` is no such record, or the two have no digest in common.
    """
    try:
        theirs, release = dict(other["digests"]), dict(other["versions"])
        found = (
            []
            if mine["architecture"] == other["architecture"]
            else [f"architecture {mine['architecture']} and {other['architecture']}"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"verify: not a record of digests ({type(error).__name__}: {error})") from error
    own = mine["digests"]
    if not own.keys() & theirs.keys():
        raise ValueError("verify: the records have no digest in common, so nothing was compared")
    found += [
        f"{p} {mine['versions'].get(p)} and {release.get(p)}"
        for p in DECIDING
        if mine["versions"].get(p) != release.get(p)
    ]
    return found + [
        f"bits of {n}: {own[n]} and {theirs[n]}" for n in sorted(own.keys() & theirs.keys()) if own[n] != theirs[n]
    ]


def read(file: str | Path) -> dict[str, Any]:
    """A record from a file.

    Raises:
        ValueError: it holds none. OSError: it cannot be read.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"verify: {file} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("digests"), dict):
        raise ValueError(f"verify: {file} holds no record of digests; bi-ops verify --record writes one")
    return found


def path(folder: Path = FOLDER) -> Path:
    """Where the table of this architecture and these releases belongs: ``<architecture>-<torch>-<triton>.json``."""
    here = versions()
    release = [str(here.get(p)).split("+")[0] for p in DECIDING]
    return folder / f"{'-'.join([runtime.architecture(), *release])}.json"


def committed(folder: Path = FOLDER) -> Path | None:
    """The table of this architecture and these releases, if bi_ops carries one."""
    found = path(folder)
    return found if found.exists() else None
