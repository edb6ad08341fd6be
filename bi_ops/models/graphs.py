"""Micro-batch steps from CUDA graphs: a small model's GPU does not wait for Python.

A step's kernels are launched by one call. Their bits are those of the same kernels launched one by one, and padding to
a bucket changes none (`models.buckets`).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bi_ops.core import rounding
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.operators import has_hooks
from bi_ops.models.buckets import Bucket, bucket_of, copied, pad, tensors_of
from bi_ops.models.packing import PackedBatch
from bi_ops.nn.main_grad import Memory, allocate_main_grads, main_grad_memory, without_main_grad
from bi_ops.nn.parallel_linear import Shared
from bi_ops.nn.parallel_vocab import SharedVocabulary

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

#: (batch, values [S]...) -> tensors [S]: forward, log-probabilities and a backward into the model's main_grads.
Step = Callable[..., tuple[torch.Tensor, ...]]
#: Runs a step on the inputs that it was made for; what it returns is written over by the next call.
Call = Callable[[], tuple[torch.Tensor, ...]]

#: Graphs kept at once; the one used least recently goes first. Each holds some thousand kernels' arguments.
MAX_GRAPHS = 64


class Padded(NamedTuple):
    """A micro-batch as a graph takes it. rows: int64 [S], where the scored tokens are among the bucket's rows."""

    bucket: Bucket
    batch: PackedBatch
    values: list[torch.Tensor]
    rows: torch.Tensor


