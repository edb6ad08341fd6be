"""One step under torch.profiler: what its time goes to on the GPU and on the host, as text, and as a chrome trace."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bi_ops.core.files import write_atomically

#: Categories of a trace: what a GPU does, what launches it, a function of Python.
ON_GPU, LAUNCHES, PYTHON = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver"), "python_function"
#: Rows of a table; letters of a name.
ROWS, WIDTH = 30, 90


class Span(NamedTuple):
    """Something that ran, times in microseconds. place: a GPU's stream, or a thread. launched: when, if known."""

    name: str
    place: int
    start: float
    end: float
    launched: float | None = None


@dataclass(frozen=True)
class Gap:
    """A time in which a stream had nothing, before the kernel `after`.

    late: how long of it that kernel was not launched yet, so that the GPU waited for the host; the rest it waited for
    another stream. others: what other streams had meanwhile, the longest first.
    """

    start: float
    end: float
    before: str
    after: str
    late: float
    others: tuple[str, ...]


def spans_of(events: Iterable[Mapping[str, Any]]) -> tuple[list[Span], list[Span]]:
    """What ran on the GPU, and which functions of Python ran, by their starts; events: of a chrome trace."""
    events = [e for e in events if e.get("ph") == "X"]
    launched = {
        e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES and "correlation" in e["args"]
    }
    gpu, host = [], []
    for e in events:
        span = Span(e["name"], e["tid"], float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        if e.get("cat") in ON_GPU:
            args = e["args"]
            gpu.append(
                span._replace(place=args.get("stream", span.place), launched=launched.get(args.get("correlation")))
            )
        elif e.get("cat") == PYTHON:
            host.append(span)
    return sorted(gpu, key=lambda s: s.start), sorted(host, key=lambda s: (s.start, -s.end))


def busy(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one of them runs; by their starts."""
    total, until = 0.0, float("-inf")
    for s in spans:
        total += max(s.end - max(s.start, until), 0.0)
        until = max(until, s.end)
    return total


def compute_stream(spans: Sequence[Span]) -> int:
    """The stream that has most to do, collectives left out."""
    times: dict[int, float] = defaultdict(float)
    for s in spans:
        times[s.place] += 0.0 if "nccl" in s.name.lower() else s.end - s.start
    return max(times, key=lambda stream: times[stream])


def gaps(spans: Sequence[Span], stream: int) -> list[Gap]:
    """All times between the kernels of a stream in which it has nothing; spans: of all streams, by their starts."""
    found = []
    last: Span | None = None
    for s in spans:
        if s.place != stream:
            continue
        if last is not None and s.start > last.end:
            late = 0.0 if s.launched is None else min(max(s.launched - last.end, 0.0), s.start - last.end)
            found.append(
                Gap(last.end, s.start, last.name, s.name, late, tuple(_meanwhile(spans, stream, last.end, s.start)))
            )
        if last is None or s.end > last.end:
            last = s
    return found


def _meanwhile(spans: Sequence[Span], stream: int, start: float, end: float) -> Iterator[str]:
    """Names of what other streams ran between two times, the longest first."""
    shares: dict[str, float] = defaultdict(float)
    for s in spans:
        if s.start >= end:
            break
        if s.place != stream and s.end > start:
            shares[s.name] += min(s.end, end) - max(s.start, start)
    yield from sorted(shares, key=lambda name: -shares[name])


def self_times(spans: Sequence[Span]) -> dict[str, tuple[float, int]]:
    """(microseconds without what it called, calls) of each function; spans: by their starts, the longer first."""
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    open_ones: dict[int, list[Span]] = defaultdict(list)
    for s in spans:
        stack = open_ones[s.place]
        while stack and stack[-1].end <= s.start:
            stack.pop()
        if stack:
            time_us, calls = found[stack[-1].name]
            found[stack[-1].name] = time_us - (s.end - s.start), calls
        time_us, calls = found[s.name]
        found[s.name] = time_us + s.end - s.start, calls + 1
        stack.append(s)
    return dict(found)


def _short(name: str) -> str:
    """A kernel's name without its template's arguments, a function's without its folders."""
    name = re.sub(r"^.*?(site-packages|dist-packages)/", "", name.removeprefix("void "))
    return name[:WIDTH]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in lines)]) for i, c in enumerate(columns)]
    text = ["  ".join(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)) + f"  {line[-1]}" for line in lines]
    head = "  ".join(c.rjust(w) for c, w in zip(columns[:-1], widths, strict=False)) + f"  {columns[-1]}"
    return "\n".join([f"# {title}", head, *text, ""])


