"""Fingerprints of every operator's bits on this GPU, and whether another GPU has the same. Writes bits.json.

    python bench/bits.py --out bench/results/h200 [--compare bench/results/h100/bits.json]

Inputs are made by integer arithmetic, so they are the same everywhere. Exit status 1 if a fingerprint that both files
have differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from products import MODELS, products
from record import provenance

import bi_ops  # isort: skip  (before triton)
import torch

from bi_ops.core.files import write_json
from bi_ops.core.runtime import default_device
from bi_ops.verify import integers
from bi_ops.verify.integers import fingerprint

mixed = functools.partial(integers.mixed, device=default_device())
values = functools.partial(integers.values, device=default_device())


def product_bits(models: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Forward at several row counts, dX and dW of every product."""
    for model in models:
        for name, n, k in products(model):
            if name == "lm_head" and model not in ("0.6B", "8B"):
                continue
            weight = values(n, k, seed=1, scale=0.1).requires_grad_()
            x = values(17, k, seed=18).requires_grad_()
            torch.autograd.grad(bi_ops.matmul.linear(x, weight), (x, weight), values(17, n, seed=3))
            bi_ops.warmup()  # so that the GEMMs that serve a warm machine are the ones that are fingerprinted
            for rows in (1, 17, 256, 1000):
                x = values(rows, k, seed=rows + 1).requires_grad_()
                out = bi_ops.matmul.linear(x, weight)
                where = f"matmul {model} {name} {rows}"
                yield f"{where} forward", out
                if rows in (17, 1000):
                    dx, dw = torch.autograd.grad(out, (x, weight), values(rows, n, seed=3))
                    yield f"{where} dx", dx
                    yield f"{where} dw", dw


def row_bits() -> Iterator[tuple[str, torch.Tensor]]:
    """Norms, activations, rotations, log-probabilities."""
    for n in (128, 1024, 2048, 5120):
        x, weight = values(300, n, seed=4).requires_grad_(), values(n, seed=5).requires_grad_()
        y, total = bi_ops.norm.add_rms_norm(x, values(300, n, seed=6), weight)
        dx, dw = torch.autograd.grad(y, (x, weight), values(300, n, seed=7))
        yield from ((f"norm {n} {k}", t) for k, t in (("out", y), ("sum", total), ("dx", dx), ("dweight", dw)))
        yield f"activation {n}", bi_ops.activation.silu_and_mul(values(300, 2 * n, seed=8, scale=4.0))
    logits = values(64, 151936, seed=9, scale=9.0).requires_grad_()
    scores = bi_ops.logprob.token_logprobs(logits, mixed(64, 10) % 151936)
    yield "logprob", scores
    yield "logprob dx", torch.autograd.grad(scores, logits, torch.ones_like(scores))[0]


def attention_bits() -> Iterator[tuple[str, torch.Tensor]]:
    """Packed causal attention, forward and backward, at three head sizes."""
    lengths = (1, 70, 0, 257, 1024)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=default_device())
    total = sum(lengths)
    for d in (64, 128, 256):
        q, k, v = (values(total, h, d, seed=s).requires_grad_() for h, s in ((8, 11), (2, 12), (2, 13)))
        for backend in ("triton", "vllm"):
            if backend == "vllm" and (d == 64 or not bi_ops.attention.backends.get("vllm").available()):
                continue
            out = bi_ops.attention.flash_attention(q, k, v, starts, max_seqlen=max(lengths), backend=backend)
            grads = torch.autograd.grad(out, (q, k, v), values(total, 8, d, seed=14))
            for name, t in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
                yield f"attention {backend} {d} {name}", t


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that bits.json is written to")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compare", type=Path, help="bits.json of another GPU")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    bits = {}
    for source in (product_bits(args.models), row_bits(), attention_bits()):
        bits.update({name: fingerprint(t) for name, t in source})
    record = {**provenance(args.commit), "bits": bits}
    differing: list[str] = []
    if args.compare is not None:
        other = json.loads(args.compare.read_text())
        common = sorted(bits.keys() & other["bits"].keys())
        differing = [name for name in common if bits[name] != other["bits"][name]]
        record["compared"] = {"device": other["device"], "fingerprints": len(common), "differing": differing}
        print(f"{len(common)} fingerprints compared with {other['device']}, {len(differing)} differ", *differing[:20])
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "bits.json", record)
    print(f"{len(bits)} fingerprints")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
