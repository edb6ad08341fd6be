"""The first minute: import, load, warm-up and first step, from empty caches and from warm ones. Writes start.csv.

    python bench/start.py --out bench/results/h100 [--models 0.6B 1.7B] [--sides bi_ops "torch, compiled"] [--binding]
        [--jobs 8] [--seconds 120] [--dry]

Each row is a process of its own: import; the model made on the GPU with random weights; for bi_ops `model.warmup()`, as
training calls it: kernels compiled in parallel, GEMMs verified if the cuBLASLt binding is there; a first step of 8,192
tokens, and a second one. `after_load_s` is from the loaded weights to the end of the first step. Of the warm-up and of
the first step: `jobs`, the threads that compile; the CPU seconds of this process's threads; how many kernels Triton
compiled, and how many it loaded onto the GPU, found ones too; which one took longest to compile, beside the others, and
in which stages.

The caches of Triton, inductor, CUDA and bi_ops are folders of this benchmark, empty for a side's first row. `--binding`
builds the binding between the two rows, as `bi-ops warmup` would, and states its seconds in the second. Rows are
written as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Kernels:
    """What Triton compiles and loads in this process from now on, by its own hooks."""

    def __init__(self) -> None:
        from triton import knobs

        self._compiled: list[tuple[float, str, str]] = []
        self._loaded: list[str] = []
        self._cpu = time.process_time()
        knobs.compilation.listener = self._note
        knobs.runtime.kernel_load_end_hook.add(lambda module, function, name, *_: self._loaded.append(name))

    def _note(self, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if not cache_hit:
            stages = [("trace", times.ir_initialization), *times.lowering_stages]
            each = ", ".join(f"{stage} {seconds / 1e6:.1f}" for stage, seconds in stages)
            self._compiled.append((times.total / 1e6, src.name, each))

    def since(self, what: str) -> dict[str, object]:
        """Columns of what was done since the last call."""
        seconds, name, stages = max(self._compiled, default=(0.0, "", ""))
        cpu = time.process_time()
        found = {
            f"{what}_cpu_s": round(cpu - self._cpu, 3),
            f"{what}_compiled": len(self._compiled),
            f"{what}_loaded": len(self._loaded),
            f"{what}_longest_s": round(seconds, 3),
            f"{what}_longest": f"{name}: {stages}" if name else "",
        }
        self._compiled.clear()
        self._loaded.clear()
        self._cpu = cpu
        return found


def measure(model: str, side: str, dry: bool, bind: bool, jobs: int | None) -> dict[str, object]:
    start = time.perf_counter()
    import bi_ops  # noqa: F401

    if side != "bi_ops":
        import transformers  # noqa: F401

    imported = time.perf_counter()
    import torch
    from step_sides import made_network, ours, shape, theirs

    from bi_ops.core import runtime
    from bi_ops.matmul import cublaslt
    from bi_ops.models.warmup import default_jobs, warmup_step

    ids = torch.randint(shape(model)["vocab_size"], (2, 16) if dry else (4, 2048))
    bound = time.perf_counter()
    if bind:
        cublaslt.extension()
    loading = time.perf_counter()
    if side == "bi_ops":
        network = made_network(model, None, "selective")
        made = ours(model, list(ids), None, "selective", verify=False, network=network)
    else:
        made = theirs(model, list(ids.to(runtime.default_device())), None, side)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    kernels = Kernels()
    loaded = time.perf_counter()
    if side == "bi_ops":
        warmup_step(network, jobs, build=False)
    warm = time.perf_counter()
    of_warmup = kernels.since("warmup")
    of_steps, seconds = [], []
    for _ in range(2):
        made.before()
        made.forward().backward()
        made.after()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter())
        of_steps.append(kernels.since("first_step"))
    times = {
        "import_s": imported - start,
        "build_s": loading - bound if bind else 0.0,
        "load_s": loaded - loading,
        "warmup_s": warm - loaded,
        "first_step_s": seconds[0] - warm,
        "second_step_s": seconds[1] - seconds[0],
        "after_load_s": seconds[0] - loaded,
    }
    gemm = "cublas" if side != "bi_ops" else "triton" if cublaslt.loaded() is None else "cublaslt"
    threads = {"jobs": jobs or default_jobs() if side == "bi_ops" else ""}
    return {name: round(value, 3) for name, value in times.items()} | {"gemm": gemm} | threads | of_warmup | of_steps[0]


def run(command: list[str], caches: dict[str, str], left: float) -> dict[str, object] | str:
    """What a process measured, or why it did not."""
    try:
        timeout = None if math.isinf(left) else max(left, 1)
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "cut off, out of time"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that start.csv is written to")
    parser.add_argument("--models", nargs="+", default=["0.6B", "1.7B"])
    parser.add_argument("--sides", nargs="+", default=["bi_ops"], help="bi_ops, and transformers' as bench/step.py")
    parser.add_argument("--binding", action="store_true", help="build the cuBLASLt binding before the warm row")
    parser.add_argument("--jobs", type=int, help="threads that compile (one per core, 8 at most)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so long, and end the last")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SIDE", "BIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        model, side, bind = args.one
        print(json.dumps(measure(model, side, args.dry, bind == "bind", args.jobs)))
        return 0
    from record import provenance, write_csv  # here, so that a measured process does not import torch before

    rows: list[dict[str, Any]] = []
    record, end, failed = provenance(args.commit), time.monotonic() + args.seconds, False
    args.out.mkdir(parents=True, exist_ok=True)
    for model in ["dry"] if args.dry else args.models:
        for side in args.sides:
            with tempfile.TemporaryDirectory() as folder:
                names = ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
                caches = {name: f"{folder}/{name.lower()}" for name in names}
                built = ["binding built"] if args.binding and side == "bi_ops" else []
                for state in ("empty", *built, "warm"):
                    left, bind = end - time.monotonic(), "bind" if state == "binding built" else "no"
                    command = [sys.executable, __file__, "--out", str(args.out), "--one", model, side, bind]
                    command += ["--dry"] if args.dry else []
                    command += ["--jobs", str(args.jobs)] if args.jobs else []
                    found = run(command, caches, left) if left > 0 else "left out, out of time"
                    if isinstance(found, str):
                        failed = True
                        print(f"{model} {side}, caches {state}: {found}", file=sys.stderr, flush=True)
                        continue
                    rows.append({"model": model, "side": side, "caches": state, **found} | record)
                    write_csv(args.out / "start.csv", rows)
                    print({k: v for k, v in rows[-1].items() if k not in record}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
