"""One side of one job of bench/layout_costs.py, on the ranks that torchrun has started: milliseconds, as they come."""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layouts_worker import LibraryAllReduce, NaiveSum, free
from library_sums import LibrarySums, NoSums
from profiles import profiled
from record import take_shortcuts
from rollout_worker import FIRST_TOKEN, Sampler, prompt
from step_sides import LR, MAX_NORM, SEED, from_graphs, made_network, shape, theirs, wait

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from bi_ops import optim, parallel
from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.graphs import StepGraphs
from bi_ops.models.packing import PADDING, PackedBatch, pack
from bi_ops.parallel.fsdp import FullySharded, local_rows
from bi_ops.parallel.gradients import Collectives, Exchange
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.peer import PeerAllReduce, PeerCopies
from bi_ops.parallel.tensor import OrderedAllReduce, TensorParallel

#: Of decoding, and prompts that are prefilled together.
BATCHES, PROMPTS = (1, 8, 64, 256), (1, 4)
WARM = 2
#: Whole gradients are exchanged behind the backward: no micro-batch is said to be the last.
AT_END = "ordered, at the end"
COPIES = "peer copies"


class NoSum(parallel.GradientTree):
    """Nothing is added: a rank goes on with its own gradients."""

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        self._totals = list(gradients)


