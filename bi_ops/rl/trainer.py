"""The GRPO loop, top to bottom, with a bitwise check between sampling and training in every step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.packing import common_distributions, pack
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.loss import group_advantages, grpo_loss, ordered_sum, token_weights
from bi_ops.rl.metrics import StepMetrics
from bi_ops.rl.seeds import PROBLEM, SAMPLE, derive_seed
from bi_ops.rl.tasks import Problem, Task
from bi_ops.rollout.base import Completion, RolloutEngine, SamplingParams
from bi_ops.verify.parity import ParityReport, compare, joined

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM


class DifferenceFound(RuntimeError):
    """A rollout log-probability and the training one have different bits.

    report: the comparison of the micro-batch in which it was found. record: what a bug report needs, for JSON.
    """

    def __init__(self, step: int, report: ParityReport, completions: Sequence[Completion], engine: dict[str, Any]):
        super().__init__(f"step {step}: rollout and training log-probabilities differ; {report}")
        self.report = report
        first = report.first_difference
        assert first is not None
        self.record = {
            "step": step,
            "tokens_checked": report.tokens_checked,
            "tokens_different": report.tokens_different,
            "max_delta": report.max_delta,
            "mean_delta": report.mean_delta,
            "sequence": first.sequence,
            "position": first.position,
            "token": first.token,
            "rollout": first.rollout,
            "training": first.training,
            "prompt": list(completions[first.sequence].prompt),
            "completion": list(completions[first.sequence].tokens),
            "engine": engine,
        }


@dataclass(frozen=True)
class _Pass:
    """What one training pass over a rollout found."""

    loss: float
    kl: float
    clip_fraction: float


def microbatches(lengths: Sequence[int], max_tokens: int | None) -> Iterator[slice]:
    """Consecutive sequences in packs of at most `max_tokens` tokens; a longer sequence is a pack of its own."""
    start = tokens = 0
    for i, n in enumerate(lengths):
        if max_tokens is not None and i > start and tokens + n > max_tokens:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += n
    yield slice(start, len(lengths))


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns the norm before.

    `torch.nn.utils.clip_grad_norm_` with the order of its sum fixed.

    Raises:
        FloatingPointError: the norm is NaN or infinite.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = ordered_sum(torch.stack([ordered_sum(g.float().square()) for g in grads])).sqrt()
    value = float(norm)
    if not value < float("inf"):
        raise FloatingPointError(f"train: the gradient norm is {value}; lower the learning rate")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale.to(g.dtype))
    return value


class Trainer:
    """Trains `model` on what `engine` samples from it, in the orders that the engine samples in.

    Args:
        reference: the frozen model of the KL term; needed where config.kl is not 0.
        on_difference: called with the difference when config.on_difference is "warn".

    Raises:
        ValueError: a KL coefficient without a reference, or an engine that states no orders.
        RuntimeError: the model cannot compute in the engine's orders here; what differs is listed.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: CausalLM,
        engine: RolloutEngine,
        task: Task,
        reference: CausalLM | None = None,
        on_difference: Callable[[DifferenceFound], None] = lambda difference: None,
    ) -> None:
        if config.kl != 0 and reference is None:
            raise ValueError(f"train: kl={config.kl} needs a reference model")
        if engine.orders is None:
            raise ValueError(
                f"train: the {engine.name} engine states no orders, so training could not have its bits; use it with "
                "the plugin"
            )
        for m in (model, *([] if reference is None else [reference])):
            m.adopt(engine.orders)
        model.recompute = config.recompute
        self.config, self.model, self.engine, self.task, self.reference = config, model, engine, task, reference
        self.on_difference = on_difference
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=False
        )

    def step(self, step: int) -> StepMetrics:
        """One step, counted from 1: sample, score, check the bits, learn, hand the weights to the engine.

        Raises:
            DifferenceFound: a log-probability differs, including a NaN on either side, and config.on_difference is
                "stop"; nothing was learned.
            FloatingPointError: a reward, the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        config = self.config

        problems = self.problems(step)
        completions = self.engine.generate([p.prompt for p in problems], self.sampling(step, problems))
        rewards = [p.reward(c.tokens) for p, c in zip(problems, completions, strict=True)]
        advantages = group_advantages(rewards, config.group_size)

        reports: list[ParityReport] = []

        def check(part: slice, logprobs: Sequence[torch.Tensor]) -> None:
            reports.append(self.check(step, completions, part, logprobs))

        result = self.backward(completions, advantages, check)
        report = joined(reports)
        grad_norm = clip_gradients(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        for _ in range(config.updates_per_rollout - 1):  # from here on the ratio is not 1, and the clip has work
            result = self.backward(completions, advantages)
            grad_norm = clip_gradients(self.parameters, config.max_grad_norm)
            self.optimizer.step()
        self.engine.update_weights(self.model)

        mean = sum(rewards) / len(rewards)
        return StepMetrics(
            step=step,
            reward_mean=mean,
            reward_std=(sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
            tokens_checked=report.tokens_checked,
            tokens_different=report.tokens_different,
            max_delta=report.max_delta,
            mean_delta=report.mean_delta,
            loss=result.loss,
            grad_norm=grad_norm,
            kl=result.kl,
            clip_fraction=result.clip_fraction,
            response_length=sum(len(c.tokens) for c in completions) / len(completions),
            seconds=time.perf_counter() - started,
        )

    def problems(self, step: int) -> list[Problem]:
        """prompts_per_step problems, each group_size times in a row."""
        seed, out = self.config.seed, []
        for prompt in range(self.config.prompts_per_step):
            problem = self.task.sample(random.Random(derive_seed(seed, PROBLEM, step, prompt)))
            out += [problem] * self.config.group_size
        return out

    def sampling(self, step: int, problems: Sequence[Problem]) -> list[SamplingParams]:
        """One request per sequence, its randomness fixed by (seed, step, prompt, sample)."""
        size = self.config.group_size
        return [
            SamplingParams(
                max_new_tokens=problem.answer_tokens,
                temperature=self.config.temperature,
                seed=derive_seed(self.config.seed, SAMPLE, step, i // size, i % size),
                top_k=self.config.top_k,
                top_p=self.config.top_p,
                min_p=self.config.min_p,
            )
            for i, problem in enumerate(problems)
        ]

    def backward(
        self,
        completions: Sequence[Completion],
        advantages: torch.Tensor,
        check: Callable[[slice, Sequence[torch.Tensor]], None] = lambda part, logprobs: None,
    ) -> _Pass:
        """Fill the gradients with those of the batch's loss, pack by pack in order.

        `check` sees the log-probabilities of each pack (the completions `part`, fp32, on the CPU) before its loss is
        taken: a NaN is reported as a difference at a token, not as a loss.

        Their bits do not depend on where packs end: a token's weight in the loss is that of the whole batch, sequences
        are padded to the step in which tokens are summed, and every sum is carried on from one pack to the next.
        """
        config, device = self.config, self.parameters[0].device
        lengths = [len(c.tokens) for c in completions]
        weights = token_weights(lengths, config.mean)
        per_token = advantages.repeat_interleave(torch.tensor(lengths))
        rollout = torch.cat([c.logprobs for c in completions])

        self.optimizer.zero_grad(set_to_none=True)
        self.model.allocate_main_grads()
        loss, kl, clip_fraction, at = 0.0, 0.0, 0.0, 0
        totals = [len(c.prompt) + len(c.tokens) for c in completions]
        for part in microbatches(totals, config.max_tokens_per_microbatch):
            prompts, tokens = [c.prompt for c in completions[part]], [c.tokens for c in completions[part]]
            distributions = common_distributions([c.distribution for c in completions[part]])
            batch = pack(prompts, tokens, device, align=TOKEN_STEP, distributions=distributions)
            scores = self.model.token_logprobs(batch)
            check(part, batch.split(scores.detach().cpu()))
            reference = None
            if self.reference is not None and config.kl != 0:
                with torch.no_grad():
                    reference = self.reference.token_logprobs(batch)
            rows = slice(at, at := at + scores.shape[0])
            terms = grpo_loss(
                scores,
                rollout[rows].to(device),
                per_token[rows].to(device),
                weights[rows].to(device),
                clip=config.clip,
                kl=config.kl,
                reference=reference,
            )
            terms.value.backward()
            loss += float(terms.value.detach())
            kl += float(terms.kl)
            clip_fraction += float(terms.clip_fraction)
        self.model.collect_main_grads()
        return _Pass(loss, kl, clip_fraction)

    def check(
        self, step: int, completions: Sequence[Completion], part: slice, logprobs: Sequence[torch.Tensor]
    ) -> ParityReport:
        """Compare the bits of `part`'s log-probabilities; on a difference do as config.on_difference says."""
        members = completions[part]
        report = compare([c.logprobs for c in members], logprobs, [c.tokens for c in members], part.start)
        if not report.identical:
            difference = DifferenceFound(step, report, completions, self.engine.describe())
            if self.config.on_difference == "stop":
                raise difference
            self.on_difference(difference)
        return report
