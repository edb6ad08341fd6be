"""What do new weights cost from a trainer to a vLLM on other GPUs, and is each bit there? Writes weight_transfer.json.

    python bench/weight_transfer.py --out bench/results/h200 [--model 0.6B] [--tp 1] [--updates 5] [--seconds 240]

The trainer is on the first GPU, vLLM with the plugin on the next ones, begun with weights of its own. A row as soon as
it is known:

    control     tokens sampled before the first update: their log-probabilities have to differ from the trainer's
    first       the first update: bytes, milliseconds from the first call until all is loaded, GB/s; milliseconds of the
                checksums that are compared afterwards
    median      of the updates that follow, each with other weights
    corrupted   one bit of each pack is another on the wire: the update has to raise, naming tensors; the next one not
    rollout     2,000 tokens after the updates: the log-probabilities that the trainer computes have the same bits
    killed      a worker is killed: the next update has to raise, in seconds

Exit status 0 only if all of that held. Rows that the time did not allow are named.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nccl_library
from record import offer_plugin, provenance
from step_sides import SHAPES, draw_weights, shape

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core.files import write_json
from bi_ops.models import make_model
from bi_ops.rollout import nccl_transfer
from bi_ops.rollout.base import Completion, SamplingParams
from bi_ops.rollout.nccl_transfer import Transfer, TransferFailed
from bi_ops.verify.compositions import rescore

REQUESTS, NEW_TOKENS = 20, 100
#: Seconds that workers which are lost may keep the trainer waiting.
LOST = 60.0
#: vLLM's processes are begun anew, and NVLink multicast stays off.
ENVIRONMENT = {
    **{"VLLM_BATCH_INVARIANT": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
    **{"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
}


class FlippedBit:
    """A communicator whose packs have one other bit each, after the trainer took its checksums."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        tensor[len(tensor) // 2] ^= 1  # a pack's copy
        self.group.broadcast(tensor, src=src)


@torch.no_grad()
def change(model: torch.nn.Module) -> None:
    """Give it other weights."""
    for p in model.parameters():
        p.mul_(1.0078125)  # exact in fp32, another value in bf16


def pid(model: object) -> int:
    """Of a worker."""
    return os.getpid()


def scored(model: Any, engine: Any, completions: list[Completion]) -> dict[str, Any]:
    """How many log-probabilities of a rollout the trainer has in other bits."""
    [report] = rescore(model, completions, ("together",), orders=engine.orders).values()
    return {"tokens_checked": report.tokens_checked, "tokens_different": report.tokens_different}


