"""Which kernels would a first training step compile on an H100 that the warm-up has not? For a process without a GPU.

    python tests/traced_first_steps.py

The process takes itself for one with a GPU of sm_90 whose memory is the CPU's. A launch is recorded by what Triton
would compile it for and does not run, so tensors hold anything. Prints JSON: how many kernels `compile_step` has
"compiled", those "missing" from it in each of several steps, and as the "control" those missing after a warm-up of
equal sequences alone; "left_out", those that one layer of each kind does not launch but all do, of several models of
five layers, with how many stood for all, and as the "left_out_control" those of a model's first layer alone.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
from triton.runtime.jit import JITFunction  # noqa: E402

from bi_ops import optim  # noqa: E402
from bi_ops.core import arch, checks, compile_ahead, runtime  # noqa: E402
from bi_ops.core.backends import Support  # noqa: E402
from bi_ops.matmul import cublaslt  # noqa: E402
from bi_ops.models import make_model, packing, warmup  # noqa: E402
from bi_ops.models.base import CausalLM  # noqa: E402
from bi_ops.models.graphs import StepGraphs  # noqa: E402
from bi_ops.optim import ops as optim_ops  # noqa: E402

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

seen: set[tuple[str, ...]] = set()


def pretend() -> None:
    """A GPU of sm_90, as far as launches ask for one."""

    def of(device: torch.device | None = None) -> arch.Arch:
        return arch.SM_90

    arch.of, arch.current = of, of  # type: ignore[assignment]
    runtime.default_device = lambda: torch.device("cpu")
    runtime.multiprocessors = lambda device: 132  # type: ignore[assignment]
    lenient = SimpleNamespace(**{k: v for k, v in vars(runtime).items() if not k.startswith("_")} | {"INTERPRET": True})
    checks.runtime = optim_ops.runtime = lenient  # type: ignore[assignment]  # tensors of the CPU are welcome
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    # Where torch brings CUDA's libraries, the binding would be found, and ask for a GPU.
    cublaslt.loaded = lambda: None  # type: ignore[assignment]
    cublaslt.availability = lambda: Support(False, "no GPU")  # type: ignore[assignment]
    compile_ahead.compile_only = only_recorded  # type: ignore[assignment]
    JITFunction.run = record  # type: ignore[method-assign]


@contextlib.contextmanager
def only_recorded(*_: Any) -> Iterator[compile_ahead.Compiled]:
    yield compile_ahead.Compiled()


def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """A launch, by what Triton specialises a kernel on."""
    given = dict(zip(self.arg_names, args, strict=False)) | options
    key = [self.fn.__name__]
    for p in self.params:
        value = given.pop(p.name, None)
        if isinstance(value, torch.Tensor):
            aligned = p.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
            key.append(f"{p.name}: {value.dtype} {aligned}")
        elif p.is_constexpr or not isinstance(value, int):
            key.append(f"{p.name}: {value if p.is_constexpr else type(value).__name__}"[:80])
        elif not p.do_not_specialize:
            key.append(f"{p.name}: {'1' if value == 1 else value % 16 == 0} {value >= 1 << 31}")
    seen.add((*key, *(f"{name}: {value}" for name, value in given.items())))


def compiled(model: CausalLM) -> set[tuple[str, ...]]:
    seen.clear()
    warmup.compile_step(model)
    return set(seen)


def steps(model: CausalLM) -> Iterator[tuple[str, packing.PackedBatch]]:
    """Packs as training makes them."""
    lots = random.Random(0)
    lengths = {
        "many": [(lots.randint(10, 60), lots.randint(5, 250)) for _ in range(24)],
        "few": [(lots.randint(10, 60), lots.randint(40, 250)) for _ in range(4)],
        "one": [(20, 200)],
        "long": [(30, lots.randint(100, 4000)) for _ in range(6)],
        "equal": [(56, 200)] * 24,
    }
    for name, each in lengths.items():
        prompts, completions = [[0] * a for a, _ in each], [[0] * b for _, b in each]
        yield name, packing.pack(prompts, completions, model.device, 16, None, model.unit_tokens)


def launched(model: CausalLM) -> Iterator[tuple[str, set[tuple[str, ...]]]]:
    """The kernels of each step, and of the optimizer's."""

    def microbatch(batch: packing.PackedBatch, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = model.token_logprobs(batch)
        (scores * weights).backward(torch.ones_like(weights))
        return (scores.detach(),)

    for name, batch in steps(model):
        seen.clear()
        model.allocate_main_grads()
        for _ in range(2):
            microbatch(batch, torch.zeros(len(batch.targets)))
        model.collect_main_grads()
        model.zero_grad(set_to_none=True)
        yield name, set(seen)
        seen.clear()
        graphs = StepGraphs(model, microbatch, capture=lambda step, pool: step)
        graphs.begin()
        for _ in range(2):
            graphs.run(graphs.pad(batch, torch.zeros(len(batch.targets))))
        model.collect_main_grads()
        model.zero_grad(set_to_none=True)
        yield f"{name}, from graphs", set(seen)
    seen.clear()
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters}
    for written in ({}, copies):
        scale = optim.clip_scale(optim.global_norm([p.grad for p in parameters if p.grad is not None]), 1.0)
        optim.AdamW(parameters, bf16_copies=written).step(grad_scale=scale)
    yield "optimizer", set(seen)


def unlike() -> Iterator[tuple[str, CausalLM]]:
    """Models whose layers differ."""
    dense = MODEL | {"num_hidden_layers": 5}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [2]}
    frozen = {
        "alike": (),
        "frozen below": ("embed", "layers.0.", "layers.1.", "layers.3."),
        "frozen between": ("layers.2.", "layers.4.mlp"),
        "frozen": ("",),
    }
    for name, parts in frozen.items():
        model = make_model(dense)
        for n, p in model.named_parameters():
            p.requires_grad_(not any(part in n for part in parts))
        yield name, model
    yield "experts in most", make_model(dense | experts | {"model_type": "qwen3_moe"})


@contextlib.contextmanager
def first_layer(model: Any) -> Iterator[None]:
    every, model.model.layers = model.model.layers, model.model.layers[:1]
    yield
    model.model.layers = every


def left_out(model: Any) -> tuple[int, list[str], list[str]]:
    """How many layers stand for all; the kernels that these do not launch; and those that the first does not."""
    with model.one_layer_of_each_kind():
        n_layers = len(model.model.layers)
    few = compiled(model)
    model.one_layer_of_each_kind = contextlib.nullcontext
    every = compiled(model)
    model.one_layer_of_each_kind = lambda: first_layer(model)
    return n_layers, sorted(k[0] for k in every - few), sorted(k[0] for k in every - compiled(model))


def main() -> None:
    pretend()
    model = make_model(MODEL)
    warm = compiled(model)
    kernels = dict(launched(model))
    missing = {name: sorted(k[0] for k in each - warm) for name, each in kernels.items()}
    warmup.SEQUENCES = (((8, 1016),) * 16,)  # type: ignore[assignment]
    control = sorted(k[0] for k in kernels["many"] - compiled(model))
    each = {name: left_out(model) for name, model in unlike()}
    print(
        json.dumps(
            {
                "compiled": len(warm),
                "missing": missing,
                "control": control,
                "left_out": {name: (n_layers, kernels) for name, (n_layers, kernels, _) in each.items()},
                "left_out_control": {name: kernels for name, (_, _, kernels) in each.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
