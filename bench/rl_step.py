"""A whole RL step of Qwen3-1.7B, exact and inexact: where its time goes. Writes rl_step.csv.

    python bench/rl_step.py --out bench/results/h200 [--sides bi_ops stock] [--steps 3]

32 prompts of 64 tokens, 8 samples each, 256 tokens a sample; one GPU holds what samples and what trains. A row a step:
seconds of sampling, training (forward, loss, backward), update (clip and AdamW), handing the weights over, and all; the
GPU is waited for after each. Sides, each in a process of its own, from the same checkpoint:

    bi_ops          vLLM with the plugin, bi_ops' trainer over fp32 masters: log-probabilities have to be equal bits
    stock           vLLM's own defaults, no batch-invariant mode; transformers compiled, bf16 weights, fused AdamW
    stock graphs    the same, but full CUDA graphs of vLLM's eager kernels, where its defaults do not run
    earlier         an earlier checkout of bi_ops, given by --earlier (`rl_step_earlier.py`)

The norm of bi_ops' gradients is part of training, where the host reads it with everything else. The first steps warm up
and are not written. `different`: sampled tokens whose log-probabilities in sampling and training differ, `max_delta`:
by how much. Rows of other releases and sides in an existing file stay. `--dry` takes a tiny model and bi_ops' embedded
engine on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from record import kept, row_provenance, write_csv
from rollout import build_binding
from step_sides import LR, MAX_NORM, shape, wait

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime
from bi_ops.core.provenance import versions
from bi_ops.rollout.base import Completion

SIDES = ("bi_ops", "stock", "stock graphs", "earlier")
PARTS = ("sampling", "training", "update", "weights")
CLIP, MEMORY, SEED = 0.2, 0.35, 0


class Size(NamedTuple):
    """model: of bench/step.py. prompts, samples of each, and their tokens. pack: tokens of a micro-batch."""

    model: str
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    pack: int


REAL, DRY = Size("1.7B", 32, 8, 64, 256, 16384), Size("dry", 2, 2, 4, 3, 16)


class Side(Protocol):
    """The parts of a step, in order."""

    def sampling(self, step: int) -> None: ...

    def training(self) -> tuple[int, float]:
        """The number of tokens whose log-probabilities differ, and by how much the most."""
        ...

    def update(self) -> None: ...

    def weights(self) -> None: ...


def prompt_of(rng: random.Random, size: Size) -> tuple[int, ...]:
    return tuple(rng.randrange(shape(size.model)["vocab_size"]) for _ in range(size.prompt_tokens))


def reward_of(tokens: Sequence[int]) -> float:
    return tokens[0] % 7 / 7


def _differing(delta: torch.Tensor) -> tuple[int, float]:
    return int((delta != 0).sum()), float(delta.abs().max())


class Ours:
    def __init__(self, path: Path, size: Size) -> None:
        from bi_ops.rl.config import TrainConfig
        from bi_ops.rl.runner import load_model_and_engine
        from bi_ops.rl.tasks import Problem
        from bi_ops.rl.trainer import Trainer

        class Task:
            name = "random tokens"

            def sample(self, rng: random.Random) -> Problem:
                return Problem(prompt_of(rng, size), size.new_tokens, reward_of)

        config = TrainConfig(
            engine="embedded" if runtime.INTERPRET else "vllm",
            prompts_per_step=size.prompts,
            group_size=size.samples,
            lr=LR,
            max_grad_norm=MAX_NORM,
            clip=CLIP,
            max_tokens_per_microbatch=size.pack,
            gpu_memory_utilization=MEMORY,
            seed=SEED,
        )
        model, engine = load_model_and_engine(config, path)
        model.warmup()
        self.trainer = Trainer(config, model, engine, Task())

    def sampling(self, step: int) -> None:
        problems = self.trainer.problems(step)
        params = self.trainer.sampling(step, problems)
        self.completions = self.trainer.generate([p.prompt for p in problems], params)

    def training(self) -> tuple[int, float]:
        from bi_ops.rl.loss import group_advantages

        trainer = self.trainer
        found: list[torch.Tensor] = []

        def check(part: slice, logprobs: Sequence[torch.Tensor]) -> None:
            found.extend(c.logprobs - p for c, p in zip(self.completions[part], logprobs, strict=True))

        rewards = [reward_of(c.tokens) for c in self.completions]
        advantages = group_advantages(rewards, trainer.config.group_size)
        self.scale = trainer.backward(self.completions, advantages, check).clip_scale
        return _differing(torch.cat(found))

    def update(self) -> None:
        self.trainer.optimizer.step(grad_scale=self.scale)

    def weights(self) -> None:
        self.trainer.update_engine(updated=True)


class Theirs:
    def __init__(self, path: Path, size: Size, graphs: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.size, self.path = size, path
        self.engine = self._embedded() if runtime.INTERPRET else self._vllm(graphs)
        self.network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.network.to(runtime.default_device()).config.use_cache = False
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=not runtime.INTERPRET)
        compiled = (lambda f: f) if runtime.INTERPRET else torch.compile
        self.logits, self.loss = compiled(self.network), compiled(self._loss)

    def _embedded(self) -> Any:
        from bi_ops.models import load_model
        from bi_ops.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(load_model(self.path))

    def _vllm(self, graphs: bool) -> Any:
        from vllm import LLM
        from vllm.config import CompilationConfig

        return LLM(
            model=str(self.path),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            gpu_memory_utilization=MEMORY,
            enable_prefix_caching=False,
            generation_config="vllm",
            **({"compilation_config": CompilationConfig(mode=0, cudagraph_mode="FULL")} if graphs else {}),
        )

    @staticmethod
    def _loss(
        logits: torch.Tensor, targets: torch.Tensor, rollout: torch.Tensor, advantages: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the clipped loss of a micro-batch, whose tokens count 1 / n each; log-probabilities)."""
        entropies = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        logprobs = -entropies.view(targets.shape)
        ratio, advantages = (logprobs - rollout).exp(), advantages[:, None]
        least = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return -least.sum() / n, logprobs.detach()

    def sampling(self, step: int) -> None:
        from bi_ops.rollout.base import SamplingParams

        size, rng = self.size, random.Random(f"{SEED} {step}")
        prompts = [p for p in (prompt_of(rng, size) for _ in range(size.prompts)) for _ in range(size.samples)]
        params = [SamplingParams(size.new_tokens, seed=1000 * step + i) for i in range(len(prompts))]
        if runtime.INTERPRET:
            self.completions: list[Completion] = self.engine.generate(prompts, params)
            return
        from bi_ops.rollout.vllm_requests import completion_of, vllm_params

        requests = [vllm_params(i, p) for i, p in enumerate(params)]
        outputs = self.engine.generate([{"prompt_token_ids": list(p)} for p in prompts], requests, use_tqdm=False)
        self.completions = [completion_of(i, prompts[i], o.outputs[0]) for i, o in enumerate(outputs)]

    def training(self) -> tuple[int, float]:
        from bi_ops.rl.loss import group_advantages

        size, device = self.size, self.network.device
        n = size.prompts * size.samples * size.new_tokens
        advantages = group_advantages([reward_of(c.tokens) for c in self.completions], size.samples).to(device)
        rollout = torch.stack([c.logprobs for c in self.completions]).to(device)
        ids = torch.tensor([[*c.prompt, *c.tokens] for c in self.completions], device=device)
        found = []
        # All sequences are as long, so nothing is padded, and equal micro-batches compile once.
        most = size.pack // ids.shape[1]
        rows = max(r for r in range(1, len(ids) + 1) if len(ids) % r == 0 and r <= max(most, 1))
        for part in (slice(i, i + rows) for i in range(0, len(ids), rows)):
            logits = self.logits(input_ids=ids[part], logits_to_keep=size.new_tokens + 1).logits[:, :-1]
            loss, logprobs = self.loss(logits, ids[part, -size.new_tokens :], rollout[part], advantages[part], n)
            loss.backward()
            found.append(logprobs)
        return _differing(torch.cat(found) - rollout)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> None:
        if runtime.INTERPRET:
            self.engine.model.load_state_dict(self.network.state_dict(), strict=False)
            return
        self.engine.apply_model(functools.partial(_load_weights, self.network))
        self.engine.reset_prefix_cache()


