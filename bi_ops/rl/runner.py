"""A run: its folder, its model and engine, its steps, its final weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bi_ops import parallel
from bi_ops.core.files import LOCK, locked, write_json, writing
from bi_ops.core.orders import OrderRecord
from bi_ops.models.config_fields import read_config
from bi_ops.optim import OffloadedAdamW
from bi_ops.rl import checkpoint
from bi_ops.rl.config import TrainConfig
from bi_ops.rl.metrics import MetricsWriter, StepMetrics, read_metrics
from bi_ops.rl.seeds import INIT, derive_seed
from bi_ops.rl.tasks import Alphabet, make_task
from bi_ops.rl.trainer import DifferenceFound, Trainer
from bi_ops.rollout import factory
from bi_ops.rollout.base import RolloutEngine

if TYPE_CHECKING:
    import torch

    from bi_ops.models.base import CausalLM
    from bi_ops.parallel.tensor import TensorParallel

#: Names inside a run's folder.
CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"
INITIAL, FINAL, SUMMARY, DIFFERENCE, ORDERS = "model", "final", "summary.json", "difference.json", "orders.json"


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. reward_first, reward_last: mean reward of its first and last five steps.

    max_delta is infinite where a log-probability was NaN on one side; summary.json says null then.
    """

    steps: int
    reward_first: float
    reward_last: float
    tokens_checked: int
    tokens_different: int
    max_delta: float
    seconds: float
    weights_sha256: str
    engine: dict[str, Any]


def check_folder(output: Path, config: TrainConfig, resume: bool) -> None:
    """Raises as `prepare_folder`, unless this run may have the folder."""
    path = output / CONFIG
    if resume:
        if not path.exists():
            raise FileNotFoundError(f"train: {output} holds no run to resume (no {CONFIG}); leave --resume out")
        config.check_resumes(TrainConfig.from_file(path))
    elif output.exists() and (not output.is_dir() or any(p.name != LOCK for p in output.iterdir())):
        raise FileExistsError(
            f"train: {output} already holds {'another run' if path.exists() else 'files'}; "
            "choose another output folder, or resume the run with --resume"
        )


@contextlib.contextmanager
def prepare_folder(output: Path, config: TrainConfig, resume: bool) -> Iterator[None]:
    """Make `output` the folder of this run, and of no other while the block lasts.

    Raises:
        FileExistsError: it holds files and `resume` is False, or a run that goes on. FileNotFoundError: `resume`, and
            no run is there. ValueError: `resume`, and the run there has other settings. OSError: it cannot be written.
    """
    check_folder(output, config, resume)
    with contextlib.ExitStack() as held:
        with writing("train", output, lambda: "make room there, or choose another output folder"):
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked("train", output))
            check_folder(output, config, resume)  # nobody else was in between
            write_json(output / CONFIG, config.to_dict())
        yield


def abandon_folder(output: Path) -> None:
    """Take back what a run that could not start has written, so that the corrected command may use the folder."""
    for name in (CONFIG, LOCK):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / INITIAL, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody else's files, or the current folder
        output.rmdir()


def initial_model(config: TrainConfig, output: Path) -> Path:
    """The checkpoint training starts from: config.model, or random weights written to `output`/model.

    Raises:
        FileNotFoundError: config.model is not a checkpoint's folder. ValueError: an unknown architecture, or one that
            its model cannot have.
    """
    if config.model is not None:
        read_config(config.model)
        return Path(config.model)
    path = output / INITIAL
    if not (path / "config.json").is_file():
        from bi_ops.models import make_model

        model = make_model(config.architecture)
        model.init_weights(derive_seed(config.seed, INIT))
        with writing("train", output, lambda: "make room there, or choose another output folder"):
            model.save_pretrained(path)
    return path


def load_model_and_engine(config: TrainConfig, path: Path) -> tuple[CausalLM, RolloutEngine]:
    """The trained model (fp32 master weights) and the engine that samples from it."""
    from bi_ops.models import load_model

    model = load_model(path, **config.model_options()) if factory.lookup(config.engine).needs_model else None
    engine = factory.make_engine(config.engine, path, model, **config.engine_options())
    return load_model(path, **config.model_options()) if model is None else model, engine