def _captured(step: Call, pool: Any) -> Call:
    """`step` captured in a CUDA graph whose memory is of `pool`; nothing is computed until it is called.

    Raises:
        RuntimeError: it cannot be captured; torch's own error.
    """
    graph = torch.cuda.CUDAGraph()
    # Of this thread's calls alone: a collective library may watch the GPU from a thread of its own.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = step()

    def replay() -> tuple[torch.Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def _hooked(model: torch.nn.Module, modules: Sequence[torch.nn.Module], tensors: Sequence[torch.Tensor]) -> str | None:
    """The first of these modules, or parameters and buffers, that has hooks which a replay would not call.

    Names are looked up for an error alone.
    """
    if not any(has_hooks(m, captured=False) for m in modules) and not any(map(_is_hooked, tensors)):
        return None
    every = (n or "the model" for n, m in model.named_modules() if has_hooks(m, captured=False))
    parameters = (n for n, p in model.named_parameters() if _is_hooked(p))
    return next(itertools.chain(every, parameters), "a buffer")


def _is_hooked(t: torch.Tensor) -> bool:
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


class StepGraphs:
    """Runs micro-batches of `model`, each padded to a bucket, from a CUDA graph per bucket.

    A bucket's first micro-batch runs as it is, on the bucket's inputs: kernels compile, and GEMMs are chosen. Its
    second one is captured and replayed, as all later ones are. So no step is computed twice, and a bucket that comes
    once costs no capture. First sums of a step have kernels of their own, and so a graph of their own.

    Graphs share one pool of memory, which holds what the largest step keeps for its backward and stays taken between
    steps, as the fp32 sums of all gradients do: 4 bytes a parameter, a tied table twice. Graphs are captured anew where
    `state` changes: addresses, dtypes and gradients asked for, of all parameters and buffers, the model's settings, and
    how its layers' partial outputs are added over ranks.

    Ranks that share the model have the same batches, so they run, capture and replay the same steps in one order, and
    with them the same collectives: NCCL's must be captured on all ranks or on none.

    Args:
        step: called with a batch and values as `run` gets them, padded; it may not wait for the GPU, nor hold on to
            tensors. others: models that it also computes with.
        on_any_rank: is something true on any of the ranks that share the model? All of them ask in every `begin`.
        capture: makes a replay of a call; None: a CUDA graph. Where there are none, tests call the step itself.

    Raises:
        ValueError: the model is not on a GPU, trains parameters without a main_grad, has hooks, which a replay would
            not call, or computes attention by a backend that is not bi_ops' own.
    """

    def __init__(
        self,
        model: CausalLM,
        step: Step,
        others: Sequence[CausalLM] = (),
        capture: Callable[[Call, Any], Call] | None = None,
        on_any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        self.model, self.step, self.models = model, step, (model, *others)
        self._on_any_rank = on_any_rank
        self._capture = capture or _captured
        if capture is None and model.device.type != "cuda":
            raise ValueError(
                f"StepGraphs: the model is on {model.device.type}, which has no CUDA graphs; run without them"
            )
        self._began = False
        self.release()

    def release(self) -> None:
        """Let go of all graphs and of their memory; `begin` makes them anew.

        A process group of NCCL that they call must not be destroyed before: it would wait for them.
        """
        self._memory: dict[torch.nn.Module, Memory] = {}
        self._state: object = None
        self._calls: OrderedDict[tuple[object, ...], Call] = OrderedDict()
        self._inputs: dict[tuple[object, ...], tuple[PackedBatch, list[torch.Tensor]]] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.model.device.type == "cuda" else None

    def state(self) -> object:
        """What a graph holds of the models; checked where it is asked for. Weights that stay rounded are so afterwards.

        Raises:
            ValueError: as the class.
        """
        if left := without_main_grad(self.model):
            raise ValueError(
                f"StepGraphs: {', '.join(left[:4])}{' and others' * (len(left) > 4)} would be summed in .grad, which "
                "a graph cannot keep; freeze them, or run without graphs"
            )
        found: list[object] = []
        for model in self.models:
            if model.attention_backend not in (None, "triton"):
                raise ValueError(
                    f"StepGraphs: attention by {model.attention_backend!r} is not captured; use 'triton', or run "
                    "without graphs"
                )
            modules = list(model.modules())
            tensors = [t for m in modules for of in (m._parameters, m._buffers) for t in of.values() if t is not None]
            if hooked := _hooked(model, modules, tensors):
                raise ValueError(
                    f"StepGraphs: {hooked} has hooks, which a replay would not call; remove them, or run without graphs"
                )
            for layer in modules:
                if isinstance(layer, Shared):
                    found.append((layer.all_reduce, layer.exchange if isinstance(layer, SharedVocabulary) else None))
            found.append((model.recompute, model.attention_backend, model.head_chunk_rows, model.training))
            found += [(t.data_ptr(), t.dtype, t.shape, t.requires_grad, rounding.refresh(t)) for t in tensors]
        return found

    def begin(self) -> None:
        """Begin the sums of a step; `model.collect_main_grads` ends it. What the last one's `.grad` held is lost.

        Raises:
            ValueError: as the class.
        """
        state = self.state()
        if self._on_any_rank(state != self._state):
            self.release()
            self._state, self._memory = state, main_grad_memory(self.model)
        self._began = False
        allocate_main_grads(self.model, self._memory)

    def pad(self, batch: PackedBatch, *values: torch.Tensor) -> Padded:
        """A micro-batch, packed with align=TOKEN_STEP, and fp32 [S] of its scored tokens, as `run` takes them."""
        config = self.model.config
        bucket = bucket_of(batch, config.max_position_embeddings)
        return Padded(bucket, *pad(batch, bucket, values, self.model.unit_tokens), batch.scatter_indices)

    @property
    def captured(self) -> int:
        """Graphs in memory."""
        return len(self._calls)

    def run(self, padded: Padded) -> tuple[torch.Tensor, ...]:
        """What the step returns of the scored tokens, [S] each, new tensors; its backward has been launched.

        Raises:
            RuntimeError: it cannot be captured.
        """
        batch, values = padded.batch, padded.values
        inputs = (padded.bucket, len(batch.cu_units), tuple(batch.sampling or ()), len(values))
        if inputs not in self._inputs:
            self._inputs[inputs] = copied(padded.batch), [v.clone() for v in padded.values]
        batch, values = self._inputs[inputs]
        torch._foreach_copy_([*tensors_of(batch), *values], [*tensors_of(padded.batch), *padded.values])
        key = (inputs, self._began)
        outputs = self._called(key, lambda: self.step(batch, *values))
        if not self._began:
            for module in self._memory:  # a replay runs no Python that would say so
                if isinstance(module.main_grad, MainGrad):
                    module.main_grad.written()
            self._began = True
        return tuple(t.index_select(0, padded.rows) for t in outputs)

    def _called(self, key: tuple[object, ...], step: Call) -> tuple[torch.Tensor, ...]:
        if key not in self._seen:
            self._seen.add(key)
            found = step()
            unwritten = [m for m in self._memory if isinstance(m.main_grad, MainGrad) and not m.main_grad.holds_sum]
            if unwritten:
                raise RuntimeError(
                    f"StepGraphs: the backward of a micro-batch reached {len(unwritten)} layers' weights not at all, "
                    f"{unwritten[0]} first, so a replay would not know what their sums hold; run without graphs"
                )
            return found
        if key not in self._calls:
            if len(self._calls) >= MAX_GRAPHS:
                self._calls.popitem(last=False)
            try:
                self._calls[key] = self._capture(step, self._pool)
            except RuntimeError as error:
                raise RuntimeError(
                    f"StepGraphs: a micro-batch of {key[0]} was not captured; run without graphs"
                ) from error
        self._calls.move_to_end(key)
        replay = self._calls[key]
        return replay()
