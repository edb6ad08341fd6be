"""What a decoding step launches after its CUDA graph: the LM head, and log-probabilities and ranks of sampled tokens.

    python bench/after_graph.py --out bench/results/h200 [--models 0.6B 1.7B] [--batches 1 8 64 256]

Writes after_graph.csv, a row a piece, model and batch. gpu_us: medians of a CUDA graph of calls; host_us: of the same
calls one by one, until the last is launched. The stock side is cuBLAS, and vLLM's functions of its v2 model runner,
which need vLLM. `bits_equal`: log-probabilities and ranks against vLLM's kernels, logits against the Triton kernel.
`--dry` runs the own pieces in Triton's interpreter; nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from products import MODELS
from record import row_provenance, write_csv

import bi_ops  # noqa: F401  isort: skip  (before triton)
import torch

from bi_ops import logprob, matmul

VOCABULARY, CALLS = 151936, 16

Call = Callable[[], object]


def head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `vllm_plugin.layers` calls it."""
    return matmul.inference_linear(x, weight, constant_weight=True, in_graph=False)


def gpu_us(call: Call, rounds: int = 9) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    taken = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / CALLS)
    return round(statistics.median(taken), 2)


def host_us(call: Call, rounds: int = 9) -> float:
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - start) * 1e6 / CALLS)
        torch.cuda.synchronize()
    return round(statistics.median(taken), 2)


def measured(ours: Call, stock: Call | None) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, call in (("ours", ours), ("stock", stock)):
        if call is None:
            row |= {f"{name}_gpu_us": "", f"{name}_host_us": ""}
            continue
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        row |= {f"{name}_gpu_us": gpu_us(call), f"{name}_host_us": host_us(call)}
    return row


def scores_of_vllm(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    found = compute_topk_scores(logits, 0, ids)
    return found.logprobs[:, 0], found.selected_token_ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that after_graph.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["0.6B", "1.7B", "8B"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        logits = head(torch.randn(2, 32).bfloat16(), torch.randn(40, 32).bfloat16())
        scores, ranks = logprob.ranked_logprobs(logits, logits.argmax(1))
        assert torch.equal(ranks, (logits == logits.amax(1, keepdim=True)).sum(1))
        assert not scores.isnan().any()
        print("dry run done")
        return 0
    if args.out is None:
        parser.error("--out is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    about = row_provenance(args.commit)
    rows: list[dict[str, object]] = []
    begun = time.monotonic()

    def add(row: dict[str, object]) -> None:
        rows.append(row | about)
        print(f"[{time.monotonic() - begun:5.1f} s]", row, flush=True)
        write_csv(args.out / "after_graph.csv", rows)

    with torch.inference_mode():
        for n in args.batches:
            logits = (torch.randn(n, VOCABULARY, device="cuda") * 3).bfloat16()
            ids = torch.multinomial(logits.float().softmax(1), 1)[:, 0]
            stock, equal = partial(scores_of_vllm, logits, ids), ""
            try:
                pairs = zip(logprob.ranked_logprobs(logits, ids), stock(), strict=True)
                equal = str(all(torch.equal(a, b) for a, b in pairs))
            except (ImportError, TypeError) as e:  # no vLLM, or a release that was not seen
                print("no stock side:", repr(e)[:300])
            ours = partial(logprob.ranked_logprobs, logits, ids)
            found = measured(ours, stock if equal else None)
            add({"piece": "log-probabilities and ranks", "model": "", "batch": n} | found | {"bits_equal": equal})
        for model in args.models:
            weight = torch.randn(VOCABULARY, MODELS[model][0], device="cuda").mul_(0.03).bfloat16()
            head(torch.randn(2 * max(args.batches), weight.shape[1], device="cuda").bfloat16(), weight)
            matmul.warmup()  # the head's shape, if it ran unverified; the binding is built first
            for n in args.batches:
                x = torch.randn(n, weight.shape[1], device="cuda").bfloat16()
                equal = str(torch.equal(head(x, weight), matmul.linear(x, weight, backend="triton")))
                found = measured(partial(head, x, weight), partial(torch.nn.functional.linear, x, weight))
                add({"piece": "LM head", "model": model, "batch": n} | found | {"bits_equal": equal})
            del weight
    ok = all(r["bits_equal"] != "False" for r in rows)
    print("bits", "hold" if ok else "DIFFER")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