def make_alphabet(config: TrainConfig, path: Path, vocab_size: int) -> Alphabet:
    """The tokenizer's symbols where the checkpoint has one, plain integers otherwise."""
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        return Alphabet.from_tokenizer(tokenizer, config.symbols)
    return Alphabet.integers(vocab_size, config.symbols)


def run(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    on_difference: Callable[[DifferenceFound], None] = lambda difference: None,
    ranks: parallel.Ranks = parallel.ALONE,
) -> Summary:
    """Train, from the beginning or from the latest checkpoint of `output`.

    Leaves in `output`: config.json, orders.json, metrics.jsonl, tensorboard/, checkpoints/, final/ (a Hugging Face
    checkpoint) and summary.json. A resumed run ends in the same bytes as one that was never interrupted.

    ranks: the processes that share each batch, which all make this call. The first one writes; `output` must be a
    folder that all of them read.

    Raises:
        DifferenceFound: rollout and training differ in some bit; the report is in `output`/difference.json too.
        FileExistsError, FileNotFoundError, ValueError: as `prepare_folder`, `initial_model`; bad settings; a run that
            is resumed in other orders than it was computed in.
        OSError: the disk is full, or `output` cannot be written. torch.OutOfMemoryError: naming what needs less memory
            and changes no bit.
        FloatingPointError: a reward, the loss or a gradient is not finite.
        RankLost: another rank has ended, or raised (`bi_ops.parallel.watched`).
    """
    with parallel.watched(ranks):
        return _run(config, Path(output), resume, on_step, on_difference, ranks)


def _run(
    config: TrainConfig,
    output: Path,
    resume: bool,
    on_step: Callable[[StepMetrics], None],
    on_difference: Callable[[DifferenceFound], None],
    ranks: parallel.Ranks,
) -> Summary:
    """`run`, of ranks that are watched."""
    with contextlib.ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(prepare_folder(output, config, resume)))
        try:
            trainer = set_up(config, output, on_difference, ranks)
        except BaseException:
            if not resume and ranks.rank == 0:
                abandon_folder(output)
            raise
        held.callback(trainer.engine.close)
        if trainer.graphs is not None:
            held.callback(trainer.graphs.release)  # before process groups end
        ranks.on_first(lambda: keep_orders(trainer, output))
        done = restore(trainer, output) if resume else 0
        train(trainer, output, done, on_step)
        weights = trainer.layout.collected()
        return ranks.on_first(lambda: finish(trainer, output, weights))


def finish(trainer: Trainer, output: Path, weights: dict[str, torch.Tensor] | None = None) -> Summary:
    """Write the final weights and the summary. weights: whole ones, where the model has shards."""
    if isinstance(trainer.optimizer, OffloadedAdamW):
        trainer.optimizer.restore()  # the masters are what is saved
    with writing("train", output, lambda: how_to_go_on(output)):
        if weights is None:
            trainer.model.save_pretrained(output / FINAL)
        else:
            trainer.model.save_pretrained(output / FINAL, parameters=weights)
        summary = summarize(output, trainer.engine)
        write_json(output / SUMMARY, dataclasses.asdict(summary))
    return summary


def how_to_go_on(output: Path) -> str:
    """What to do when the disk is full or read-only, and from where the run then goes on."""
    latest = checkpoint.latest(output / CHECKPOINTS)
    return f"make room there, then --resume goes on from {'the beginning' if latest is None else latest.name}"


def set_up(
    config: TrainConfig,
    output: Path,
    on_difference: Callable[[DifferenceFound], None],
    ranks: parallel.Ranks = parallel.ALONE,
) -> Trainer:
    """The trainer of a run, its engine started; nothing stays open where that fails."""
    path = ranks.on_first(lambda: initial_model(config, output))
    model, engine = load_model_and_engine(config, path)
    try:
        if config.tp == 1:
            model.warmup()
        reference = None
        if config.kl != 0:
            reference = type(model).from_pretrained(path, **config.model_options()).requires_grad_(False)
        task = make_task(config.task, make_alphabet(config, path, model.config.vocab_size), config.max_new_tokens)
        trainer = Trainer(config, model, engine, task, reference, on_difference, ranks)
        if config.tp > 1:
            cast("TensorParallel", trainer.layout).warmup()  # of slices
        return trainer
    except BaseException:
        engine.close()
        raise


