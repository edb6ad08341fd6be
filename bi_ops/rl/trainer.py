"""The GRPO loop, top to bottom, with a bitwise check between sampling and training in every step."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bi_ops import optim, parallel
from bi_ops.core import replay
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.graphs import StepGraphs
from bi_ops.models.packing import PADDING, PackedBatch, common_distributions, pack
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.loss import Loss, Terms, check_finite, group_advantages, grpo_terms, token_weights
from bi_ops.rl.metrics import StepMetrics
from bi_ops.rl.microbatches import Pack, check_equal, microbatches
from bi_ops.rl.seeds import PROBLEM, SAMPLE, derive_seed
from bi_ops.rl.tasks import Problem, Task
from bi_ops.rollout.base import Completion, RolloutEngine, SamplingParams
from bi_ops.verify.parity import ParityReport, compare, joined

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.parallel.fsdp import FullySharded
    from bi_ops.parallel.peer import PeerAllReduce, PeerCopies


#: Tokens whose partial outputs peer memory holds at once; those of more are added one part after the other.
PEER_TOKENS = 8192


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
    """What one training pass over a rollout found. clip_scale: what the optimizer multiplies the gradients by."""

    loss: float
    kl: float
    clip_fraction: float
    grad_norm: float
    clip_scale: torch.Tensor


@contextlib.contextmanager
def naming_memory(step: int, doing: str, settings: str) -> Iterator[None]:
    """Memory that runs out inside the block is told with the settings that need less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise torch.OutOfMemoryError(
            f"train: step {step} ran out of memory in {doing} ({first}); go on with --resume and {settings}, which "
            "change no bit"
        ) from error