class Bench:
    """The questions, over an engine and the model that it takes weights of; rows are written as they come.

    write: is called with all rows and the names of those that are not there yet.
    """

    def __init__(
        self,
        engine: Any,
        model: Any,
        write: Callable[[list[dict[str, Any]], list[str]], None],
        updates: int = 5,
        requests: int = REQUESTS,
        new_tokens: int = NEW_TOKENS,
    ) -> None:
        self.engine, self.model, self.write, self.updates = engine, model, write, updates
        self.requests, self.new_tokens = requests, new_tokens
        self.rows: list[dict[str, Any]] = []

    def run(self, left: Callable[[], float]) -> bool:
        """All of them, while seconds are left: did every one hold?"""
        questions = [self.control, self.first, self.median, self.corrupted, self.rollout, self.killed]
        while questions and left() > 0:
            question = questions.pop(0)
            self.rows.append({"what": question.__name__, **question()})
            print(self.rows[-1], flush=True)
            self.write(self.rows, [q.__name__ for q in questions])
        return not questions and all(row["held"] for row in self.rows)

    def sample(self) -> list[Completion]:
        vocabulary = self.model.config.vocab_size
        prompts = [[(7919 * (i + 1) + 104729 * j) % vocabulary for j in range(1 + 7 * i)] for i in range(self.requests)]
        params = [SamplingParams(self.new_tokens, seed=i) for i in range(self.requests)]
        found: list[Completion] = self.engine.generate(prompts, params)
        return found

    def control(self) -> dict[str, Any]:
        found = scored(self.model, self.engine, self.sample())
        return {**found, "held": found["tokens_different"] > 0}

    def update(self) -> Transfer:
        """Of weights that the engine has not."""
        change(self.model)
        self.engine.update_weights(self.model)  # raises where checksums differ
        done: Transfer = self.engine.last_transfer
        return done

    def first(self) -> dict[str, Any]:
        return speed([self.update()])

    def median(self) -> dict[str, Any]:
        return speed([self.update() for _ in range(self.updates)])

    def corrupted(self) -> dict[str, Any]:
        transfer = self.engine._transfer
        group, transfer.group = transfer.group, FlippedBit(transfer.group)
        try:
            self.engine.update_weights(self.model)
            raised = ""
        except TransferFailed:
            raise
        except RuntimeError as error:
            raised = str(error)
        finally:
            transfer.group = group
        self.engine.update_weights(self.model)
        return {"raised": raised, "held": "received other bits than were sent of" in raised}

    def rollout(self) -> dict[str, Any]:
        found = scored(self.model, self.engine, self.sample())
        return {**found, "held": found["tokens_different"] == 0}

    def killed(self) -> dict[str, Any]:
        os.kill(self.engine._llm.apply_model(pid)[-1], signal.SIGKILL)
        began = time.perf_counter()
        try:
            self.engine.update_weights(self.model)
            raised = ""
        except TransferFailed as error:
            raised = str(error)
        seconds = round(time.perf_counter() - began, 2)
        return {"raised": raised, "seconds": seconds, "held": bool(raised)}


def speed(done: list[Transfer]) -> dict[str, Any]:
    """Medians."""
    ms = statistics.median(t.ms for t in done)
    return {
        **{"bytes": done[0].bytes, "tensors": done[0].tensors, "workers": done[0].workers, "updates": len(done)},
        **{"ms": round(ms, 2), "gb_per_s": round(done[0].bytes / ms / 1e6, 2)},
        **{"check_ms": round(statistics.median(t.check_ms for t in done), 2), "checksums_equal": True, "held": True},
    }


def start(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, list[str]]:
    """The engine, the model, which has other weights, and what this machine's NCCL lacks (`nccl_library`)."""
    model = make_model(shape(args.model))
    draw_weights(model)
    model.save_pretrained(folder / "model", torch.bfloat16)
    change(model)
    offer_plugin(folder)
    added = nccl_library.offer(folder)
    sys.path.insert(0, str(folder))  # which vLLM's processes inherit
    from bi_ops.rollout.vllm_engine import VllmEngine

    nccl_transfer.TIMEOUT = LOST
    engine = VllmEngine(
        folder / "model",
        device_ids=range(1, 1 + args.tp),
        tensor_parallel_size=args.tp,
        cuda_graphs=args.cuda_graphs,
        max_model_len=1024,
    )
    assert engine.orders is not None
    model.adopt(engine.orders)
    model.warmup()
    return engine, model, added


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that weight_transfer.json is written to")
    parser.add_argument("--model", choices=[m for m in SHAPES if m != "dry"], default="0.6B")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of the engine")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0, help="no row begins after so many")
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    began = time.monotonic()
    os.environ.update(ENVIRONMENT)
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        **provenance(args.commit),
        "model": args.model,
        "tp": args.tp,
        "cuda_graphs": args.cuda_graphs,
    }

    def write(rows: list[dict[str, Any]], missing: list[str]) -> None:
        write_json(args.out / "weight_transfer.json", {**record, "rows": rows, "not_run": missing})

    with tempfile.TemporaryDirectory() as folder:
        engine, model, added = start(args, Path(folder))
        record["start_s"] = round(time.monotonic() - began, 1)
        record["nccl"] = {"version": torch.cuda.nccl.version(), "stubs": added, **engine._transfer.environment}
        try:
            held = Bench(engine, model, write, args.updates).run(lambda: args.seconds - (time.monotonic() - began))
        finally:
            engine.close()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
