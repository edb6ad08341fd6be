"""The first operator in which a rollout and training differ, found by hooks on both models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bi_ops import logprob
from bi_ops.core.orders import OrderRecord
from bi_ops.models import orders as model_orders
from bi_ops.models.packing import pack
from bi_ops.verify.properties import bits_equal

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.rollout.base import Completion, SamplingParams

Tensor = torch.Tensor

#: Sites of scores, which are no modules: of logits that both sides have; and of hidden states, as training scores them.
TOKENS, FUSED = "token_logprobs", "linear_token_logprobs"

#: The last part of a site's name to the operator whose order it has.
OPERATORS = {
    "attn": "attention",
    "act_fn": "activation",
    "norm": "norm",
    "layernorm": "norm",
    "proj": "matmul",
    "lm_head": "matmul",
    TOKENS: "logprob",
    "qkv": "rope",
    "gate": "matmul",
    "experts": "moe",
}


@dataclass
class Site:
    """What went into one operator of a model and came out: rows of tokens, calls one after the other."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    def rows(self, which: str) -> list[Tensor]:
        """Each input or output over all tokens, [T, features]."""
        calls: list[list[Tensor]] = getattr(self, which)
        return [torch.cat(parts) for parts in zip(*calls, strict=False)]


@dataclass
class Trace:
    """Sites by name, in the order in which they first ran. weights: the parameters, by name."""

    sites: dict[str, Site] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstDifference:
    """Where two sides first differ.

    site: module of the model; ``...qkv`` for the rotated queries, keys and values; ``token_logprobs`` for the scores of
    logits, and ``linear_token_logprobs`` where training's fused head alone differs from them. kind: "operator" (its
    inputs are equal, its output is not), "weights" (it has others), "between" (its inputs differ already, though all
    before it is equal). row: the token. column: in the row. values: of the rollout and of training. shape, dtype: of
    the rollout's output. order: the reduction order of each side.
    """

    site: str
    kind: str
    row: int
    column: int
    values: tuple[float, float]
    elements: int
    shape: tuple[int, ...]
    dtype: str
    order: tuple[str, str] = ("", "")
    backend: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        why = {
            "operator": "its inputs are equal, its output is not",
            "weights": "its inputs are equal, its weights are not",
            "between": "its inputs differ already: what lies before it, outside of any module, differs",
        }[self.kind]
        text = (
            f"first difference at {self.site}: {why}; token {self.row}, column {self.column}: "
            f"rollout {self.values[0]!r}, training {self.values[1]!r}; "
            f"{self.elements} of {list(self.shape)} {self.dtype} differ"
        )
        for what, both in (("order", self.order), ("backend", self.backend)):
            if any(both):
                text += f"; {what} {both[0] or '-'}" + ("" if both[0] == both[1] else f" and {both[1] or '-'}")
        return text


def _tensors(values: Any) -> list[Tensor]:
    """Floating-point tensors among arguments or results, copied, a row for each token."""
    values = values if isinstance(values, tuple | list) else (values,)
    found = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1]
    return [v.detach().flatten(1).clone() for v in found]


