"""The sides of bench/step.py: bi_ops' Qwen3 and transformers', each as what a step of training calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops.core import runtime

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.models.graphs import StepGraphs
    from bi_ops.models.packing import PackedBatch

#: Clip and AdamW of the sides: betas and weight decay are torch's.
LR, MAX_NORM = 1e-6, 1.0
SEED = 0
VOCABULARY = 151936
#: hidden, intermediate, layers, query heads, key heads; head_dim 128, tied embeddings but for 8B.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "dry": (64, 128, 2, 8, 4),
}


def shape(model: str, layers: int | None = None) -> dict[str, Any]:
    """A model's config.json; layers: fewer than it has, where memory ends."""
    hidden, intermediate, every, heads, kv_heads = SHAPES[model]
    layers = layers or every
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32 if model == "dry" else 128,
        "vocab_size": 4096 if model == "dry" else VOCABULARY,  # of four chunks, for as many segments
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": model != "8B",
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
    }


#: hidden, intermediate of an expert, layers, heads, KV heads, experts.
EXPERTS = {"30B-A3B": (2048, 768, 48, 32, 4, 128), "dry-moe": (64, 64, 2, 4, 2, 8)}


def expert_shape(model: str, layers: int | None = None) -> dict[str, Any]:
    """As `shape`, of a Qwen3 with experts in every layer."""
    hidden, size, every, heads, kv_heads, experts = EXPERTS[model]
    dense = shape("dry" if model.startswith("dry") else "8B", layers or every)
    return dense | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **{"hidden_size": hidden, "intermediate_size": 8 * size, "moe_intermediate_size": size},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"num_experts": experts, "num_experts_per_tok": min(8, experts // 2), "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": []},
        "vocab_size": 128 if model.startswith("dry") else VOCABULARY,
    }


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Random weights in place, the same at every call: norms about 1, what is not a norm about 0."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator(device=next(iter(parameters.values())).device).manual_seed(SEED)
    for name, p in parameters.items():
        is_norm = name.endswith("norm.weight")
        p.normal_(1.0 if is_norm else 0.0, 0.1 if is_norm else 0.02, generator=generator)


class Step(NamedTuple):
    """forward to the mean log-probability; what comes before and after a backward; clip, then optimizer; the weights.

    warm: what training calls before the first step. whole: forward and backward in one, in place of `before`, `forward`
    and the backward; its value. gemm: who computes GEMMs.
    """

    forward: Callable[[], torch.Tensor]
    before: Callable[[], None]
    after: Callable[[], None]
    clip: Callable[[], None]
    update: Callable[[], None]
    parameters: list[torch.nn.Parameter]
    warm: Callable[[], None] = lambda: None
    whole: Callable[[], torch.Tensor] | None = None
    gemm: str = "cublas"


def wait() -> float:
    """The time once the GPU has nothing left to do."""
    if not runtime.INTERPRET:
        torch.cuda.synchronize()
    return time.perf_counter()


def config_of(model: str, layers: int | None = None) -> dict[str, Any]:
    """`shape`, or `expert_shape` of a model with experts."""
    return (expert_shape if model in EXPERTS else shape)(model, layers)


