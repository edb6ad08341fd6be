"""The side of rl_step.py that an earlier checkout of bi_ops computes, with what its trainer had at 758aba8.

    PYTHONPATH=CHECKOUT python bench/rl_step_earlier.py MODEL --steps 3 --warm 2 --size JSON

MODEL: a checkpoint's folder. --size: as `rl_step.told_to_earlier` has it, for nothing of today's bi_ops is imported.
Prints a ROW of JSON for each step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

PARTS = ("sampling", "training", "update", "weights")


def wait() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def reward_of(tokens: Sequence[int]) -> float:
    return tokens[0] % 7 / 7


def make_trainer(path: Path, size: dict[str, Any]) -> Any:
    from bi_ops.rl.config import TrainConfig
    from bi_ops.rl.runner import load_model_and_engine
    from bi_ops.rl.tasks import Problem
    from bi_ops.rl.trainer import Trainer

    class Task:
        name = "random tokens"

        def sample(self, rng: random.Random) -> Problem:
            prompt = tuple(rng.randrange(size["vocabulary"]) for _ in range(size["prompt_tokens"]))
            return Problem(prompt, size["new_tokens"], reward_of)

    config = TrainConfig(
        engine="vllm",
        prompts_per_step=size["prompts"],
        group_size=size["samples"],
        lr=size["lr"],
        max_grad_norm=size["max_grad_norm"],
        clip=size["clip"],
        max_tokens_per_microbatch=size["pack"],
        gpu_memory_utilization=size["memory"],
        seed=size["seed"],
    )
    return Trainer(config, *load_model_and_engine(config, path), Task())  # type: ignore[arg-type]


def one_step(trainer: Any, step: int) -> dict[str, Any]:
    """A row: as `Trainer.step` there, with the GPU waited for after each part."""
    from bi_ops.rl.loss import group_advantages
    from bi_ops.rl.trainer import clip_gradients  # type: ignore[attr-defined]  # today's has another one

    torch.cuda.reset_peak_memory_stats()
    reports = []
    times = [wait()]
    problems = trainer.problems(step)
    completions = trainer.engine.generate([p.prompt for p in problems], trainer.sampling(step, problems))
    times.append(wait())
    advantages = group_advantages([reward_of(c.tokens) for c in completions], trainer.config.group_size)
    trainer.backward(
        completions, advantages, lambda part, found: reports.append(trainer.check(step, completions, part, found))
    )
    times.append(wait())
    clip_gradients(trainer.parameters, trainer.config.max_grad_norm)
    trainer.optimizer.step()
    times.append(wait())
    trainer.engine.update_weights(trainer.model)
    times.append(wait())
    row: dict[str, Any] = {
        f"{part}_s": round(b - a, 4) for part, a, b in zip(PARTS, times[:-1], times[1:], strict=True)
    }
    return row | {
        "total_s": round(times[-1] - times[0], 4),
        "different": sum(r.tokens_different for r in reports),
        "max_delta": max(r.max_delta for r in reports),
        "tokens": sum(len(c.tokens) for c in completions),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--size", type=json.loads, required=True, metavar="JSON")
    args = parser.parse_args()
    began = wait()
    trainer = make_trainer(args.model, args.size)
    start_s = round(wait() - began, 1)
    for step in range(1, args.warm + args.steps + 1):
        row = one_step(trainer, step)
        print(f"step {step}: {row}", file=sys.stderr, flush=True)
        if step > args.warm:
            print("ROW " + json.dumps({"step": step - args.warm, **row, "start_s": start_s}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
