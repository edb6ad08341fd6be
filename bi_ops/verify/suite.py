"""Runs properties over subjects: which batches, at which level, in how many processes, and what comes of it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bi_ops.core import runtime
from bi_ops.verify import golden, packs, pool, sweep
from bi_ops.verify.contract import PROPERTIES, SWEPT, Setting, first_difference, not_here, shows_something
from bi_ops.verify.controls import Control, controls, sabotaged
from bi_ops.verify.subject import Batch, Results, Subject, make_batch, results


@dataclass(frozen=True)
class Level:
    """How much is run. items: rows of a batch. lengths: of a batch of sequences. everything: every dtype, size and
    negative control of each subject, else the first of each. examples: batches that hypothesis draws for a subject and
    dtype."""

    items: int
    lengths: tuple[int, ...]
    setting: Setting
    everything: bool = False
    examples: int = 0


def levels() -> dict[str, Level]:
    """The levels on this machine: a GPU takes larger batches."""
    if runtime.INTERPRET:
        few = Setting(runs=1, variants=1, sizes=(17, 1, 2))
        return {
            "quick": Level(18, (5, 1, 9), few),
            "full": Level(37, (5, 1, 19, 33, 8), Setting(sizes=(1, 2, 16, 17)), True, 3),
        }
    more = (1, 2, 3, 4, 5, 8, 16, 17, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
    return {
        "quick": Level(300, (1, 70, 257, 5, 130), Setting(sizes=(1, 2, 17, 255, 256, 257))),
        "full": Level(
            *(600, (1, 70, 257, 5, 1024, 16, 130, 2, 64, 33)),
            Setting(runs=20, sizes=more, compiler="inductor"),
            everything=True,
            examples=20,
        ),
    }


@dataclass(frozen=True)
class Check:
    """One property of one subject on batches of one dtype, size and kind of values.

    comparisons: how many pairs of results had to be equal. message: what was wrong; empty if nothing was.
    """

    subject: str
    property: str
    dtype: str
    size: tuple[int, int]
    values: str
    comparisons: int
    message: str
    seconds: float

    def ok(self) -> bool:
        return not self.message


@dataclass(frozen=True)
class ControlResult:
    """Whether what was broken on purpose was found. message: of a control that could not run."""

    property: str
    subject: str
    caught: bool
    message: str = ""


@dataclass(frozen=True)
class Unit:
    """What one process does at a time. spec: of a subject (`packs.find`), or "controls". properties: none where only
    digests are made."""

    spec: str
    dtype: str
    level: str
    properties: tuple[str, ...]
    size: tuple[int, int] = (0, 0)
    digests: bool = False

    def __str__(self) -> str:
        return f"{self.spec} {self.dtype} {self.size[0] or ''}".strip()


@dataclass
class Report:
    """All that a run found. not_run: properties that need another machine, and work there was no time for, with why.
    digests: by operator, dtype, size and result. undigested: what raised instead."""

    level: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    controls: list[ControlResult] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    undigested: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        self.checks += other.checks
        self.controls += other.controls
        self.digests |= other.digests
        self.undigested += other.undigested

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if not c.ok()]

    @property
    def missed(self) -> list[ControlResult]:
        """Negative controls that passed: the suite is broken."""
        return [c for c in self.controls if not c.caught]


#: An error of this process's GPU, after which every call of CUDA fails: nothing that it would find is true.
_lost: list[BaseException] = []


def _raised(error: BaseException) -> str:
    """What a check says of it. An error that has cost this process its GPU is kept in `_lost`."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())) and not isinstance(error, torch.OutOfMemoryError):
        _lost.append(error)
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compared(s: Subject, name: str, batch: Batch, base: Results, at: Setting) -> tuple[int, str]:
    """(pairs compared, what was wrong) of one property."""
    count = 0
    try:
        for comparison in PROPERTIES[name](s, batch, base, at):
            if not comparison.expected:
                return count, f"{comparison.what}: nothing to compare"
            count += len(comparison.expected)
            if difference := first_difference(comparison):
                return count, str(difference)
    except Exception as error:  # an operator that raises is a finding, of this property alone
        return count, _raised(error)
    return count, ""


