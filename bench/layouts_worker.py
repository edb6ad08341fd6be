"""One process of bench/layouts.py: sample on the ranks that torchrun started, or train on what was sampled."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import share_gpu
import torch
import torch.distributed as dist
from library_sums import LibrarySums
from step_sides import draw_weights

import bi_ops  # noqa: F401  (before triton)
from bi_ops import parallel
from bi_ops.core.files import write_atomically, write_json
from bi_ops.models import load_config, load_model
from bi_ops.parallel.experts import ExpertParallel
from bi_ops.parallel.fsdp import FullySharded
from bi_ops.parallel.ranks import SHARED_GPU
from bi_ops.parallel.tensor import OrderedAllReduce, TensorParallel
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.loss import group_advantages
from bi_ops.rl.trainer import Trainer
from bi_ops.rollout.base import Completion, SamplingParams
from bi_ops.verify.parity import compare, joined

#: Do ranks share a GPU?
SHARED = os.environ.get(SHARED_GPU) == "1"
#: Sequences, group of one prompt, and tokens sampled for each: 10,240 in all.
SEQUENCES, GROUP, NEW_TOKENS, PROMPT = 64, 4, 160, 200
ATOMS, UPDATES, LEARNING_RATE = 4, 3, 1e-5
#: Tokens of a micro-batch at most; None: all of an atom.
CUTS = (None, 1000)


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Random weights of a model's shape, norms too."""
    from bi_ops.models import make_model

    model = make_model(config)
    draw_weights(model)
    model.save_pretrained(folder, torch.bfloat16)