def _load_weights(network: torch.nn.Module, model: Any) -> None:
    with torch.no_grad():
        model.load_weights((name, p.detach()) for name, p in network.named_parameters())


def measure(side: str, path: Path, size: Size, warm: int, steps: int) -> Iterator[dict[str, Any]]:
    """A row for each step after `warm` of them."""
    began = wait()
    made: Side = Ours(path, size) if side == "bi_ops" else Theirs(path, size, side == "stock graphs")
    start_s = wait() - began
    for step in range(1, warm + steps + 1):
        if not runtime.INTERPRET:
            torch.cuda.reset_peak_memory_stats()
        times = [wait()]
        made.sampling(step)
        times.append(wait())
        different, most = made.training()
        times.append(wait())
        made.update()
        times.append(wait())
        made.weights()
        times.append(wait())
        peak = 0 if runtime.INTERPRET else torch.cuda.max_memory_allocated()
        row = {f"{part}_s": round(b - a, 4) for part, a, b in zip(PARTS, times[:-1], times[1:], strict=True)}
        row |= {"total_s": round(times[-1] - times[0], 4), "different": different, "max_delta": most}
        row |= {"tokens": size.prompts * size.samples * size.new_tokens, "peak_gib": round(peak / 2**30, 1)}
        print(f"{side}, step {step}: {row}", file=sys.stderr, flush=True)
        if step > warm:
            yield {"model": size.model, "side": side, "step": step - warm, **row, "start_s": round(start_s, 1)}