def _timed(s: Subject, name: str, batch: Batch, base: Results, at: Setting, dtype: torch.dtype, size, values) -> Check:
    start = time.perf_counter()
    count, message = _compared(s, name, batch, base, at)
    short = str(dtype).removeprefix("torch.")
    return Check(s.name, name, short, size, values, count, message, round(time.perf_counter() - start, 4))


def _lengths(s: Subject, level: Level) -> tuple[int, ...]:
    return level.lengths if s.sequences else (1,) * level.items


def verify_subject(s: Subject, dtype: torch.dtype, level: Level, properties: Sequence[str]) -> Report:
    """Every property of one subject in one dtype, and its negative controls."""
    report, device = Report(""), runtime.default_device()
    sizes = s.sizes[device.type]
    for size in sizes if level.everything else sizes[:1]:
        _at_size(s, dtype, level, properties, size, device, report)
    return report


def _at_size(
    s: Subject,
    dtype: torch.dtype,
    level: Level,
    properties: Sequence[str],
    size: tuple[int, int],
    device: torch.device,
    report: Report,
) -> None:
    lengths = _lengths(s, level)
    first = next(iter(properties), "")
    try:
        batch = make_batch(s, lengths, size, dtype, device)
        base = results(s, batch)
    except Exception as error:
        short = str(dtype).removeprefix("torch.")
        report.checks.append(Check(s.name, first, short, size, "normal", 0, _raised(error), 0.0))
        return
    if not shows_something(base):
        message = "the results are empty, of one value, or no finite numbers, so equal bits show nothing"
        report.checks.append(Check(s.name, first, str(dtype).removeprefix("torch."), size, "normal", 0, message, 0.0))
        return
    applying = []
    for name in properties:
        check = _timed(s, name, batch, base, level.setting, dtype, size, "normal")
        if check.comparisons or not check.ok():
            report.checks.append(check)
            applying.append(name)
        if _lost:
            return
    if "batch size" in applying or "rerun" in applying:
        hard = make_batch(s, lengths, size, dtype, device, kind="assorted")
        hard_base = results(s, hard)
        for name in ("batch size", "rerun")[: 2 if level.everything else 1]:
            if name in applying:
                setting = dataclasses.replace(level.setting, sizes=level.setting.sizes[:2])
                report.checks.append(_timed(s, name, hard, hard_base, setting, dtype, size, "assorted"))
    if level.examples:
        swept = [n for n in applying if n in SWEPT]
        for name, count, message, seconds in sweep.run(s, dtype, size, swept, level, device):
            short = str(dtype).removeprefix("torch.")
            report.checks.append(Check(s.name, name, short, size, "drawn", count, message, seconds))
    # The operator itself, broken by one bit: each property that was checked has to find it. At the quick level, one.
    sizes = tuple(m for m in level.setting.sizes if m < len(lengths))[:1]
    small = dataclasses.replace(level.setting, runs=1, variants=1, sizes=sizes)
    for name in applying if level.everything else applying[len(s.name) % max(len(applying), 1) :][:1]:
        if any(c.property == name and not c.ok() for c in report.checks):
            continue  # an operator that fails this property needs no control of it
        report.controls.append(_one_bit(s, name, batch, small))


def _one_bit(s: Subject, name: str, batch: Batch, at: Setting) -> ControlResult:
    broken = sabotaged(s)
    try:
        base = results(broken, batch)
        found = [first_difference(c) is not None for c in PROPERTIES[name](broken, batch, base, at)]
    except Exception as error:
        return ControlResult(name, f"{s.name}, one bit flipped", False, f"raised {type(error).__name__}: {error}"[:300])
    return ControlResult(name, f"{s.name}, one bit flipped", bool(found) and all(found))


def run_control(control: Control) -> ControlResult:
    """Whether the property finds what the control breaks."""
    s, device = control.subject, runtime.default_device()
    batch = make_batch(s, (1,) * 37, s.sizes[device.type][0], s.dtypes[0], device)
    _, message = _compared(s, control.property, batch, results(s, batch), Setting())
    raised = message.startswith("raised")
    return ControlResult(control.property, s.name, bool(message) and not raised, message if raised else "")