def requests(sequences: int, vocabulary: int, longest: int = PROMPT) -> list[list[int]]:
    """Prompts of many lengths, each for `GROUP` requests."""
    return [
        [(7919 * (i // GROUP + 1) + 104729 * j) % vocabulary for j in range(1 + (i // GROUP) * 37 % longest)]
        for i in range(sequences)
    ]


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Completions of fixed requests; `control`: the ranks add partial outputs, as vLLM does without the plugin."""
    from bi_ops.rollout.factory import make_engine

    config = load_config(args.checkpoint)
    options: dict[str, Any] = {}
    if args.engine == "vllm":
        # The cache's size is given: other jobs give memory back meanwhile.
        options = {"tensor_parallel_size": args.tp, "max_model_len": 1024}
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30}
        if args.executor:
            options["distributed_executor_backend"] = args.executor
        if args.collectives or SHARED:
            options["peer_memory"] = False
        if args.ep:
            options["enable_expert_parallel"] = True
        if SHARED:
            options |= {"cuda_graphs": False}  # gloo is not captured
            if args.tp > 1:
                share_gpu.tell_vllm()
    if args.control:
        from bi_ops.vllm_plugin import moe, parallel, parallel_experts

        parallel.REPLACED = parallel_experts.REPLACED = ()  # type: ignore[assignment]
        moe._is_plain = parallel_experts.ranks_of = lambda layer: False  # experts are vLLM's own
    began = time.perf_counter()
    engine = make_engine(args.engine, args.checkpoint, **options)
    start_s = time.perf_counter() - began
    vocabulary = min(config.vocab_size, 150000)
    prompts = requests(args.sequences, vocabulary, args.prompt)
    params = [SamplingParams(args.new_tokens, seed=i) for i in range(args.sequences)]
    engine.generate(prompts[:2], [SamplingParams(2)] * 2)  # compiles what is left
    began = time.perf_counter()
    completions = engine.generate(prompts, params)
    generate_s = time.perf_counter() - began
    if int(os.environ.get("RANK", "0")) == 0:
        write_atomically(args.out, lambda partial: torch.save(completions, partial))
    engine.close()
    return {"start_s": round(start_s, 1), "generate_s": round(generate_s, 2)}


def fingerprint(t: torch.Tensor) -> str:
    """Of all bits and their places, in whole numbers."""
    total = 0
    for at, part in enumerate(t.detach().reshape(-1).view(torch.int32).split(1 << 24)):
        weights = torch.arange(part.numel(), device=t.device) * 2654435761 + (2 * at + 1)
        total += int((part.long() * (2 * weights + 1)).sum())
    return f"{total & (2**64 - 1):016x}"


class NaiveSum(parallel.GradientTree):
    """The control: each rank adds its atoms, then a library adds the ranks."""

    added: list[torch.Tensor] | None = None
    atoms = 0

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        if self.added is None:
            self.added = list(gradients)
        else:
            torch._foreach_add_(self.added, list(gradients))
        self.atoms += 1
        if self.atoms * self.ranks.size < self.tree.atoms:
            return
        for t in self.added:
            dist.all_reduce(t, group=self.ranks.group)
        self._totals, self.added, self.atoms = self.added, None, 0


class LibraryShards(Trainer):
    """The control in shards: a library's reduce-scatter."""

    def _layout(self) -> FullySharded:
        tree = parallel.order(self.config.atoms)
        sums = lambda: LibrarySums(self.ranks)  # noqa: E731
        return FullySharded(self.model, tree, self.ranks, self.model.compute_dtype, exchange=sums)


class LibraryAllReduce(OrderedAllReduce):
    """The control where ranks share a model: rounded partial outputs that a library adds."""

    def __call__(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = partial.to(dtype)
        dist.all_reduce(rounded, group=self.ranks.group)
        return rounded


class SharedByLibrary(Trainer):
    """With that control."""

    def _layout(self) -> TensorParallel:
        tree, add = parallel.order(self.config.atoms), LibraryAllReduce(self.tensor)
        return TensorParallel(self.model, tree, self.data, self.tensor, self.model.compute_dtype, add)


def whole(trainer: Trainer, gradients: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, or the gradients that there are, by name, one at a time; all ranks ask for it."""
    layout = trainer.layout
    layers = layout.layers if isinstance(layout, TensorParallel) else {}
    for name, p in trainer.model.named_parameters():
        t = p.grad if gradients else p.detach()
        if isinstance(layout, FullySharded):
            yield name, (layout.whole_gradient if gradients else layout.whole_weight)(name)
        elif t is not None and isinstance(layout, ExpertParallel) and name in layout.owned:
            yield name, layout.whole(t)
        elif t is not None:
            yield name, cast(TensorParallel, layout).joined(layers[name], t) if name in layers else t


class Sampled:
    """In the place of an engine: what it sampled is there."""

    name = "sampled"

    def __init__(self, model: Any) -> None:
        self.orders = model.orders()


def scored(args: argparse.Namespace, completions: list[Completion], advantages: torch.Tensor) -> list[torch.Tensor]:
    """The log-probabilities of one rank with these segments."""
    config = TrainConfig(segments=args.segments, atoms=ATOMS)
    model = load_model(args.checkpoint, **config.model_options())
    engine: Any = Sampled(model)
    found: dict[int, torch.Tensor] = {}
    trainer = Trainer(config, model, engine, task=None)  # type: ignore[arg-type]
    trainer.backward(completions, advantages, lambda part, scores: found.update(enumerate(scores, part.start)))
    del trainer, model, engine
    free()
    return [found[i] for i in range(len(completions))]


def train(args: argparse.Namespace) -> None:
    """Updates on the rollout, for each cut into micro-batches: fingerprints of gradients and weights."""
    ranks = parallel.Ranks.of_torchrun()
    completions: list[Completion] = torch.load(args.rollout, weights_only=False)
    advantages = group_advantages([float(sum(c.tokens) % 97) for c in completions], GROUP)

    if args.segments > 1:  # the rollout has other bits, and importance ratios would be taken against them
        if not args.scores.exists():
            scores = scored(args, completions, advantages)
            write_atomically(args.scores, lambda partial: torch.save(scores, partial))
        own = torch.load(args.scores, weights_only=False)
        completions = [dataclasses.replace(c, logprobs=s) for c, s in zip(completions, own, strict=True)]
    found: list[dict[str, Any]] = []
    # An atom of a mixture of experts is smaller than its unit here, which is the smallest micro-batch.
    cuts: tuple[int | str | None, ...] = (None,) if hasattr(load_config(args.checkpoint), "num_experts") else CUTS
    cuts = (*cuts, "control") if ranks.size > 1 else cuts
    for cut in cuts:
        control = cut == "control"
        config = TrainConfig(
            lr=LEARNING_RATE,
            # A rank's micro-batches are added before a library adds ranks: one atom for each.
            atoms=ranks.size if control and args.fsdp else ATOMS,
            fsdp=args.fsdp,
            segments=args.segments,
            tp=args.train_tp,
            ep=args.train_ep,
            max_tokens_per_microbatch=cut if isinstance(cut, int) else None,
        )
        model = load_model(args.checkpoint, **config.model_options())
        if not found:
            model.warmup()
        engine: Any = Sampled(model)
        make = Trainer
        if control and (args.fsdp or args.train_tp > 1):
            make = LibraryShards if args.fsdp else SharedByLibrary
        trainer = make(config, model, engine, task=None, ranks=ranks)  # type: ignore[arg-type]
        if control and args.train_tp == 1 and isinstance(trainer.layout, parallel.Whole):
            early = trainer.layout.early
            early.sums = [NaiveSum(sums.tree, sums.ranks) for sums in early.sums]
        reports: list[Any] = []

        def check(part: slice, logprobs: Sequence[torch.Tensor], reports: list[Any] = reports) -> None:
            members = completions[part]
            tokens = [c.tokens for c in members]
            reports.append(compare([c.logprobs for c in members], logprobs, tokens, part.start))

        gradients: list[dict[str, str]] = []
        times: list[float] = []
        for _ in range(UPDATES):
            began = time.perf_counter()
            result = trainer.backward(completions, advantages, check if not gradients else lambda part, logprobs: None)
            trainer.optimizer.step(grad_scale=result.clip_scale)
            float(trainer.parameters[-1].detach().view(-1)[0])  # waits
            times.append(time.perf_counter() - began)
            gradients.append({name: fingerprint(t) for name, t in whole(trainer, gradients=True)})
        report = joined(reports)
        found.append(
            {
                "microbatches": cut,
                "tokens_checked": report.tokens_checked,
                "tokens_different": report.tokens_different,
                "gradients": gradients,
                "grad_norm": result.grad_norm,
                "weights": {name: fingerprint(t) for name, t in whole(trainer, gradients=False)},
                "update_ms": round(1e3 * min(times), 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None,
            }
        )
        every = ranks.gather((gradients, found[-1]["weights"]))
        found[-1]["ranks_agree"] = all(each == every[0] for each in every)
        if ranks.rank == 0:
            write_json(args.out, found)
        del trainer, model, engine, result
        free()


def free() -> None:
    """Give a model's memory back before the next one is made."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("checkpoint", "sample", "train"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--config", help="checkpoint: config.json's fields")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rollout", type=Path)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--executor")
    parser.add_argument("--collectives", action="store_true", help="sample: not over the other GPUs' memory")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--ep", action="store_true", help="sample: whole experts on a rank")
    parser.add_argument("--fsdp", action="store_true", help="train: in shards")
    parser.add_argument("--train-tp", type=int, default=1, help="train: ranks that share the model")
    parser.add_argument("--train-ep", type=int, default=1, help="train: ranks that share the experts")
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--scores", type=Path, help="train, with segments: one rank's log-probabilities, kept there")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    args = parser.parse_args()
    if args.kind == "checkpoint":
        make_checkpoint(args.checkpoint, json.loads(args.config))
    elif args.kind == "sample":
        told = sample(args)
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(args.out.with_suffix(".json"), told)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