def lengths_of(tokens: int, seqlen: int | None) -> list[int]:
    """Equal sequences; seqlen None: those of an RL step, many short and a few of the longest, 16 to 1."""
    if seqlen is not None:
        return [seqlen] * (tokens // seqlen)
    longest = max(tokens // 8, 16)
    lengths: list[int] = []
    generator = torch.Generator().manual_seed(SEED)
    while (left := tokens - sum(lengths)) > 0:
        share = 0.0625 + 0.9375 * float(torch.rand((), generator=generator)) ** 3
        lengths.append(min(max(int(longest * share), 2), left))
    if lengths[-1] < 2:
        lengths[-2:] = [sum(lengths[-2:])]
    return lengths


def made_network(model: str, layers: int | None, recompute: str, segments: int = 1) -> CausalLM:
    """bi_ops' Qwen3 with random weights; its launches are made again from now on, as in training."""
    from bi_ops.core import replay
    from bi_ops.models import make_model

    replay.enable()
    options = {"segments": segments} if segments > 1 else {}
    network = make_model(config_of(model, layers), recompute=recompute, **options)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(std=0.02)
    return network


def from_graphs(network: CausalLM, batch: PackedBatch) -> tuple[StepGraphs, Callable[[], torch.Tensor]]:
    """Graphs, and what replays forward and backward of the mean log-probability; the log-probabilities."""
    from bi_ops.models.graphs import StepGraphs

    def microbatch(batch: PackedBatch, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = network.token_logprobs(batch)
        (scores * weights).backward(torch.ones_like(weights))
        return (scores.detach(),)

    run = StepGraphs(network, microbatch, capture=(lambda step, pool: step) if runtime.INTERPRET else None)
    padded = run.pad(batch, torch.full((len(batch.targets),), 1 / len(batch.targets), device=network.device))
    return run, lambda: run.run(padded)[0]


def ours(
    model: str,
    rows: list[torch.Tensor],
    layers: int | None,
    recompute: str,
    verify: bool = True,
    offload: str = "none",
    graphs: bool = False,
    network: CausalLM | None = None,
) -> Step:
    """graphs: `whole` replays forward and backward from a CUDA graph. network: of an earlier call; None: a new one."""
    from bi_ops import nn, optim
    from bi_ops.matmul import TOKEN_STEP, cublaslt, warmup
    from bi_ops.models.packing import pack

    if network is None:
        network = made_network(model, layers, recompute)
    if verify:
        warmup(network)
    ids = [row.tolist() for row in rows]
    prompts, completions = [row[:1] for row in ids], [row[1:] for row in ids]
    batch = pack(prompts, completions, network.device, TOKEN_STEP, unit_tokens=network.unit_tokens)
    parameters = list(network.parameters())
    # As in training: AdamW writes what forwards read, where memory is not what is short.
    is_short = offload != "none" or recompute == "layer"
    rounded = {} if is_short else nn.keep_rounded_weights(network)
    optimizer: list[optim.AdamW] = []  # its states are there from the first update on
    if offload != "none":
        optimizer.append(optim.OffloadedAdamW(parameters, lr=LR, masters=offload == "masters"))

    def after() -> None:
        network.collect_main_grads()

    scales: list[torch.Tensor] = []

    def clip() -> None:
        norm = optim.global_norm([p.grad for p in parameters if p.grad is not None])
        scales[:] = [optim.clip_scale(norm, MAX_NORM)]

    def update() -> None:
        if not optimizer:
            optimizer.append(optim.AdamW(parameters, lr=LR, bf16_copies=rounded))
        optimizer[0].step(grad_scale=scales[0])

    made = Step(
        lambda: network.token_logprobs(batch).mean(),
        network.allocate_main_grads,
        after,
        clip,
        update,
        parameters,
        network.warmup,
        gemm="triton" if cublaslt.loaded() is None else "cublaslt",
    )
    if not graphs:
        return made

    run, replay = from_graphs(network, batch)

    def whole() -> torch.Tensor:
        run.begin()
        return replay().mean()

    return made._replace(whole=whole)


def theirs(
    model: str,
    rows: list[torch.Tensor],
    layers: int | None,
    side: str,
    arrange: Callable[[torch.nn.Module], Callable[..., Any]] | None = None,
) -> Step:
    """Sequences of unequal lengths are padded to the longest. Experts are computed by `torch._grouped_mm`.

    arrange: lays the network out over ranks, compiles its parts, and returns what is called.
    """
    import transformers

    torch.manual_seed(SEED)
    fields = config_of(model, layers) | {"attn_implementation": "sdpa"}
    if experts := model in EXPERTS:
        fields |= {"experts_implementation": "grouped_mm"}
    kind = "Qwen3Moe" if experts else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**fields)
    device = runtime.default_device()
    autocast, liger = "autocast" in side, side == "liger"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=True)
    with torch.device(device):
        network = getattr(transformers, f"{kind}ForCausalLM")(config)
    if experts and (found := network.config._experts_implementation) != "grouped_mm":
        raise RuntimeError(f"transformers computes experts with {found!r}")
    network = network.to(device, torch.float32 if autocast else torch.bfloat16)
    network.config.use_cache = False
    if "checkpoint" in side:
        network.train()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    targets = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=-100) for row in rows])

    def value(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The mean of the next tokens' log-probabilities, in fp32, without a copy of the logits kept for the backward.
        return -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())

    compiled = side in ("torch, compiled", "torch, cudnn", "torch, checkpoint")
    if side == "torch, cudnn" and device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    mean = torch.compile(value) if compiled else value
    if arrange is not None:
        call = arrange(network)
    else:
        call = torch.compile(network) if compiled else network
    parameters = list(network.parameters())
    optimizer: list[torch.optim.AdamW] = []

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if liger:
                return -call(input_ids=ids, labels=targets).loss
            return mean(call(input_ids=ids).logits, targets)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    def update() -> None:
        if not optimizer:
            optimizer.append(torch.optim.AdamW(parameters, lr=LR, fused=device.type == "cuda"))
        optimizer[0].step()

    return Step(forward, lambda: None, lambda: None, clip, update, parameters)
