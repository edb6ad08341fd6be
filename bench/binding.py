"""The cuBLASLt binding: seconds until it is there, which library serves, and the host's time of `linear` through it.

    python bench/binding.py --out bench/results/h200 [--dry]

Three processes, the cache folder empty before the first: one imports and compiles the library unless an installed one
fits, one finds what is there, one times `linear` against F.linear where the GPU has nothing to do: the forward without
a gradient and with one, and forward and backward together. Writes binding.csv, a row a process and binding_host.csv, a
row a call.
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
from collections.abc import Callable, Iterator
from pathlib import Path


def start(dry: bool) -> dict[str, object]:
    begun = time.perf_counter()
    import torch

    torch_there = time.perf_counter()
    import bi_ops  # noqa: F401

    imported = time.perf_counter()
    from bi_ops.matmul import cublaslt

    before = cublaslt.availability().reason
    asked = time.perf_counter()
    if not dry:
        cublaslt.extension()
    there = time.perf_counter()
    return {
        "import_torch_s": round(torch_there - begun, 3),
        "import_bi_ops_s": round(imported - torch_there, 3),
        "before": before,
        "extension_s": round(there - asked, 3),
        "library": cublaslt.availability().reason,
        "torch": torch.__version__,
    }


def host() -> Iterator[dict[str, object]]:
    import bi_ops  # isort: skip  (before triton)
    import torch

    from bi_ops.core import runtime

    device = runtime.default_device()
    x, weight, g = (torch.randn(s, device=device).bfloat16() for s in ((1, 256), (256, 256), (1, 256)))
    calls = {"F.linear": torch.nn.functional.linear, "bi_ops.matmul.linear": bi_ops.matmul.linear}
    for what in ("forward", "forward, with a gradient", "forward and backward"):
        for t in (x, weight):
            t.requires_grad_(what != "forward")

        def both(call: Callable[..., torch.Tensor]) -> None:
            call(x, weight).backward(g)
            x.grad = weight.grad = None

        for name, call in calls.items():
            run = (lambda call=call: both(call)) if "backward" in what else (lambda call=call: call(x, weight))
            run()
            bi_ops.warmup()
            yield {"call": name, "what": what, "host_us": round(least(run, 1 if device.type == "cpu" else 300), 2)}


def least(run: Callable[[], object], calls: int) -> float:
    """Microseconds of the host per call, the least of nine rounds."""
    import torch

    best = math.inf
    for _ in range(9):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - begun) / calls * 1e6)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the results are written to")
    parser.add_argument("--dry", action="store_true", help="without a GPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", choices=("start", "host"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        for row in [start(args.dry)] if args.one == "start" else host():
            print(json.dumps(row), flush=True)
        return 0
    from record import row_provenance, write_csv

    about, found = row_provenance(args.commit), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second", "host"):
            command = [sys.executable, __file__, "--out", str(args.out), "--one", "host" if name == "host" else "start"]
            command += ["--dry"] if args.dry else []
            environment = os.environ | {"XDG_CACHE_HOME": folder}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            found[name] = rows if name == "host" else [{"process": name, **row} for row in rows]
            print(*found[name], sep="\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "binding.csv", [row | about for name in ("first", "second") for row in found[name]])
    write_csv(args.out / "binding_host.csv", [row | about for row in found["host"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