def told_to_earlier(size: Size) -> dict[str, Any]:
    """What `rl_step_earlier.py`, which imports nothing of today's, has to know of a step."""
    options = {"lr": LR, "max_grad_norm": MAX_NORM, "clip": CLIP, "memory": MEMORY, "seed": SEED}
    return size._asdict() | options | {"vocabulary": shape(size.model)["vocab_size"]}


def write_checkpoint(path: Path, size: Size) -> None:
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config.from_dict(shape(size.model) | {"max_position_embeddings": 4096}), torch.bfloat16
    )
    model.init_weights(SEED)
    model.save_pretrained(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that rl_step.csv is written to")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]))
    parser.add_argument("--steps", type=int, default=3, help="steps that are written")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--log", type=Path, help="file that what the sides print is appended to")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--earlier", type=Path, help="an earlier checkout, for the side of this name")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if runtime.INTERPRET and not args.dry:
        parser.error("no GPU: give --dry to try this on the CPU")
    if "earlier" in args.sides and not args.earlier:
        parser.error("the side `earlier` needs --earlier CHECKOUT")
    size = DRY if args.dry else REAL
    if args.one:
        side, path = args.one[0], Path(args.one[1])
        if side == "checkpoint":
            write_checkpoint(path, size)
            return 0
        for row in measure(side, path, size, args.warm, args.steps):
            print(f"ROW {json.dumps(row)}", flush=True)
        return 0
    record, release = row_provenance(args.commit), versions().get("vllm", "")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    failed = [] if args.dry or "bi_ops" not in args.sides or build_binding() else ["binding"]
    with tempfile.TemporaryDirectory() as folder:
        for side in ("checkpoint", *args.sides):
            options = ["--out", str(args.out), "--steps", str(args.steps), "--warm", str(args.warm)]
            command = [sys.executable, __file__, *options, *(["--dry"] if args.dry else []), "--one", side, folder]
            env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if side == "earlier":
                worker = str(Path(__file__).with_name("rl_step_earlier.py"))
                command = [sys.executable, worker, folder, "--steps", str(args.steps), "--warm", str(args.warm)]
                command += ["--size", json.dumps(told_to_earlier(size))]
                env["PYTHONPATH"] = os.pathsep.join([str(args.earlier.resolve()), os.environ.get("PYTHONPATH", "")])
            log = args.log.open("a") if args.log else None
            process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ROW "):
                    row = {"release": release, "model": size.model, "side": side}
                    rows.append(row | json.loads(line.removeprefix("ROW ")) | record)
                    path = args.out / "rl_step.csv"
                    write_csv(path, [*kept(path, rows, ("release", "side")), *rows])
                    print(line.strip(), flush=True)
                elif args.log:
                    args.log.open("a").write(line)
            if process.wait():
                failed.append(side)
                print(f"{side}: exit status {process.returncode}", file=sys.stderr, flush=True)
                if side == "checkpoint":
                    return 1
    totals = {s: [float(r["total_s"]) for r in rows if r["side"] == s] for s in args.sides}
    medians = {s: statistics.median(t) for s, t in totals.items() if t}
    for side, total in medians.items():
        others = ", ".join(f"{total / t:.3f} of {s}" for s, t in medians.items() if s != side)
        print(f"{side}: {total:.3f} s {others}", flush=True)
    wrong = [r for r in rows if r["side"] == "bi_ops" and int(r["different"])]
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