def no_all_reduce(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nothing is added."""
    return partial.to(dtype)


class Found:
    """Milliseconds of each side and of each of its measures, written whenever there are new ones; why a side failed."""

    def __init__(self, path: Path, ranks: parallel.Ranks) -> None:
        self._path, self._first = path, ranks.rank == 0
        self._ms: dict[str, dict[str, float]] = {}
        self._failed: dict[str, str] = {}

    def add(self, side: str, measure: str, seconds: Sequence[float]) -> None:
        self._ms.setdefault(side, {})[measure] = round(1e3 * statistics.median(seconds), 4)
        self._write()

    def fails(self, side: str, why: str) -> None:
        self._failed[side] = why
        self._write()

    def _write(self) -> None:
        if self._first:
            write_json(self._path, {"ms": self._ms, "failed": self._failed})


def in_turn(
    steps: Mapping[str, Callable[[], None]], n: int, ranks: parallel.Ranks, profile: Path | None = None
) -> dict[str, list[float]]:
    """Seconds of `n` steps of each side, of the slowest rank, after some that warm up; sides take turns.

    profile: what the names of files begin with that the first rank writes of the first side (`profiles.profiled`).
    """
    times: dict[str, list[float]] = {side: [] for side in steps}
    for i in range(WARM + n):
        for side, step in steps.items():
            wait()
            ranks.gather(None)  # all begin together
            began = wait()
            step()
            times[side].append(wait() - began)
        if i == WARM - 1:
            gc.freeze()  # or the time of a step depends on how many objects there are to look at
    if profile is not None:
        side, step = next(iter(steps.items()))
        profiled(
            step, profile.with_name(f"{profile.name}.{side.replace(', ', '-').replace(' ', '-')}"), ranks.rank == 0
        )
    every = ranks.gather(times)
    return {side: [max(each) for each in zip(*(t[side] for t in every), strict=True)][WARM:] for side in steps}


def rows_of(args: argparse.Namespace, rank: int) -> list[torch.Tensor]:
    """Random tokens, others on each rank that shares the batch."""
    generator = torch.Generator().manual_seed(SEED + rank)
    n = args.tokens // args.seqlen
    rows = torch.randint(shape(args.model)["vocab_size"], (n, args.seqlen), generator=generator)
    return list(rows.to(runtime.default_device()))


def packed(rows: Sequence[torch.Tensor], device: torch.device) -> PackedBatch:
    """Every token but a sequence's first is scored."""
    ids = [row.tolist() for row in rows]
    return pack([row[:1] for row in ids], [row[1:] for row in ids], device, align=TOKEN_STEP)


def ours(args: argparse.Namespace, found: Found, ranks: parallel.Ranks) -> None:
    """Steps of bi_ops' layouts: sums in the order, by a library, and none."""
    tensor, data = ranks.split(args.tp)
    network = made_network(args.model, args.layers, "selective", args.tp)
    tree = parallel.order(data.size)
    batch = packed(rows_of(args, data.rank), network.device)
    every = [row.cpu() for rank in range(data.size) for row in rows_of(args, rank)]
    ids = torch.cat([torch.tensor([PADDING]), *every]).unique()
    replays: dict[str, Callable[[], None]] = {}
    now = ""
    if args.tp == 1:
        network.warmup()
    layout: parallel.Whole | FullySharded
    if args.tp > 1:
        graphs, replay = from_graphs(network, batch)
        allocate = lambda: (graphs.begin if now in replays else network.allocate_main_grads)()  # noqa: E731
        layout = TensorParallel(network, tree, data, tensor, network.compute_dtype, allocate=allocate)
        layout.warmup()
        sums = tensor_sums(layout, args, found)
        replays = {f"{side}, graphs": sums[side] for side in ("peer memory", "no sums") if side in sums}
    elif args.fsdp:
        layout = FullySharded(network, tree, ranks, network.compute_dtype, reshard_after_forward=not args.kept)
        sums = shard_sums(layout, found)
    else:
        layout = parallel.Whole(network, tree, ranks)
        sums = whole_sums(layout, found)
    rounded = layout.keep_rounded_weights(torch.bfloat16)  # as in training
    optimizer = optim.AdamW(list(layout.parameters.values()), lr=LR, bf16_copies=rounded)

    def step(side: str, take: Callable[[], None]) -> None:
        nonlocal now
        now = side
        take()
        layout.begin_step(ids)
        layout.begin_atom()
        layout.before_backward(last=side != AT_END)
        if side in replays:
            replay()
        else:
            network.token_logprobs(batch).mean().backward()
        layout.end_atom()
        optimizer.step(grad_scale=optim.clip_scale(layout.finish(), MAX_NORM))

    def timed(sides: Mapping[str, Callable[[], None]]) -> None:
        steps = {side: lambda side=side, take=take: step(side, take) for side, take in sides.items()}  # type: ignore[misc]
        for side, seconds in in_turn(steps, args.steps, ranks, args.profile).items():
            found.add(side, "step", seconds)

    timed(sums)
    if type(layout) is parallel.Whole:
        layout.early.remove_hooks()  # which a replay would not call
        graphs, replay = from_graphs(network, batch)
        layout = parallel.Whole(network, tree, ranks, graphs.begin, keeps_memory=True)
        sums = whole_sums(layout, found)
        replays = {f"{side}, graphs": sums[side] for side in ("ordered", COPIES, "no sums") if side in sums}
    for side, take in replays.items():  # one after the other: each has graphs and memory of its own
        free()
        try:
            timed({side: take})
        except RuntimeError as error:
            found.fails(side, f"{error}: {error.__cause__}")
            break
        finally:
            graphs.release()


def tensor_sums(layout: TensorParallel, args: argparse.Namespace, found: Found) -> dict[str, Callable[[], None]]:
    """How partial outputs are added over the ranks that share the model."""
    tensor, network = layout.tensor, layout.model
    sums: dict[str, Any] = {"ordered": OrderedAllReduce(tensor), "library sums": LibraryAllReduce(tensor)}
    sums["no sums"] = no_all_reduce
    elements: int = args.tokens * network.config.hidden_size  # type: ignore[union-attr, operator, assignment]
    try:
        sums["peer memory"] = (
            OrderedAllReduce(tensor) if runtime.INTERPRET else PeerAllReduce(tensor, elements, runtime.default_device())
        )
    except RuntimeError as error:
        found.fails("peer memory", str(error))

    def take(add: Any) -> None:
        for layer in layout.shared:
            layer.all_reduce = add

    return {side: lambda add=add: take(add) for side, add in sums.items()}  # type: ignore[misc]


def peer_copies(ranks: parallel.Ranks, found: Found) -> Exchange | None:
    """None: the GPUs do not reach each other, or the host's memory stands in for theirs."""
    try:
        return Collectives(ranks) if runtime.INTERPRET else PeerCopies(ranks, runtime.default_device())
    except RuntimeError as error:
        found.fails(COPIES, str(error))
        return None


def shard_sums(layout: FullySharded, found: Found) -> dict[str, Callable[[], None]]:
    """How shards of gradients are added, and weights gathered; a rank has one atom."""
    ranks = layout.ranks
    gathers: dict[str, Exchange] = {}
    kinds: dict[str, Exchange] = {"ordered": Collectives(ranks)}
    kinds |= {"library sums": LibrarySums(ranks), "no sums": NoSums(ranks)}
    if (exchange := peer_copies(ranks, found)) is not None and (other := peer_copies(ranks, found)) is not None:
        kinds = {COPIES: exchange, **kinds}  # first: it is profiled
        gathers[COPIES] = other

    def take(side: str) -> None:
        layout.gather_by(gathers.get(side) or Collectives(ranks))
        for sums in layout.early.sums.values():
            sums.exchange = kinds[side]
        layout.early.row_sums = parallel.GradientTree(layout.tree, ranks, kinds[side])

    return {side: functools.partial(take, side) for side in kinds}


def whole_sums(layout: parallel.Whole, found: Found) -> dict[str, Callable[[], None]]:
    """How whole gradients are added."""
    kinds: dict[str, Callable[[AtomTree, parallel.Ranks], parallel.GradientTree]] = {
        "ordered": parallel.GradientTree,
        "library sums": NaiveSum,
        "no sums": NoSum,
        AT_END: parallel.GradientTree,
    }
    if (exchange := peer_copies(layout.ranks, found)) is not None:
        kinds = {COPIES: functools.partial(parallel.GradientTree, exchange=exchange), **kinds}  # first: it is profiled

    def take(kind: Callable[[AtomTree, parallel.Ranks], parallel.GradientTree]) -> None:
        layout.early.sums = [kind(layout.tree, layout.ranks) for _ in layout.early.sums]

    return {side: lambda kind=kind: take(kind) for side, kind in kinds.items()}  # type: ignore[misc]


def segments(args: argparse.Namespace, found: Found, ranks: parallel.Ranks) -> None:
    """Forward and backward on one GPU, of one segment and of more, in turns, replayed: none of it waits for Python."""
    steps: dict[str, Callable[[], None]] = {}
    captured: list[StepGraphs] = []
    for n in (1, *args.segments):
        network = made_network(args.model, args.layers, "selective", n)
        network.warmup()
        graphs, replay = from_graphs(network, packed(rows_of(args, 0), network.device))

        def step(network: Any = network, graphs: StepGraphs = graphs, replay: Any = replay) -> None:
            graphs.begin()
            replay()
            network.collect_main_grads()

        steps[f"segments {n}"] = step
        captured.append(graphs)
    for side, seconds in in_turn(steps, args.steps, ranks, args.profile).items():
        found.add(side, "forward and backward", seconds)
    for graphs in captured:
        graphs.release()


def transformers(args: argparse.Namespace, found: Found, ranks: parallel.Ranks) -> None:
    """Steps of transformers' model in bf16, laid out by torch."""
    tensor, data = ranks.split(args.tp)
    device = runtime.default_device()
    compiled = args.part == "transformers, compiled" and not runtime.INTERPRET
    head_norms: list[torch.nn.Parameter] = []

    def arrange(network: torch.nn.Module) -> Callable[..., Any]:
        mesh = init_device_mesh(device.type, (ranks.size,))
        layers: Sequence[torch.nn.Module] = network.model.layers  # type: ignore[union-attr, assignment]
        for layer in layers:
            if tensor.size > 1:
                share(layer, mesh)
            if compiled:
                layer.compile()
            if args.fsdp:
                fully_shard(layer, mesh=mesh, reshard_after_forward=not args.kept)
        if args.fsdp:
            fully_shard(network, mesh=mesh)
        if tensor.size > 1:  # each rank has the gradient of its heads
            head_norms.extend(p for name, p in network.named_parameters() if "q_norm" in name or "k_norm" in name)
        if data.size > 1 and not args.fsdp:
            return DistributedDataParallel(network, gradient_as_bucket_view=True)
        return network

    made = theirs(
        args.model, rows_of(args, data.rank), args.layers, "torch, compiled" if compiled else "torch", arrange
    )
    # Of memory that is the parameters' own: an optimizer of DTensors spends its time on the host.
    own = [torch.nn.Parameter(local_rows(p)) for p in made.parameters]
    optimizer = torch.optim.AdamW(own, lr=LR, fused=device.type == "cuda")

    def step() -> None:
        for p in made.parameters:
            p.grad = None
        made.forward().backward()
        if head_norms:
            grads = [p.grad for p in head_norms if p.grad is not None]
            flat = torch.cat(grads)
            dist.all_reduce(flat)
            torch._foreach_copy_(grads, list(flat.split([len(g) for g in grads])))
        for leaf, p in zip(own, made.parameters, strict=True):
            leaf.grad = None if p.grad is None else local_rows(p.grad)
        clip(own, [isinstance(p, DTensor) for p in made.parameters])
        optimizer.step()

    found.add(args.part, "step", in_turn({args.part: step}, args.steps, ranks, args.profile)[args.part])


def share(layer: torch.nn.Module, mesh: Any) -> None:
    """Tensor parallelism as torch has it, with one sum over ranks in each direction of attention and of the MLP."""
    column, row, whole = ColwiseParallel(), RowwiseParallel(), Replicate()
    plan = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": whole}, desired_input_kwarg_layouts={"hidden_states": whole}
        ),
        "mlp": PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,)),
        **{f"self_attn.{name}_proj": column for name in "qkv"},
        **{f"mlp.{name}_proj": column for name in ("gate", "up")},
        **{"self_attn.o_proj": row, "mlp.down_proj": row},
    }
    parallelize_module(layer, mesh, plan)


