"""Everything that decides a training run, checked, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bi_ops.models.base import Recompute
from bi_ops.models.tiny import TINY
from bi_ops.rl.tasks import TASKS
from bi_ops.rollout import factory
from bi_ops.rollout.base import LogprobsMode

#: What waits in host memory between updates: nothing, AdamW's states, or these and the fp32 master weights.
Offload = Literal["none", "states", "masters"]

#: Fields that may change when a run is resumed: none of them changes what a step learns.
FREE_ON_RESUME = (
    "steps",
    "save_every",
    "on_difference",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "sleep",
    "max_tokens_per_microbatch",
    "tensor_parallel_size",
    "device_ids",
    "enable_expert_parallel",
    "tp",
    "peer_memory",
    "ep",
    "fsdp",
    "reshard_after_forward",
    "recompute",
    "offload",
    "step_graphs",
)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file, unchecked. Raises FileNotFoundError, or ValueError for what is not an object."""
    try:
        values = json.loads(Path(path).read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"train: {path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise ValueError(f"train: {path} must hold a JSON object of settings")
    return values


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


#: A field's annotation to what an error calls its type, and whether a value is of it. Any other field is a string.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "int | None": ("a whole number or null", lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool))),
    "float": ("a number", _number),
    "tuple[float, float]": ("a list of numbers", lambda v: isinstance(v, list | tuple) and all(map(_number, v))),
    "tuple[int, ...]": (
        "a list of whole numbers",
        lambda v: isinstance(v, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in v),
    ),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "bool | None": ("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "str | None": ("a string or null", lambda v: v is None or isinstance(v, str)),
    "dict[str, Any]": ("an object", lambda v: isinstance(v, dict)),
}


def _check_type(name: str, annotation: str, value: object) -> None:
    """Raise TypeError unless `value` is of the field's type: JSON brings any, and a comparison would fail on it."""
    words, holds = _TYPES.get(annotation, ("a string", lambda v: isinstance(v, str)))
    if not holds(value):
        raise TypeError(f"train: {name} is {value!r}, {type(value).__name__}; it must be {words}")


@dataclass(frozen=True)
class TrainConfig:
    """One GRPO run. Two runs of one config on one machine end in the same bytes; on another CPU or GPU in others.

    model: a Hugging Face checkpoint folder, or None for random weights of `architecture` (config.json fields).
    engine: what samples, by its name in `bi_ops.rollout.factory`.
    attention: who computes it, in rollout and training alike: triton (bi_ops' own kernels, any head size) or vllm
    (FlashAttention 3); None: triton.
    task, symbols, max_new_tokens: what is learned, from how many symbols, and the longest answer.
    prompts_per_step x group_size sequences are sampled per step; updates_per_rollout: optimizer steps on each.
    temperature, top_k (0: all), top_p, min_p: of sampling. Log-probabilities, the ratio and the KL are those of the
    distribution that they make, the one that was sampled; with the defaults those of the logits as they are.
    clip: of the importance ratio. kl: coefficient of the KL to the initial model. mean: what counts equally.
    max_tokens_per_microbatch: cut the training pass into packs of at most that many tokens, padding not counted
    (None: one pack). Short sequences stay together in units (`CausalLM.unit_tokens`). The cut changes no bit of
    a log-probability or of the update; only the loss that is reported is added up pack by pack.
    atoms: into how many parts each batch is cut for sums over tokens, a power of two, and so the most data-parallel
    ranks that can share it (`bi_ops.parallel.AtomTree`). Another number has other bits; how many ranks there are
    changes none. 1 is one sum from the first token to the last, in one process.
    fsdp: each data-parallel rank keeps a shard of the weights, gradients and AdamW's states
    (`bi_ops.parallel.fsdp.FullySharded`), instead of all of them. It changes no bit.
    reshard_after_forward: with fsdp; False gathers the weights once a step instead of twice a micro-batch, and keeps
    them whole till its end, 2 bytes a parameter. It changes no bit.
    segments: of the sums over features that tensor-parallel ranks may share, a power of two, and the most such ranks
    (`bi_ops.nn.parallel_linear`). Another number has other bits, in log-probabilities too, so the engine samples with
    the same. 1 is one sum from front to back.
    tp: how many neighbouring ranks share the model in training (`bi_ops.parallel.tensor.TensorParallel`); as many
    groups share each batch. It changes no bit.
    peer_memory: ranks that share the model, in training or in vLLM, or the batch, with or without shards, write into
    the other GPUs' memory (`bi_ops.parallel.peer`) and need no collectives; all are on one host. None: where the GPUs
    reach each other. It changes no bit.
    ep: how many neighbouring ranks share the experts in training (`bi_ops.parallel.experts.ExpertParallel`), while each
    has its own part of the batch. It changes no bit.
    tensor_parallel_size: vllm: GPUs that share the model that samples. It changes no bit.
    device_ids: vllm: which GPUs, none of them the trainer's, as many as tensor_parallel_size; empty: the trainer's own.
    The weights go there by NCCL (`bi_ops.rollout.nccl_transfer`). It changes no bit.
    enable_expert_parallel: vllm: these GPUs have whole experts, not a slice of each. It changes no bit.
    recompute: what the backward computes again to save memory, as `bi_ops.models.base.CausalLM`; no bit depends on it.
    offload: what waits in host memory between updates, nothing, AdamW's states, or these and the fp32 master weights
    (`bi_ops.optim.OffloadedAdamW`); no bit depends on it.
    step_graphs: run forward, log-probabilities and backward of each micro-batch from a CUDA graph
    (`bi_ops.models.graphs.StepGraphs`): no time lost around the kernels of a small model, or of one that ranks share.
    No bit depends on it.
    cuda_graphs: vllm: of the model that samples.
    kv_cache_memory_bytes: vllm: of its KV cache, whatever else is on the GPU; None: what gpu_memory_utilization leaves.
    on_difference: what a log-probability that differs between rollout and training does to the run.
    save_every: steps between checkpoints, 0 for none but the final weights.
    sleep: the engine gives the memory of its weights and KV cache to training after each rollout, and takes it again
    with the new weights; gpu_memory_utilization may then leave room for masters and optimizer states alone.

    Raises:
        TypeError: naming a field of another type, what it must be and what it is.
        ValueError: naming the field, its value and what it may be.
    """

    model: str | None = None
    architecture: dict[str, Any] = field(default_factory=lambda: dict(TINY))
    engine: str = "embedded"
    attention: str | None = None
    task: str = "repeat"
    symbols: int = 8
    max_new_tokens: int = 4
    steps: int = 30
    prompts_per_step: int = 8
    group_size: int = 4
    updates_per_rollout: int = 1
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    kl: float = 0.0
    mean: Literal["token", "sequence"] = "token"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    save_every: int = 10
    max_tokens_per_microbatch: int | None = None
    atoms: int = 1
    fsdp: bool = False
    reshard_after_forward: bool = True
    segments: int = 1
    tp: int = 1
    peer_memory: bool | None = None
    ep: int = 1
    tensor_parallel_size: int = 1
    device_ids: tuple[int, ...] = ()
    enable_expert_parallel: bool = False
    recompute: Recompute = "selective"
    offload: Offload = "none"
    on_difference: Literal["stop", "warn"] = "stop"
    gpu_memory_utilization: float = 0.4
    kv_cache_memory_bytes: int | None = None
    cuda_graphs: bool = True
    step_graphs: bool = False
    sleep: bool = False

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        for name in ("betas", "device_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"train: {name} is {getattr(self, name)!r}; it must be {rule}")

        need(self.engine in factory.names(), "engine", " or ".join(factory.names()))
        need(self.attention in (None, "triton", "vllm"), "attention", "triton, vllm or null")
        need(self.task in TASKS, "task", "one of " + ", ".join(TASKS))
        need(self.mean in ("token", "sequence"), "mean", "token or sequence")
        need(self.recompute in get_args(Recompute), "recompute", ", ".join(get_args(Recompute)))
        need(self.offload in get_args(Offload), "offload", ", ".join(get_args(Offload)))
        need(self.on_difference in ("stop", "warn"), "on_difference", "stop or warn")
        need(0 < self.temperature < float("inf"), "temperature", "above 0: greedy samples have no ratio to learn from")
        need(self.top_k >= 0, "top_k", "0 (all tokens) or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        for name in ("max_new_tokens", "steps", "prompts_per_step", "updates_per_rollout"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.symbols >= 2, "symbols", "at least 2")
        need(self.group_size >= 2, "group_size", "at least 2, or no sample has another to be compared with")
        need(0 < self.lr < float("inf"), "lr", "a positive number")
        need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        need(0 <= self.weight_decay < float("inf"), "weight_decay", "0 or more")
        need(0 < self.max_grad_norm < float("inf"), "max_grad_norm", "a positive number; a large one scales nothing")
        need(0 < self.clip < 1, "clip", "between 0 and 1")
        need(0 <= self.kl < float("inf"), "kl", "0 or more")
        filters = (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)
        need(not (self.kl and filters), "kl", "0 with top_k, top_p or min_p: a token that one model drops is infinite")
        need(0 <= self.seed < 2**63, "seed", "in [0, 2**63)")
        need(self.save_every >= 0, "save_every", "0 (never) or more")
        packs = self.max_tokens_per_microbatch
        need(packs is None or packs >= 1, "max_tokens_per_microbatch", "None or >= 1")
        need(not (self.sleep and self.engine == "embedded"), "sleep", "false with the embedded engine, which has none")
        room = "false with step_graphs, whose memory stays taken while the engine samples"
        need(not (self.sleep and self.step_graphs), "sleep", room)
        need(self.atoms >= 1 and not self.atoms & (self.atoms - 1), "atoms", "a power of two")
        need(not (self.fsdp and self.step_graphs), "fsdp", "false with step_graphs, which cannot gather weights")
        need(self.fsdp or self.reshard_after_forward, "reshard_after_forward", "true without fsdp, which alone gathers")
        need(not (self.fsdp and self.offload == "masters"), "fsdp", "false with offload='masters'; use 'states'")
        need(self.segments >= 1 and not self.segments & (self.segments - 1), "segments", "a power of two")
        fits = self.tp >= 1 and self.segments % self.tp == 0
        need(fits, "tp", f"a divisor of segments={self.segments}: declare as many segments as ranks share the model")
        need(not (self.segments > 1 and self.fsdp), "fsdp", "false with segments above 1, or tp")
        need(self.tp == 1 or self.offload != "masters", "offload", "none or states with tp")
        need(self.ep >= 1 and not self.ep & (self.ep - 1), "ep", "a power of two")
        for name in ("fsdp", "step_graphs"):
            need(not (self.ep > 1 and getattr(self, name)), name, "false with ep above 1")
        need(self.ep == 1 or self.segments == 1, "ep", "1 with segments above 1")
        need(self.ep == 1 or self.offload != "masters", "offload", "none or states with ep")
        need(self.tensor_parallel_size >= 1, "tensor_parallel_size", "at least 1")
        need(self.tensor_parallel_size == 1 or self.engine == "vllm", "tensor_parallel_size", "1, except for vllm")
        named, size = len(set(self.device_ids)), self.tensor_parallel_size
        need(not named or self.engine == "vllm", "device_ids", "empty, except for vllm")
        need(
            not self.device_ids or named == len(self.device_ids) == size,
            "device_ids",
            f"as many different GPUs as tensor_parallel_size={size}, or empty",
        )
        need(not (self.sleep and named), "sleep", "false with device_ids, whose memory training does not use")
        several = self.tensor_parallel_size > 1
        shared = self.tp > 1 or several or (self.atoms > 1 and self.ep == 1 and self.segments == 1)
        need(shared or not self.peer_memory, "peer_memory", "false without atoms, tp or tensor_parallel_size above 1")
        need(several or not self.enable_expert_parallel, "enable_expert_parallel", "false for tensor_parallel_size=1")
        need(0 < self.gpu_memory_utilization < 1, "gpu_memory_utilization", "between 0 and 1")
        need(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes >= 1, "kv_cache_memory_bytes", "at least 1"
        )

    @property
    def logprobs_mode(self) -> LogprobsMode:
        """Whose log-probabilities the rollout reports: the sampled distribution's wherever that is not the logits'."""
        plain = (self.temperature, self.top_k, self.top_p, self.min_p) == (1.0, 0, 1.0, 0.0)
        return "raw_logprobs" if plain else "processed_logprobs"

    def model_options(self) -> dict[str, Any]:
        """What `load_model` takes besides the checkpoint."""
        return {} if self.segments == 1 else {"segments": self.segments}

    def engine_options(self) -> dict[str, Any]:
        """What `factory.make_engine` takes besides the name and the checkpoint."""
        options: dict[str, Any] = {"attention": self.attention}
        if self.logprobs_mode != "raw_logprobs":
            options |= {"logprobs_mode": self.logprobs_mode}
        if self.sleep:
            options |= {"sleep_mode": True}
        if self.engine == "vllm":
            options |= {"cuda_graphs": self.cuda_graphs, "gpu_memory_utilization": self.gpu_memory_utilization}
            if self.kv_cache_memory_bytes is not None:
                options |= {"kv_cache_memory_bytes": self.kv_cache_memory_bytes}
            if self.tensor_parallel_size > 1:
                options |= {"tensor_parallel_size": self.tensor_parallel_size}
                options |= {} if self.peer_memory is None else {"peer_memory": self.peer_memory}
            if self.device_ids:
                options |= {"device_ids": self.device_ids}
            if self.enable_expert_parallel:
                options |= {"enable_expert_parallel": True}
        return options

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dataclasses.asdict(self), "betas": list(self.betas), "device_ids": list(self.device_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises ValueError listing unknown names; TypeError and ValueError as the class."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"train: unknown settings {', '.join(unknown)}; settings are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Raises as `read_settings` and `from_dict`."""
        return cls.from_dict(read_settings(path))

    def check_resumes(self, earlier: TrainConfig) -> None:
        """Raise ValueError listing every setting in which this config would change an earlier run's course."""
        mine, theirs = self.to_dict(), earlier.to_dict()
        changed = [
            f"{name} was {theirs[name]!r}, now {mine[name]!r}"
            for name in mine
            if mine[name] != theirs[name] and name not in FREE_ON_RESUME
        ]
        if changed:
            raise ValueError("train: cannot resume with other settings: " + "; ".join(changed))
