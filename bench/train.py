"""Does training on vLLM's samples learn, agree bit for bit, and repeat itself? Writes train.json.

    python bench/train.py --out bench/results/h100 [--steps 30] [--runs 2]
    python bench/train.py --out bench/results/h200 --preset h100-moe       with experts: moe_train.json

Runs `bi-ops train --preset h100` several times with one seed, each in a process of its own. Exit status 0 only if
every step of every run had 0 tokens different, the reward at least doubled, and all final weights are the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import provenance

from bi_ops.core.files import write_json
from bi_ops.rl import PRESETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that train.json is written to")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h100")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--kv-cache-memory-bytes", help="vLLM's, where other processes use the GPU too")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(args.runs):
            folder = Path(scratch) / str(i)
            options = ["--preset", args.preset, "--steps", str(args.steps), "--output", str(folder)]
            if args.kv_cache_memory_bytes:
                options += ["--kv-cache-memory-bytes", args.kv_cache_memory_bytes, "--gpu-memory-utilization", "0.1"]
            subprocess.run([sys.executable, "-m", "bi_ops.cli", "train", *options], check=True)
            summary = json.loads((folder / "summary.json").read_text())
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            runs.append({**summary, "metrics": steps})
            config = json.loads((folder / "config.json").read_text())

    record = {
        "preset": args.preset,
        "weights_byte_equal": len({r["weights_sha256"] for r in runs}) == 1,
        **provenance(args.commit),
        "config": config,
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    prefix = "moe_" if "num_experts" in PRESETS[args.preset].architecture else ""
    write_json(args.out / f"{prefix}train.json", record)
    held = {
        "0 tokens different": all(r["tokens_different"] == 0 for r in runs),
        "reward doubled": all(r["reward_last"] >= 2 * r["reward_first"] for r in runs),
        "weights byte-equal": record["weights_byte_equal"],
    }
    for r in runs:
        print(f"reward {r['reward_first']:.3f} -> {r['reward_last']:.3f}, {r['tokens_checked']} tokens checked")
    for claim, ok in held.items():
        print(f"{claim}: {'yes' if ok else 'NO'}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