def orders_of(trainer: Trainer) -> dict[str, Any]:
    """The record of a run: the orders of its rollouts, and those of training, gradients included."""
    assert trainer.engine.orders is not None  # or there was no trainer
    training = trainer.model.orders(training=True)
    if trainer.layout.tree.atoms > 1:  # one atom is the order that runs had before there were atoms
        tree = OrderRecord.of(training.arch, {"gradients": trainer.layout.tree})
        training = OrderRecord(training.arch, {**training.orders, **tree.orders})
    return {"rollout": trainer.engine.orders.as_dict(), "training": training.as_dict()}


def check_orders(trainer: Trainer, earlier: dict[str, Any], where: Path) -> None:
    """Raise ValueError, listing what differs, unless the trainer computes in the orders that `where` records."""
    now, differences = orders_of(trainer), []
    for side in now:
        before = OrderRecord.from_dict(earlier.get(side, {}))
        differences += [f"{side} {d}" for d in before.differences(OrderRecord.from_dict(now[side]))]
    if differences:
        raise ValueError(
            f"train: cannot resume, {where} was computed in other orders (those first): {'; '.join(differences)}. "
            "Resume on the architecture, libraries and attention backend of the run, or start another one from its "
            "weights"
        )


def keep_orders(trainer: Trainer, output: Path) -> None:
    """Write the run's orders into its folder; what is there already must be equal. Raises as `check_orders`."""
    path = output / ORDERS
    if path.exists():
        check_orders(trainer, json.loads(path.read_text(encoding="utf-8")), path)
    else:
        write_json(path, orders_of(trainer))


def restore(trainer: Trainer, output: Path) -> int:
    """Put the latest checkpoint into the trainer and its engine; returns the last step done (0: none saved)."""
    latest = trainer.ranks.on_first(lambda: checkpoint.latest(output / CHECKPOINTS))
    if latest is None:
        return 0
    state = checkpoint.load(latest, trainer.model, trainer.optimizer, trainer.layout.rows(), trainer.ranks)
    if "orders" in state:  # a checkpoint of an earlier release has none
        check_orders(trainer, state["orders"], latest)
    trainer.update_engine()
    return int(state["step"])


def save(trainer: Trainer, output: Path, step: int) -> None:
    """Write the checkpoint of a step, each rank what it has."""
    config = trainer.config
    extra = {"config": config.to_dict(), "seed": config.seed, "orders": orders_of(trainer)}
    where = output / CHECKPOINTS, step, trainer.model, trainer.optimizer, extra, trainer.ranks
    checkpoint.save(*where, trainer.layout.rows(), trainer.layout.writes)


def train(trainer: Trainer, output: Path, done: int, on_step: Callable[[StepMetrics], None]) -> None:
    """Steps done + 1 to config.steps, with metrics and checkpoints."""
    config, writes = trainer.config, trainer.ranks.rank == 0
    metrics = None
    if writes:
        (output / DIFFERENCE).unlink(missing_ok=True)  # of a run that is resumed
        metrics = MetricsWriter(output, after_step=done)
    try:
        for step in range(done + 1, config.steps + 1):
            record = trainer.step(step)
            with writing("train", output, lambda: how_to_go_on(output)):
                if metrics is not None:
                    metrics.write(record)
                if config.save_every and step % config.save_every == 0:
                    save(trainer, output, step)
            if metrics is not None:
                on_step(record)
    except DifferenceFound as difference:
        if writes:
            write_json(output / DIFFERENCE, difference.record)
        raise
    finally:
        if metrics is not None:
            metrics.close()


def summarize(output: Path, engine: RolloutEngine) -> Summary:
    """The summary of a run from its metrics and final weights."""
    records = read_metrics(output / METRICS)
    rewards = [r["reward_mean"] for r in records]
    return Summary(
        steps=len(records),
        reward_first=sum(rewards[:5]) / len(rewards[:5]),
        reward_last=sum(rewards[-5:]) / len(rewards[-5:]),
        tokens_checked=sum(r["tokens_checked"] for r in records),
        tokens_different=sum(r["tokens_different"] for r in records),
        max_delta=max(math.inf if r["max_delta"] is None else r["max_delta"] for r in records),
        seconds=sum(r["seconds"] for r in records),
        weights_sha256=checkpoint.sha256_of_weights(output / FINAL),
        engine=engine.describe(),
    )
