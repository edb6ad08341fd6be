"""Runs properties over subjects: which batches, at which level, in how many processes, and what comes of it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from bi_ops.core import runtime
from bi_ops.verify import packs, sweep
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
    """What one process does at a time. spec: of a subject (`packs.find`), or "controls"."""

    spec: str
    dtype: str
    level: str
    properties: tuple[str, ...]


@dataclass
class Report:
    """All that a run found."""

    level: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    controls: list[ControlResult] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, other: Report) -> None:
        self.checks += other.checks
        self.controls += other.controls

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if not c.ok()]

    @property
    def missed(self) -> list[ControlResult]:
        """Negative controls that passed: the suite is broken."""
        return [c for c in self.controls if not c.caught]


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
        return count, f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
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
        message = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        report.checks.append(Check(s.name, first, str(dtype).removeprefix("torch."), size, "normal", 0, message, 0.0))
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
    """The checks of one unit, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the values that are meant to overflow
        if unit.spec == "controls":
            wanted = [c for c in controls() if c.property in unit.properties]
            return Report("", controls=[run_control(c) for c in wanted])
        return verify_subject(packs.find(unit.spec), getattr(torch, unit.dtype), levels()[unit.level], unit.properties)


def _worker() -> None:
    torch.set_num_threads(1)


def units(specs: Sequence[str], level: str, properties: Sequence[str]) -> list[Unit]:
    """The work: each subject in each dtype, the long ones first, and the negative controls."""
    everything, chosen = levels()[level].everything, tuple(p for p in properties if not not_here(p))
    found = [Unit("controls", "", level, chosen)]
    for spec in specs:
        subject = packs.find(spec)
        for dtype in subject.dtypes if everything else subject.dtypes[:1]:
            found.append(Unit(spec, str(dtype).removeprefix("torch."), level, chosen))
    return sorted(found, key=lambda u: not u.spec.partition(":")[2].startswith(("flash", "masked")))


def _outcomes(work: Sequence[Unit], jobs: int) -> Iterator[tuple[Unit, Report]]:
    if jobs == 1:
        yield from ((unit, run_unit(unit)) for unit in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), context, initializer=_worker) as pool:
        futures = {pool.submit(run_unit, unit): unit for unit in work}
        for future in as_completed(futures):
            yield futures[future], future.result()


def verify(
    specs: Sequence[str],
    level: str = "quick",
    properties: Sequence[str] = tuple(PROPERTIES),
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Verify subjects, with negative controls.

    Args:
        specs: which (`packs.find`). level: "quick" or "full". properties: names in `contract.PROPERTIES`. jobs:
            processes; None: one for each core, at most 14. progress: called with (what is done, units done, units).

    Raises:
        ValueError: an unknown level, property or subject; at the full level, hypothesis is missing.
    """
    if level not in levels():
        raise ValueError(f"verify: unknown level {level!r}; levels are {', '.join(levels())}")
    if unknown := set(properties) - set(PROPERTIES):
        raise ValueError(f"verify: unknown properties {sorted(unknown)}; properties are {', '.join(PROPERTIES)}")
    if levels()[level].examples:
        sweep.require()
    start, work = time.perf_counter(), units(specs, level, properties)
    report = Report(level, not_run={p: why for p in properties if (why := not_here(p))})
    jobs = min(os.cpu_count() or 1, 14) if jobs is None else jobs
    for done, (unit, found) in enumerate(_outcomes(work, jobs), 1):
        report.add(found)
        progress(f"{unit.spec} {unit.dtype}".strip(), done, len(work))
    report.checks.sort(key=lambda c: (c.subject, list(PROPERTIES).index(c.property), c.dtype, c.size, c.values))
    report.controls.sort(key=lambda c: (list(PROPERTIES).index(c.property), c.subject))
    report.seconds = round(time.perf_counter() - start, 2)
    return report
