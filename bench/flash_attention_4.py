"""How fast is attention, beside FlashAttention 4's? Writes flash_attention_4.csv, one row a case.

    python bench/flash_attention_4.py --out bench/results/h100 [--head-dims 64 128] [--seqlens 512 ... 32768]

FlashAttention 4 (`pip install flash-attn-4`, CuTe DSL) has a backward that is deterministic on request. Cases, counting
and timing are those of attention.py; both sides of a row run in the same minute on the same inputs. The last two
columns say of the deterministic one whether 100 reruns gave the same gradients, and whether the last sequence of the
batch has the gradients that it has alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from attention import (
    GROUP,
    SEQLENS,
    TOKENS,
    WIDTH,
    Case,
    Run,
    blank,
    cu,
    equal,
    inputs,
    ours,
    rl_lengths,
    seconds,
    step,
    tried,
    warm_all,
)
from record import provenance, write_csv

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

HEAD_DIMS = (64, 128)
RERUNS = 100
COLUMNS = ("pass", "seqlen", "batch", "packed", "head_dim", "heads", "kv_heads", "causal", "ours_tflops")


def fa4(case: Case, deterministic: bool, q, k, v, g) -> Run:
    """FlashAttention 4 on [B, S, H, D], or on packed sequences."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if case.packed:
        longest = {f"max_seqlen_{x}": max(case.lengths) for x in "qk"}
        starts = {f"cu_seqlens_{x}": cu(case.lengths) for x in "qk"}

        def forward(q, k, v):
            return flash_attn_varlen_func(q, k, v, causal=True, deterministic=deterministic, **starts, **longest)[0]

        return step(forward, case, q, k, v, g)
    n = len(case.lengths)
    q, k, v, g = (t.unflatten(0, (n, -1)) for t in (q, k, v, g))
    return step(lambda *t: flash_attn_func(*t, causal=True, deterministic=deterministic)[0], case, q, k, v, g)


def flat(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """[B, S, H, D] as [T, H, D]."""
    return tuple(t.flatten(0, 1) if t.dim() == 4 else t for t in gradients)


def properties(case: Case, tensors: tuple[torch.Tensor, ...]) -> dict[str, object]:
    """What of the contract the deterministic backward keeps."""
    run = fa4(case, True, *tensors)
    first = flat(run())
    n = case.lengths[-1]
    alone = fa4(Case("bwd", (n,), case.head_dim, case.heads, case.kv_heads), True, *(t[-n:].clone() for t in tensors))
    return {
        "fa4_reruns_equal": all(equal(flat(run()), first) for _ in range(RERUNS)),
        "fa4_batch_invariant": equal(flat(alone()), tuple(t[-n:] for t in first)),
    }


def measure(case: Case) -> dict[str, object]:
    tensors = inputs(case)
    row = {name: value for name, value in blank(case).items() if name in COLUMNS}
    row |= dict.fromkeys(["fa4_tflops", "fa4_deterministic_tflops", "fa4_reruns_equal", "fa4_batch_invariant"])
    times = {
        "ours": seconds(ours(case, *tensors)),
        "fa4": tried("fa4", lambda: fa4(case, False, *tensors)),
        "fa4_deterministic": None,
    }
    if case.kind == "bwd":
        times["fa4_deterministic"] = tried("fa4, deterministic", lambda: fa4(case, True, *tensors))
        if times["fa4_deterministic"] is not None:
            row |= properties(case, tensors)
    return row | {f"{side}_tflops": round(case.flops / t / 1e12, 1) for side, t in times.items() if t is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that flash_attention_4.csv is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[s for s in SEQLENS if s <= 32768])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a batch; longer sequences come alone")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile kernels beforehand; 0: none")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if runtime.INTERPRET:
        parser.error("no GPU: FlashAttention 4 needs one")
    lengths = [(s,) * max(args.tokens // s, 1) for s in args.seqlens] + [rl_lengths(args.tokens)]
    cases = [
        Case(kind, of_one, d, WIDTH // d, WIDTH // d // GROUP)
        for d, of_one, kind in itertools.product(args.head_dims, lengths, ("fwd", "bwd"))
    ]
    if args.workers:
        warm_all(cases, args.workers)
    record, rows = provenance(args.commit), []
    args.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        row = measure(case)
        rows.append(row | record)
        write_csv(args.out / "flash_attention_4.csv", rows)
        figures = {k: v for k, v in row.items() if v is not None and k not in COLUMNS[:-1]}
        print(f"{case!s:32} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
