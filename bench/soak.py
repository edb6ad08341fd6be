"""Operators called from many threads, each on a stream of its own, and every result compared. Writes soak.json.

    python bench/soak.py --out bench/results/h200 --seconds 180 [--jobs 16] [--threads 4]

A process has a share of the operators. It computes each once, alone. Then its threads draw an operator, and what to
vary (the run, the size of the batch, the order of its items, or their neighbours), and compare bits with the first
result. Large GEMMs run beside on another stream, and memory is freed and taken all the time. Each process also calls an
operator with one bit flipped, which has to be found. Exit status 1 if a bit differed, 4 if a flipped one was not seen.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import provenance

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.verify import operators, packs, pool
from bi_ops.verify.contract import PROPERTIES, Setting, first_difference
from bi_ops.verify.controls import sabotaged
from bi_ops.verify.subject import Batch, Results, Subject, make_batch, results
from bi_ops.verify.suite import levels

VARIED = ("rerun", "batch size", "position", "neighbours")
Prepared = tuple[Subject, Batch, Results]


@dataclass(frozen=True)
class Share:
    """What a process soaks. until: of `time.time`, which all processes read alike."""

    specs: tuple[str, ...]
    threads: int
    seed: int
    until: float


@dataclass
class Soaked:
    """checks: calls with something varied, by operator. comparisons: pairs of results, which had to be equal. seconds:
    of soaking, after everything was compiled."""

    checks: Counter[str] = field(default_factory=Counter)
    comparisons: int = 0
    different: list[str] = field(default_factory=list)
    controls: int = 0
    controls_found: int = 0
    seconds: float = 0.0

    def add(self, other: Soaked) -> None:
        self.checks += other.checks
        self.comparisons += other.comparisons
        self.different += other.different
        self.controls += other.controls
        self.controls_found += other.controls_found
        self.seconds = min(self.seconds, other.seconds) if self.seconds else other.seconds


def prepare(spec: str) -> list[Prepared]:
    """A subject's batches in its first size, one in each dtype, with their results."""
    s, device, level = packs.find(spec), runtime.default_device(), levels()["quick"]
    lengths = level.lengths if s.sequences else (1,) * level.items
    batches = [make_batch(s, lengths, s.sizes[device.type][0], dtype, device) for dtype in s.dtypes]
    return [(s, batch, results(s, batch)) for batch in batches]


def check(prepared: Prepared, rng: random.Random) -> tuple[int, str]:
    """(pairs compared, the first difference) of one property, drawn, on a setting that is drawn too."""
    s, batch, base = prepared
    name = rng.choice(VARIED)
    at = Setting(runs=1, variants=1, sizes=(rng.randint(1, len(batch.lengths)),), seed=rng.randrange(1 << 30))
    count = 0
    for comparison in PROPERTIES[name](s, batch, base, at):
        count += len(comparison.expected)
        if difference := first_difference(comparison):
            return count, f"{s.name}, {name}: {difference}"
    return count, ""


def _soak(share: Share, prepared: list[Prepared], number: int, found: Soaked, lock: threading.Lock) -> None:
    rng = random.Random(share.seed * 1000 + number)
    stream = nullcontext() if runtime.INTERPRET else torch.cuda.stream(torch.cuda.Stream())
    with stream:
        while time.time() < share.until:
            one = rng.choice(prepared)
            try:
                count, difference = check(one, rng)
            except Exception as error:
                count, difference = 0, f"{one[0].name}: raised {type(error).__name__}: {str(error)[:200]}"
            if not count and not difference:
                continue  # what was drawn does not apply
            with lock:
                found.checks[one[0].name] += 1
                found.comparisons += count
                found.different += [difference] if difference else []
                if len(found.different) > 20:
                    return


def _load(share: Share) -> None:
    """GEMMs of some milliseconds beside the operators."""
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
        while time.time() < share.until:
            for _ in range(4):
                x = x @ x * 1e-4
            torch.cuda.current_stream().synchronize()
            time.sleep(0.01)


def _control(prepared: Prepared) -> bool:
    """Is one flipped bit found?"""
    s, batch, _ = prepared
    broken = sabotaged(s)
    (comparison,) = PROPERTIES["rerun"](broken, batch, results(broken, batch), Setting(runs=1))
    return first_difference(comparison) is not None


def soak(share: Share) -> Soaked:
    """One process."""
    # No cu_seqlens is given up by one thread while a kernel on another one's stream still reads it.
    operators.starts = functools.lru_cache(maxsize=None)(operators.starts.__wrapped__)
    prepared = [p for spec in share.specs for p in prepare(spec)]
    found, lock, start = Soaked(), threading.Lock(), time.monotonic()
    found.controls, found.controls_found = 1, int(_control(prepared[0]))
    if not runtime.INTERPRET:
        torch.cuda.synchronize()
    threads = [
        threading.Thread(target=_soak, args=(share, prepared, i, found, lock)) for i in range(max(share.threads, 1))
    ]
    if not runtime.INTERPRET:
        threads.append(threading.Thread(target=_load, args=(share,)))
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found.seconds = round(time.monotonic() - start, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that soak.json is written to")
    parser.add_argument("--seconds", type=float, default=120, help="in all, compiling included (%(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (one for each core, at most 16 for each GPU)")
    parser.add_argument("--threads", type=int, default=4, help="of a process (%(default)s; the interpreter has one)")
    parser.add_argument("--op", action="append", help="only this operator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    until = time.time() + args.seconds
    specs = [f"bi_ops:{name}" for name in args.op or packs.subjects("bi_ops")]
    jobs = min(args.jobs or pool.default_jobs(), len(specs))
    threads = 1 if runtime.INTERPRET else args.threads
    shares = [Share(tuple(specs[i::jobs]), threads, args.seed + i, until) for i in range(jobs)]
    found = Soaked()
    for share, outcome in pool.outcomes(soak, shares, jobs):
        if isinstance(outcome, Soaked):
            found.add(outcome)
        else:
            found.different.append(f"{', '.join(share.specs)}: {type(outcome).__name__}: {outcome}")
    data: dict[str, Any] = {**provenance(args.commit), "seconds": found.seconds, "processes": jobs, "threads": threads}
    data |= {"checks": sum(found.checks.values()), "comparisons": found.comparisons, "different": len(found.different)}
    data |= {"controls": found.controls, "controls_found": found.controls_found, "first": found.different[:10]}
    write_json(args.out / "soak.json", {**data, "checks_of": dict(sorted(found.checks.items()))})
    print(data)
    return 4 if found.controls_found < found.controls else 1 if found.different or not found.checks else 0


if __name__ == "__main__":
    sys.exit(main())