class Trainer:
    """Trains `model` on what `engine` samples from it, in the orders that the engine samples in.

    Args:
        reference: the frozen model of the KL term; needed where config.kl is not 0.
        on_difference: called with the difference when config.on_difference is "warn".
        ranks: the processes that share each batch; all do the same step and end in the same bytes. Their number changes
            no bit (`config.atoms`), nor does it whether each has the whole model or, with `config.fsdp`, a shard, or,
            of `config.tp` neighbours, a slice, or of `config.ep` neighbours some experts: then `model` is cut here.

    Raises:
        ValueError: a KL coefficient without a reference, an engine that states no orders, or one that should sleep and
            cannot, master weights offloaded from a model that does not compute in bf16, a model of other segments than
            config.segments, or ranks that do not divide the atoms, share the model or fill engines. With
            config.step_graphs as `bi_ops.models.graphs.StepGraphs` and `parallel.Ranks.check_captured`, with
            config.fsdp as `bi_ops.parallel.fsdp.FullySharded`, with config.ep as
            `bi_ops.parallel.experts.ExpertParallel`, with segments as `bi_ops.parallel.tensor.TensorParallel`.
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
        ranks: parallel.Ranks = parallel.ALONE,
    ) -> None:
        if config.kl != 0 and reference is None:
            raise ValueError(f"train: kl={config.kl} needs a reference model")
        if engine.orders is None:
            raise ValueError(
                f"train: the {engine.name} engine states no orders, so training could not have its bits; use it with "
                "the plugin"
            )
        if config.offload == "masters" and model.compute_dtype != torch.bfloat16:
            raise ValueError(
                f"train: offload='masters' leaves bf16 weights on the GPU, and the model computes in "
                f"{model.compute_dtype}; use offload='states'"
            )
        if config.sleep and not hasattr(engine, "sleep"):
            raise ValueError(f"train: sleep=True, but the {engine.name} engine has no sleep mode; leave sleep out")
        for m in (model, *([] if reference is None else [reference])):
            m.adopt(engine.orders)
        model.recompute = config.recompute
        if (segments := getattr(model, "segments", 1)) != config.segments:
            raise ValueError(f"train: segments={config.segments}, but the model was made with {segments}")
        self.ranks = ranks
        #: Those that share the model, and those that share the batch.
        self.tensor, self.data = ranks.split(config.tp)
        self._ranks_of_an_engine: int = getattr(engine, "tensor_parallel_size", 1)
        if ranks.size > 1 and ranks.size % self._ranks_of_an_engine:
            raise ValueError(
                f"train: {ranks.size} ranks do not fill engines of tensor_parallel_size={self._ranks_of_an_engine}; "
                "start a multiple"
            )
        replay.enable()  # what Python does for one layer's launches is not done again for the next
        self.config, self.model, self.engine, self.task, self.reference = config, model, engine, task, reference
        self.on_difference = on_difference
        self.graphs = self._graphs() if config.step_graphs else None
        self.layout = self._layout()
        self.parameters = list(self.layout.parameters.values())
        self._engine_weights = self._weights_of_engine()
        self.optimizer = self._optimizer()

    def _graphs(self) -> StepGraphs:
        """Of the micro-batches of this rank, which those that share the model have too."""
        self.tensor.check_captured(self.model.device)
        others = [] if self.reference is None else [self.reference]
        return StepGraphs(
            self.model, self._microbatch, others, on_any_rank=lambda changed: any(self.tensor.gather(changed))
        )

    def _layout(self) -> parallel.Whole | FullySharded:
        """Where weights, gradients and states are."""
        tree = parallel.order(self.config.atoms)
        allocate, keeps_memory = (None, False) if self.graphs is None else (self.graphs.begin, True)
        if self.config.segments > 1:
            from bi_ops.parallel.tensor import TensorParallel

            given = (self.model, tree, self.data, self.tensor, self.model.compute_dtype, self._peer_sums())
            return TensorParallel(*given, allocate, keeps_memory)
        if self.config.ep > 1:
            from bi_ops.parallel.experts import ExpertParallel

            near, far = self.ranks.split(self.config.ep)
            return ExpertParallel(self.model, tree, self.ranks, near, far, self.model.compute_dtype)
        if self.config.fsdp:
            from bi_ops.parallel.fsdp import FullySharded

            # Weights travel beside gradients, so by copies of their own.
            copies = self._peer_copies(2)
            make = iter(copies).__next__ if copies else None
            return FullySharded(
                *(self.model, tree, self.ranks, self.model.compute_dtype),
                exchange=make,
                reshard_after_forward=self.config.reshard_after_forward,
            )
        exchange = next(iter(self._peer_copies(1)), None)
        return parallel.Whole(self.model, tree, self.ranks, allocate, keeps_memory, exchange=exchange)

    def _peer_copies(self, n: int) -> list[PeerCopies]:
        """What the ranks that share the batch exchange by, so many times; none: collectives."""
        from bi_ops.parallel.peer import PeerCopies, over_peer_memory

        asked, ranks = self.config.peer_memory, self.ranks
        device = next(self.model.parameters()).device
        if asked is None and parallel.spans_hosts():
            return []
        made = over_peer_memory(lambda: [PeerCopies(ranks, device) for _ in range(n)], asked, ranks, device, "train")
        return made or []

    def _peer_sums(self) -> PeerAllReduce | None:
        """What adds over the ranks that share the model; None: collectives."""
        from bi_ops.parallel.peer import PeerAllReduce, over_peer_memory

        asked, ranks, device = self.config.peer_memory, self.tensor, self.model.device
        elements = PEER_TOKENS * self.model.config.hidden_size
        return over_peer_memory(lambda: PeerAllReduce(ranks, elements, device), asked, ranks, device, "train")

    def _weights_of_engine(self) -> dict[torch.Tensor, torch.Tensor]:
        """The engine's own weights by the parameters that are trained, where they may be written from here."""
        config = self.config
        if config.offload == "masters" or config.fsdp or config.tp > 1 or config.ep > 1:
            return {}  # the engine reads the model's bf16 weights; or a rank updates a part, and the engine has all
        if not hasattr(self.engine, "weight_copies"):
            return {}
        return {p: weight for p, weight in self.engine.weight_copies(self.model).items() if p.requires_grad}

    def _rounded_weights(self) -> dict[torch.Tensor, torch.Tensor]:
        """What forwards read in place of rounding masters again; none where memory is short. Shards always have them.

        The engine's own weights would do, but then no check would see that an engine has others.
        """
        config, dtype = self.config, getattr(self.model, "compute_dtype", torch.float32)
        is_short = not config.fsdp and (config.sleep or config.offload != "none" or config.recompute == "layer")
        return {} if is_short or dtype != torch.bfloat16 else self.layout.keep_rounded_weights(dtype)

    def _optimizer(self) -> optim.AdamW:
        config = self.config
        given = (self.parameters, config.lr, config.betas)
        if config.offload == "masters":  # the kernel writes the model's own bf16 weights, and the engine reads these
            return optim.OffloadedAdamW(*given, weight_decay=config.weight_decay, masters=True)
        # Weights are rounded in the pass that updates the masters.
        copies = self._engine_weights | self._rounded_weights()
        return (optim.OffloadedAdamW if config.offload == "states" else optim.AdamW)(
            *given, weight_decay=config.weight_decay, bf16_copies=copies
        )

    def step(self, step: int) -> StepMetrics:
        """One step, counted from 1: sample, score, check the bits, learn, hand the weights to the engine.

        Raises:
            DifferenceFound: a log-probability differs, including a NaN on either side, and config.on_difference is
                "stop"; nothing was learned.
            FloatingPointError: a reward, the loss or the gradient norm is not finite.
            torch.OutOfMemoryError: in sampling or in training, with the settings that need less.
        """
        started = time.perf_counter()
        config = self.config

        problems = self.problems(step)
        with naming_memory(step, "sampling", "--offload states or another --gpu-memory-utilization"):
            completions = self.generate([p.prompt for p in problems], self.sampling(step, problems))
        if config.sleep:
            self.engine.sleep()  # type: ignore[attr-defined]
        rewards = [p.reward(c.tokens) for p, c in zip(problems, completions, strict=True)]
        advantages = group_advantages(rewards, config.group_size)

        reports: list[ParityReport] = []

        def check(part: slice, logprobs: Sequence[torch.Tensor]) -> None:
            reports.append(self.check(step, completions, part, logprobs))

        smaller = "a smaller --max-tokens-per-microbatch, --recompute layer, --offload states or --sleep"
        with naming_memory(step, "training", smaller):
            result = self.backward(completions, advantages, check)
            report = joined(reports)
            self.optimizer.step(grad_scale=result.clip_scale)
            for _ in range(config.updates_per_rollout - 1):  # from here on the ratio is not 1, and the clip has work
                result = self.backward(completions, advantages)
                self.optimizer.step(grad_scale=result.clip_scale)
            self.update_engine(updated=True)

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
            grad_norm=result.grad_norm,
            kl=result.kl,
            clip_fraction=result.clip_fraction,
            response_length=sum(len(c.tokens) for c in completions) / len(completions),
            seconds=time.perf_counter() - started,
        )

    def update_engine(self, updated: bool = False) -> None:
        """Hand the weights to the engine. updated: the optimizer has rounded what it may write since they changed."""
        written = self._engine_weights if updated else {}
        rounded = self.optimizer.bf16_copies
        if behind := [p for p, weight in written.items() if rounded[p] is not weight]:
            torch._foreach_copy_([written[p] for p in behind], [rounded[p] for p in behind])
        with self.layout.gathered():
            if written:
                self.engine.update_weights(self.model, written=written)  # type: ignore[call-arg]
            else:
                self.engine.update_weights(self.model)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Completions of all requests on every rank. Each engine samples a share, whose bits depend on no other."""
        if self.ranks.size == 1:
            return self.engine.generate(prompts, params)
        size = self._ranks_of_an_engine
        n_engines, engine = self.ranks.size // size, self.ranks.rank // size
        found = self.engine.generate(prompts[engine::n_engines], params[engine::n_engines])
        shares = self.ranks.gather(found)[::size]
        return [shares[i % n_engines][i // n_engines] for i in range(len(prompts))]

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

        The host waits for the GPU once, when everything has been launched. `check` then sees the log-probabilities of
        each pack (the completions `part`, fp32, on the CPU) before its loss is looked at: a NaN is reported as a
        difference at a token, not as a loss.

        Their bits do not depend on where packs end: a token's weight in the loss is that of the whole batch, units of
        sequences are padded to the step in which tokens are summed, and every sum is carried on from one pack to the
        next. Nor do they depend on the number of ranks: each has some of the atoms, whose sums are added by the tree.
        """
        config, ranks, device = self.config, self.data, self.parameters[0].device
        lengths = [len(c.tokens) for c in completions]
        weights = token_weights(lengths, config.mean)
        per_token = advantages.repeat_interleave(torch.tensor(lengths))
        rollout = torch.cat([c.logprobs for c in completions])
        totals = [len(c.prompt) + len(c.tokens) for c in completions]
        unit = self.model.unit_tokens  # what the sums' bits depend on, and the size of a pack does not
        # All copies to the GPU come first: each of them waits for what was launched before.
        if ranks.size > 1:
            self.layout.begin_step(torch.tensor(sorted({PADDING}.union(*(c.prompt + c.tokens for c in completions)))))
        rollout, per_token, weights = (t.to(device) for t in (rollout, per_token, weights))
        atoms: list[list[tuple[slice, PackedBatch, Callable[[], tuple[torch.Tensor, ...]]]]] = []
        cuts = [self._cut(totals, atom) for atom in parallel.cut(totals, config.atoms)]
        for cut in cuts[ranks.rank :: ranks.size]:
            atoms.append([])
            for part in cut:
                prompts, tokens = [c.prompt for c in completions[part]], [c.tokens for c in completions[part]]
                distributions = common_distributions([c.distribution for c in completions[part]])
                batch = pack(prompts, tokens, device, TOKEN_STEP, distributions, unit)
                start = sum(lengths[: part.start])
                rows = slice(start, start + len(batch.targets))
                inputs = batch, rollout[rows], per_token[rows], weights[rows]
                if self.graphs is None:
                    atoms[-1].append((part, batch, functools.partial(self._microbatch, *inputs)))
                else:
                    atoms[-1].append((part, batch, functools.partial(self.graphs.run, self.graphs.pad(*inputs))))

        found: list[torch.Tensor] = []
        losses: list[Loss] = []
        for i, atom_batches in enumerate(atoms):
            self.layout.begin_atom()
            passes = [launch for *_, launch in atom_batches]
            if config.fsdp or config.ep > 1:  # all ranks gather weights, or exchange rows, as often
                most = max(len(cut) for cut in cuts[i * ranks.size :][: ranks.size])
                most = max(most, int(config.fsdp))  # what a rank adds leaves behind a backward, zeros too
                idle = functools.partial(self._idle, completions, rollout)
                passes = [idle] * (most - len(passes)) + passes
            for n, launch in enumerate(passes, 1):
                self.layout.before_backward(last=n == len(passes))
                own, *parts = launch()
                if n > len(passes) - len(atom_batches):
                    found.append(own)
                    losses.append(Terms(*parts).sum())
            self.layout.end_atom()
        norm = self.layout.finish()
        numbers = torch.stack([t for terms in losses for t in (terms.value, terms.kl, terms.clip_fraction)] + [norm])
        every = torch.cat([*found, numbers]).cpu()  # the one wait

        scores = every[: -len(numbers)]
        *sums, grad_norm = every[-len(numbers) :].tolist()
        mine = []
        batches = [each for atom_batches in atoms for each in atom_batches]
        for i, ((part, batch, _), terms) in enumerate(zip(batches, losses, strict=True)):
            own, scores = scores[: len(batch.targets)], scores[len(batch.targets) :]
            value, kl, clip_fraction = sums[3 * i : 3 * i + 3]
            n_bad = 0 if math.isfinite(value) else int(terms.bad)
            mine.append(Pack(part, batch.split(own), value, kl, clip_fraction, n_bad, terms.n_tokens))
        shared = self.ranks.gather((mine, grad_norm))
        # Ranks that share the model have the same packs, neighbours one after the other: the check sees one of each.
        found_by = [[each for theirs, _ in shared[i :: config.tp] for each in theirs] for i in range(config.tp)]
        packs = sorted(found_by[0], key=lambda each: each.part.start)
        for each in packs:
            check(each.part, each.scores)
        for i, others in enumerate(found_by[1:], 1):
            check_equal(found_by[0], others, i)
        for each in packs:
            check_finite(each.loss, each.n_bad, each.n_tokens)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"train: the gradient norm is {grad_norm}; lower the learning rate")
        if {norm for _, norm in shared} != {grad_norm}:
            raise RuntimeError(f"train: ranks have other gradients, of norms {[norm for _, norm in shared]}")
        loss, kl, clip_fraction = (sum(getattr(p, n) for p in packs) for n in ("loss", "kl", "clip_fraction"))
        return _Pass(loss, kl, clip_fraction, grad_norm, optim.clip_scale(norm, config.max_grad_norm))

    def _cut(self, totals: Sequence[int], atom: slice) -> list[slice]:
        """The micro-batches of an atom; totals: the tokens of each sequence of the batch."""
        within = microbatches(totals[atom], self.config.max_tokens_per_microbatch, self.model.unit_tokens)
        return [slice(atom.start + part.start, atom.start + part.stop) for part in within]

    def _idle(self, completions: Sequence[Completion], rollout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A pass over the batch's shortest sequence that adds zeros, which change no sum; rollout: of the whole batch.

        A rank makes it where others have a micro-batch more: all gather weights together.
        """
        at = min(range(len(completions)), key=lambda i: len(completions[i].prompt) + len(completions[i].tokens))
        c = completions[at]
        distributions = common_distributions([c.distribution])
        batch = pack([c.prompt], [c.tokens], rollout.device, TOKEN_STEP, distributions, self.model.unit_tokens)
        start = sum(len(c.tokens) for c in completions[:at])
        own = rollout[start : start + len(c.tokens)]
        return self._microbatch(batch, own, torch.zeros_like(own), torch.zeros_like(own))

    def _microbatch(
        self, batch: PackedBatch, rollout: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The log-probabilities of a pack, then the `Terms` of its loss, whose backward has been launched.

        All are [S], and none has a graph. Nothing here waits for the GPU, so that a CUDA graph can hold it.
        """
        config, reference = self.config, None
        scores = self.model.token_logprobs(batch)
        if self.reference is not None and config.kl != 0:
            with torch.no_grad():
                reference = self.reference.token_logprobs(batch)
        terms = grpo_terms(scores, rollout, advantages, weights, clip=config.clip, kl=config.kl, reference=reference)
        terms.backward()
        return scores.detach(), terms.loss.detach(), *terms[1:]

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