@contextlib.contextmanager
def recording(model: torch.nn.Module) -> Iterator[Trace]:
    """Record every module of `model` without children, experts as one, and attention, while the block runs.

    model: a `CausalLM`, or vLLM's model of the same names, run eagerly: a CUDA graph calls no hook.
    """
    trace, handles = Trace(), []
    trace.weights = {n: p.detach() for n, p in model.named_parameters()}

    def before(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            trace.sites.setdefault(name, Site()).inputs.append(_tensors(args))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
            trace.sites[name].outputs.append(_tensors(out))

        return hook

    def watch_attention(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """`CausalLM` takes attention as a function: its arguments are one site's results, its result another's."""
        if not args or not callable(args[-1]):
            return None
        inner = args[-1]

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            stem = f"model.layers.{layer}.self_attn"
            rotated = trace.sites.setdefault(f"{stem}.qkv", Site())
            rotated.outputs.append(_tensors((q, k, v)))
            rotated.inputs.append([])
            site = trace.sites.setdefault(f"{stem}.attn", Site())
            site.inputs.append(_tensors((q, k, v)))
            out = inner(layer, q, k, v)
            site.outputs.append(_tensors(out))
            return out

        return (*args[:-1], attention_fn)

    handles.append(model.register_forward_pre_hook(watch_attention))
    for name, module in model.named_modules():
        if name and (name.endswith(".experts") or not any(True for _ in module.children())):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _unequal(rollout: list[Tensor], training: list[Tensor]) -> tuple[int, int, int, Tensor, Tensor] | None:
    """(row, column, elements that differ, both sides) of the first row that differs; rows of one side alone are not
    compared."""
    first: tuple[int, int, int, Tensor, Tensor] | None = None
    for a, b in zip(rollout, training, strict=False):
        n = min(len(a), len(b))
        a, b = a[:n].cpu(), b[:n].cpu()
        if a.shape == b.shape and a.dtype == b.dtype and not bits_equal(a, b):
            view = torch.int16 if a.element_size() == 2 else torch.int32
            different = a.view(view) != b.view(view)
            row, column = (int(i) for i in different.nonzero()[0])
            if first is None or row < first[0]:
                first = row, column, int(different.sum()), a, b
    return first


def _weights_differ(site: str, rollout: Trace, training: Trace) -> bool:
    """Whether the site has other weights on the two sides; masters are rounded, as they are on use."""
    own = [n for n in training.weights if n.startswith(f"{site}.") and n in rollout.weights]
    pairs = ((rollout.weights[n], training.weights[n]) for n in own)
    return any(a.shape == b.shape and not bits_equal(a.cpu(), b.to(a.dtype).cpu()) for a, b in pairs)


def _operator(site: str) -> str:
    last = site.rpartition(".")[2]
    return next((op for end, op in OPERATORS.items() if last.endswith(end)), "")


def _order(record: OrderRecord | None, site: str) -> str:
    found = (record.orders if record else {}).get(_operator(site))
    if not found:
        return ""
    return f"{found['kind']}({', '.join(f'{k}={v}' for k, v in found.items() if k != 'kind')})"


def first_difference(
    rollout: Trace,
    training: Trace,
    orders: tuple[OrderRecord | None, OrderRecord | None] = (None, None),
    backends: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> FirstDifference | None:
    """The first site in which two traces of the same tokens differ; None if all that both have is equal.

    Raises:
        ValueError: the two have no site in common, so nothing was compared.
    """
    common = [name for name in training.sites if name in rollout.sites]
    if not common:
        raise ValueError("bisect: the two models have no module of one name; run vLLM eagerly, and the same model")
    for name in common:
        mine, other = rollout.sites[name], training.sites[name]
        found, kind = _unequal(mine.rows("inputs"), other.rows("inputs")), "between"
        if found is None:
            found, kind = _unequal(mine.rows("outputs"), other.rows("outputs")), "operator"
            if found is not None and _weights_differ(name, rollout, training):
                kind = "weights"
        if found is not None:
            row, column, elements, a, b = found
            return FirstDifference(
                name,
                kind,
                row,
                column,
                (float(a[row, column]), float(b[row, column])),
                elements,
                tuple(a.shape),
                str(a.dtype).removeprefix("torch."),
                (_order(orders[0], name), _order(orders[1], name)),
                (backends[0].get(_operator(name), ""), backends[1].get(_operator(name), "")),
            )
    return None


def _add_scores(trace: Trace, of_logits: Tensor, of_hidden: Tensor) -> None:
    """The sites that follow the head: log-probabilities, fp32 [S], made of its logits and of its inputs."""
    head = trace.sites.get("lm_head")
    if head is not None:
        trace.sites[TOKENS] = Site(head.outputs, [[of_logits[:, None]]])
        trace.sites[FUSED] = Site(head.inputs, [[of_hidden[:, None]]])


def of_rollout(engine: Any, prompt: list[int], params: SamplingParams) -> tuple[Trace, Completion]:
    """What the engine's model computes of one sequence, sampled now."""
    with recording(engine.model) as trace:
        (completion,) = engine.generate([prompt], [params])
    if "logits_processor" in trace.sites:  # vLLM's calls the head's GEMM, not its module
        trace.sites["lm_head"] = trace.sites.pop("logits_processor")
    _add_scores(trace, completion.logprobs, completion.logprobs)
    return trace, completion


def of_training(model: CausalLM, completion: Completion) -> Trace:
    """What the model computes of one sequence, whole; its scores, and the logits that these are of."""
    distributions = None if completion.distribution is None else [completion.distribution]
    batch = pack([completion.prompt], [completion.tokens], model.device, distributions=distributions)
    found: list[Tensor] = []

    def call_head(_: torch.nn.Module, args: tuple[Any, ...], hidden: Tensor) -> None:
        found.append(model.logits(hidden[batch.logit_indices]))  # scoring takes the head's weight and calls no module

    with torch.no_grad(), recording(model) as trace:
        handle = model.register_forward_hook(call_head)
        try:
            scores = model.token_logprobs(batch)
        finally:
            handle.remove()
        (logits,), options = found, dict(batch.sampling or {})
        score: Any = logprob.sampled_logprobs if options else logprob.token_logprobs
        _add_scores(trace, score(logits, batch.targets, **options), scores)
    return trace


def bisect(engine: Any, model: CausalLM, prompt: list[int], params: SamplingParams) -> FirstDifference | None:
    """The first operator in which `engine` and `model` differ on one sequence, sampled again; None if none does.

    Args:
        engine: a rollout engine with an attribute `model`, its own, in this process; vLLM without CUDA graphs.
        model: what trains. prompt, params: of the sequence.

    Raises:
        ValueError: the two models have no module of one name.
    """
    rollout, completion = of_rollout(engine, prompt, params)
    training = of_training(model, completion)
    chosen = model_orders.chosen_backends(model.attention_backend, model.shapes(), model.device)
    theirs = {("matmul" if n == "linear" else n): b for n, b in dict(engine.describe())["backends"].items()}
    return first_difference(rollout, training, (engine.orders, model.orders()), (theirs, chosen))