def run_unit(unit: Unit) -> Report:
    """The checks of one unit, in this process; if an earlier unit cost it the GPU it ends, and another goes on."""
    if _lost and multiprocessing.parent_process() is None:
        raise _lost[0]
    if _lost:
        os._exit(1)
    level, report = levels()[unit.level], Report("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the values that are meant to overflow
        if unit.spec == "controls":
            return Report("", controls=[run_control(c) for c in controls() if c.property in unit.properties])
        subject, dtype = packs.find(unit.spec), getattr(torch, unit.dtype)
        if unit.properties:
            _at_size(subject, dtype, level, unit.properties, unit.size, runtime.default_device(), report)
        if unit.digests and not _lost:
            try:
                report.digests = golden.digests_of(subject, dtype, unit.size)
            except Exception as error:
                report.undigested.append(f"no digests of {unit}: {_raised(error)}")
    return report


#: Subjects whose kernels take longest to compile come first, or the others would wait for them at the end.
LONGEST_FIRST = ("flash", "Flash", "masked", "scaled_dot", "linear", "addmm", "mm", "matmul", "bmm", "rms", "add_rms")


def _place(unit: Unit) -> tuple[bool, int, int]:
    name = unit.spec.partition(":")[2]
    place = next((i for i, start in enumerate(LONGEST_FIRST) if name.startswith(start)), len(LONGEST_FIRST))
    return not unit.properties, place, -unit.size[0]


def units(specs: Sequence[str], level: str, properties: Sequence[str], digests: str = "") -> list[Unit]:
    """The work: each subject in each dtype and size, the longest first, and the negative controls."""
    everything, chosen = levels()[level].everything, tuple(p for p in properties if not not_here(p))
    found = [Unit("controls", "", level, chosen)]
    for spec in specs:
        subject = packs.find(spec)
        every = [(d, size) for d in subject.dtypes for size in subject.sizes[runtime.device_type()]]
        for i, (dtype, size) in enumerate(every):
            here = chosen if everything or i == 0 else ()
            if here or digests == "all":
                found.append(Unit(spec, str(dtype).removeprefix("torch."), level, here, size, bool(digests)))
    return sorted(found, key=_place)


def verify(
    specs: Sequence[str],
    level: str = "quick",
    properties: Sequence[str] = tuple(PROPERTIES),
    jobs: int | None = None,
    progress: Callable[[str, int, int, Report], None] = lambda *_: None,
    *,
    digests: str = "",
    seconds: float | None = None,
) -> Report:
    """Verify subjects, with negative controls.

    Args:
        specs: which (`packs.find`). level: "quick" or "full". properties: names in `contract.PROPERTIES`. jobs:
            processes; None: `pool.default_jobs`. progress: called with (what is done, units done, units, the report so
            far). digests: make those of "all" dtypes and sizes, of the "checked" ones, or none. seconds: nothing is
            begun after so many.

    Raises:
        ValueError: an unknown level, property or subject; at the full level, hypothesis is missing.
    """
    if level not in levels():
        raise ValueError(f"verify: unknown level {level!r}; levels are {', '.join(levels())}")
    if unknown := set(properties) - set(PROPERTIES):
        raise ValueError(f"verify: unknown properties {sorted(unknown)}; properties are {', '.join(PROPERTIES)}")
    if levels()[level].examples:
        sweep.require()
    start, work = time.monotonic(), units(specs, level, properties, digests)
    report = Report(level, not_run={p: why for p in properties if (why := not_here(p))})
    until = None if seconds is None else start + seconds
    results_of = pool.outcomes(run_unit, work, jobs or pool.default_jobs(), until)
    for done, (unit, found) in enumerate(results_of, 1):
        if isinstance(found, Report):
            report.add(found)
        elif found is None:
            report.not_run[str(unit)] = f"not begun within {seconds:.0f} s"
        else:  # its process died, of a signal for instance
            which = (unit.spec.partition(":")[2] or unit.spec, next(iter(unit.properties), "rerun"), unit.dtype)
            report.checks.append(Check(*which, unit.size, "normal", 0, _raised(found), 0.0))
        report.seconds = round(time.monotonic() - start, 2)
        progress(str(unit), done, len(work), report)
    report.checks.sort(key=lambda c: (c.subject, list(PROPERTIES).index(c.property), c.dtype, c.size, c.values))
    report.controls.sort(key=lambda c: (list(PROPERTIES).index(c.property), c.subject))
    return report
