"""The first minute: import, load, warm-up and first step, from empty caches and from warm ones. Writes start.csv.

    python bench/start.py --out bench/results/h100 [--models 0.6B 1.7B] [--binding] [--dry]

Each row is a process of its own: import of bi_ops; the model made on the GPU with random weights; `model.warmup()`, as
training calls it: kernels compiled in parallel, GEMMs verified if the cuBLASLt binding is there; a first step of 8,192
tokens, and a second one. The caches of Triton and bi_ops are folders of this benchmark, empty for the first row.
`--binding` builds the binding between the two rows, as `bi-ops warmup` would, and states its seconds in the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(model: str, dry: bool, bind: bool) -> dict[str, object]:
    start = time.perf_counter()
    import bi_ops  # noqa: F401

    imported = time.perf_counter()
    import torch
    from step import ours, shape

    from bi_ops.matmul import cublaslt

    ids = torch.randint(shape(model)["vocab_size"], (2, 16) if dry else (4, 2048))
    bound = time.perf_counter()
    if bind:
        cublaslt.extension()
    loading = time.perf_counter()
    made = ours(model, list(ids), None, "selective", verify=False)
    loaded = time.perf_counter()
    made.warm()
    warm = time.perf_counter()
    seconds = []
    for _ in range(2):
        made.before()
        made.forward().backward()
        made.after()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter())
    times = {
        "import_s": imported - start,
        "build_s": loading - bound if bind else 0.0,
        "load_s": loaded - loading,
        "warmup_s": warm - loaded,
        "first_step_s": seconds[0] - warm,
        "second_step_s": seconds[1] - seconds[0],
        "after_load_s": seconds[0] - loaded,
    }
    return {name: round(value, 3) for name, value in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that start.csv is written to")
    parser.add_argument("--models", nargs="+", default=["0.6B", "1.7B"])
    parser.add_argument("--binding", action="store_true", help="build the cuBLASLt binding before the warm row")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "BIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.dry, args.one[1] == "bind")))
        return 0
    from record import provenance, write_csv  # here, so that a measured process does not import torch before

    rows, record = [], provenance(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    for model in ["dry"] if args.dry else args.models:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
            for state in ("empty", *(["binding built"] if args.binding else []), "warm"):
                bind = "bind" if state == "binding built" else "no"
                command = [sys.executable, __file__, "--out", str(args.out), "--one", model, bind]
                command += ["--dry"] if args.dry else []
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches, check=True)
                rows.append({"model": model, "caches": state, **json.loads(done.stdout.splitlines()[-1])} | record)
                write_csv(args.out / "start.csv", rows)
                print({k: v for k, v in rows[-1].items() if k not in record}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