def clip(parameters: Sequence[torch.nn.Parameter], shared: Sequence[bool]) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, where of some parameters each rank has a part."""
    total = torch.zeros((), device=parameters[0].device)
    for of_a_part in (True, False):
        grads = [p.grad for p, s in zip(parameters, shared, strict=True) if s == of_a_part and p.grad is not None]
        if grads:
            square = torch.nn.utils.get_total_norm(grads).float() ** 2
            if of_a_part:
                dist.all_reduce(square)
            total += square
    torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, total.sqrt())


def engine(args: argparse.Namespace, found: Found) -> None:
    """vLLM: a token step of each batch, and the first token of long prompts."""
    sampler = Sampler(args.part, args.model, max(BATCHES), max(FIRST_TOKEN) + 64, gpu_memory_utilization=0.85)
    sampler.warm(list(BATCHES))
    measures: dict[str, Callable[[], float]] = {}
    for batch in BATCHES:
        measures[f"decode {batch}"] = lambda batch=batch: sampler.step_s(batch)  # type: ignore[misc]
    for n in PROMPTS:
        prompts = [prompt(i, max(FIRST_TOKEN)) for i in range(n)]
        measures[f"prefill {n}"] = lambda prompts=prompts: sampler.sample(prompts, 1)  # type: ignore[misc]
        sampler.sample(prompts, 1)
    seen: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(args.steps):
        for name, measure in measures.items():
            seen[name].append(measure())
            found.add(args.part, name, seen[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--segments", type=int, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    take_shortcuts()
    if args.part.startswith(("plugin", "stock")):  # vLLM makes its groups itself
        engine(args, Found(args.out, parallel.Ranks(int(os.environ.get("RANK", "0")))))
        return 0
    ranks = parallel.Ranks.of_torchrun()
    parts = {"ours": ours, "segments": segments}
    parts.get(args.part, transformers)(args, Found(args.out, ranks), ranks)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