def _by_name(spans: Iterable[Span]) -> list[tuple[float, int, str]]:
    """(ms, calls, name) of what ran, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for s in spans:
        found[s.name].append(s.end - s.start)
    return sorted(((sum(t) / 1e3, len(t), _short(name)) for name, t in found.items()), reverse=True)


def gpu_report(spans: Sequence[Span]) -> str:
    """Kernels by time; of each stream how long it is busy; and what the compute stream waits for. spans: of a GPU."""
    if not spans:
        return "# No GPU was watched.\n"
    start, end = spans[0].start, max(s.end for s in spans)
    own = compute_stream(spans)
    streams = []
    for stream in sorted({s.place for s in spans}):
        some = [s for s in spans if s.place == stream]
        busy_ms = busy(some) / 1e3
        role = "compute" if stream == own else _by_name(some)[0][2]
        streams.append((stream, len(some), busy_ms, (end - start) / 1e3 - busy_ms, role))
    found = sorted(gaps(spans, own), key=lambda g: g.start - g.end)
    total, late = sum(g.end - g.start for g in found) / 1e3, sum(g.late for g in found) / 1e3
    rows = [
        (
            (g.start - start) / 1e3,
            (g.end - g.start) / 1e3,
            g.late / 1e3,
            f"{_short(g.before)} -> {_short(g.after)}; meanwhile {', '.join(map(_short, g.others[:2])) or 'nothing'}",
        )
        for g in found[:ROWS]
    ]
    return "\n".join(
        [
            _table("Kernels and copies by time", ("ms", "calls", "name"), _by_name(spans)[:ROWS]),
            _table("Streams", ("stream", "calls", "busy ms", "idle ms", "what"), streams),
            f"# Between its kernels the compute stream waits {total:.3f} ms, {late:.3f} of them for the host.\n",
            _table("Its longest gaps", ("at ms", "ms", "for the host", "before -> after"), rows),
        ]
    )


def _traced(step: Callable[[], object], path: Path, with_stack: bool) -> tuple[Any, float, list[dict[str, Any]]]:
    """(the profiler, milliseconds, the events of the trace that is then in `path`) of one step."""
    is_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities, with_stack=with_stack) as profiler:
        began = time.perf_counter()
        step()
        if is_gpu:
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - began)
    profiler.export_chrome_trace(str(path))
    return profiler, ms, json.loads(path.read_text(errors="replace"))["traceEvents"]


def profiled(step: Callable[[], object], base: Path, watches: bool = True) -> None:
    """Run two steps; write BASE.txt, and BASE.json.gz, a chrome trace of the first one.

    In the second functions of Python are watched, which makes it slow: what it says is which functions take the host's
    time. watches: False of a rank that only takes part.
    """
    if not watches:
        step()
        step()
        return
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler, ms, events = _traced(step, trace, with_stack=False)
        spans, _ = spans_of(events)

        def pack(partial: Path) -> None:
            with gzip.open(partial, "wb") as file:
                file.write(trace.read_bytes())

        write_atomically(base.with_name(base.name + ".json.gz"), pack)
        _, slow_ms, events = _traced(step, trace, with_stack=True)
    times = self_times(spans_of(events)[1])
    functions = sorted(((us / 1e3, calls, _short(name)) for name, (us, calls) in times.items()), reverse=True)
    averages = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    operators = [(e.self_cpu_time_total / 1e3, e.count, _short(e.key)) for e in averages[:ROWS]]
    columns = ("self ms", "calls", "name")
    text = "\n".join(
        [
            f"# A step of {ms:.3f} ms under the profiler, {slow_ms:.3f} where functions of Python are watched.\n",
            gpu_report(spans),
            _table("Operators on the host by self time", columns, operators),
            _table("Functions of Python by self time, of the slow step", columns, functions[:ROWS]),
        ]
    )
    write_atomically(base.with_name(base.name + ".txt"), lambda partial: partial.write_text(text))
