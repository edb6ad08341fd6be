"""A module tree that stands in for vLLM, as far as the plugin and the engine read it."""

# Modules are made and filled here.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import fake_vllm_host
import fake_vllm_moe
import fake_vllm_parallel
import fake_vllm_sampling
import torch

from bi_ops import rope, vllm_plugin
from bi_ops.core import vllm

LAYERNORM = "vllm.model_executor.layers.layernorm"
SELECTOR = "vllm.v1.attention.selector"
REGISTRY = "vllm.v1.attention.backends.registry"
VERSION = "vllm.v1.attention.backends.fa_utils"
ARGUMENTS = "vllm.engine.arg_utils"
CONFIG = "vllm.config"
WORKER = "vllm.v1.worker.worker_base"
LINEAR = "vllm.model_executor.layers.linear"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
ACTIVATION = "vllm.model_executor.layers.activation"
ROTARY = "vllm.model_executor.layers.rotary_embedding.base"
QWEN3 = "vllm.model_executor.models.qwen3"
SAMPLER = "vllm.v1.sample.sampler"
LAYERS = (LINEAR, EMBEDDING, ACTIVATION, ROTARY, QWEN3)


def stock_rms_norm(input, weight, eps=1e-6, residual=None):
    """vLLM's function as far as callers see it: with a residual it writes both inputs in place."""
    if residual is not None:
        residual.add_(input)
        input.copy_(stock_rms_norm(residual, weight, eps))
        return input, residual
    wide = input.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(input.dtype)


@functools.cache
def stock_choice(backend, attn_selector_config, num_heads=None):
    """vLLM's choice of an attention backend until 0.30, cached as there."""
    return types.SimpleNamespace(get_name=lambda: backend)


@functools.cache
def stock_choice_by_cache(backend, attn_selector_config, num_heads=None, *, _run_kv_cache_dtype=None):
    """The same since 0.31."""
    return types.SimpleNamespace(get_name=lambda: backend)


CHOICES = {
    v: stock_choice_by_cache if "_run_kv_cache_dtype" in r.choose_backend else stock_choice
    for v, r in vllm.RELEASES.items()
}


class EngineArgs:
    """vLLM's arguments of an engine, as far as the plugin reads them."""

    def __init__(self, mode=None, cudagraph_mode=None, enforce_eager=False, **others):
        sizes = others.get("sizes", [])
        self.compilation_config = types.SimpleNamespace(
            **{"mode": mode, "cudagraph_mode": cudagraph_mode, "cudagraph_capture_sizes": list(sizes)},
            max_cudagraph_capture_size=max(sizes, default=0),
        )
        self.enforce_eager = enforce_eager
        self.speculative_config, self.enable_lora = others.get("speculative_config"), others.get("enable_lora", False)
        self.model, self.quantization = "./checkpoint", others.get("quantization")
        self.additional_config, self.text = others.get("additional_config", {}), others.get("text")


def create_engine_config(self, usage_context=None, headless=False):
    """What vLLM would run."""
    model = types.SimpleNamespace(model=self.model, quantization=self.quantization, hf_text_config=self.text)
    return types.SimpleNamespace(
        compilation_config=self.compilation_config,
        model_config=model,
        additional_config=self.additional_config,
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=8192),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
    )


class Slot:
    """One of vLLM's attention backends."""

    def __init__(self, slots, name):
        self.name = name
        self.is_overridden = lambda: name in slots
        self.get_path = lambda: slots.get(name)
        self.clear_override = lambda: slots.pop(name, None)
        self.put = lambda path: slots.update({name: path})


class UnquantizedLinearMethod:
    """vLLM's method of a linear layer; a layer has one of its own."""

    def apply(self, layer, x, bias=None):
        """Another result than that of any GEMM, so that who computes is seen."""
        return torch.full((*x.shape[:-1], layer.weight.shape[0]), 7.0, dtype=x.dtype)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    """That of an embedding, for the logits."""

    def apply(self, layer, x, bias=None):
        """As above."""
        return UnquantizedLinearMethod.apply(self, layer, x, bias)


class Parameter(torch.nn.Parameter):
    """vLLM's parameters are of a subclass."""


class Linear(torch.nn.Module):
    """vLLM's linear layer: its method computes."""

    def __init__(self, k, n, bias=False, method=UnquantizedLinearMethod, dtype=torch.bfloat16):
        super().__init__()
        self.weight = Parameter(torch.randn(n, k).to(dtype), requires_grad=False)
        self.bias = Parameter(torch.randn(n).to(dtype), requires_grad=False) if bias else None
        self.quant_method = method()

    def forward(self, x):
        """x [..., K] -> [..., N]"""
        return self.quant_method.apply(self, x, self.bias)


class Head(Linear):
    """vLLM's LM head."""

    def __init__(self, k, n):
        super().__init__(k, n, method=UnquantizedEmbeddingMethod)
        self.num_embeddings = n


class CustomOp(torch.nn.Module):
    """vLLM's operators choose a method when they are built. native: custom_ops leaves the operator to PyTorch."""

    forward_native: Callable[..., Any]
    forward_cuda: Callable[..., Any]

    def __init__(self, native=False):
        super().__init__()
        self._forward_method = self.forward_native if native else self.forward_cuda

    def forward(self, *args):
        """As chosen."""
        return self._forward_method(*args)


class RMSNorm(CustomOp):
    """vLLM's norm."""

    def __init__(self, size, eps=1e-6, native=False, variance_size=None, dtype=torch.bfloat16):
        super().__init__(native)
        self.weight = torch.nn.Parameter(torch.randn(size).to(dtype))
        self.variance_epsilon, self.variance_size_override = eps, variance_size
        self.pass_weight = self.pass_weight_add = True

    def forward_native(self, x, residual=None):
        """Seen as nobody else's."""
        return x + 7

    def forward_cuda(self, x, residual=None):
        """As the module of batch-invariant kernels has it."""
        return sys.modules[LAYERNORM].rms_norm_batch_invariant(x, self.weight.data, self.variance_epsilon, residual)


class SiluAndMul(CustomOp):
    """vLLM's activation."""

    @staticmethod
    def forward_native(x):
        """PyTorch's."""
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def forward_cuda(self, x):
        """Seen as nobody else's."""
        return x[..., : x.shape[-1] // 2] * 0 + 7


class RotaryEmbedding(CustomOp):
    """vLLM's rotation."""

    def __init__(self, size, rotary_dim=None):
        super().__init__()
        self.is_neox_style, self.rotary_dim, self.use_flashinfer = True, rotary_dim or size, False
        self.cos_sin_cache = rope.cos_sin_cache(self.rotary_dim, 64, dtype=torch.float32)

    def forward_native(self, positions, query, key):
        """None."""
        raise AssertionError

    def forward_cuda(self, positions, query, key):
        """query, key: [T, heads * size], rotated."""
        cache = self._match_cos_sin_cache_dtype(query)
        return [rope.apply_rope(t.unflatten(1, (-1, 32)), positions.flatten(), cache).flatten(1) for t in (query, key)]

    def _match_cos_sin_cache_dtype(self, query):
        self.cos_sin_cache = self.cos_sin_cache.to(query.dtype)
        return self.cos_sin_cache


class Pair(torch.nn.Module):
    """A linear layer of vLLM's returns its bias too."""

    def __init__(self, k, n):
        super().__init__()
        self.linear = Linear(k, n)

    def forward(self, x):
        """(x [T, K] -> [T, N], None)"""
        return self.linear(x), None


class Qwen3Attention(torch.nn.Module):
    """vLLM's, whose attention itself is a sum of what it is given, which no order changes."""

    def __init__(self, hidden=64, heads=4, kv_heads=2, rotary=None, eps=1e-6):
        super().__init__()
        self.head_dim, self.num_heads, self.rotary_emb = 32, heads, rotary or RotaryEmbedding(32)
        self.q_size, self.kv_size = heads * 32, kv_heads * 32
        self.qkv_proj, self.o_proj = Pair(hidden, self.q_size + 2 * self.kv_size), Pair(self.q_size, hidden)
        self.q_norm, self.k_norm = RMSNorm(32), RMSNorm(32, eps)

    def attn(self, q, k, v):
        """[T, q_size]"""
        both = (k + v).unflatten(1, (-1, 1, 32)).expand(-1, -1, q.shape[1] // k.shape[1], -1)
        return q + both.flatten(1)

    def forward(self, positions, hidden_states):
        """As vLLM spells it."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(1, (-1, self.head_dim))).flatten(1)
        k = self.k_norm(k.unflatten(1, (-1, self.head_dim))).flatten(1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class Sampler:
    """vLLM's v1 sampler."""

    @staticmethod
    def compute_logprobs(logits):
        """As the v1 runner has it."""
        return logits.float().log_softmax(-1)

    def forward(self, logits):
        """Calls it as a method."""
        return self.compute_logprobs(logits)


class ModelRunner:
    """Runs the model."""

    def __init__(self, model, vllm_config):
        self.vllm_config, self.device, self.model, self.profiled = vllm_config, torch.device("cpu"), model, []

    def get_model(self):
        """The model."""
        return self.model

    def profile_run(self, randomize_inputs=False):
        """A forward of the most tokens, whose memory is measured."""
        self.profiled.append(randomize_inputs)


class Worker:
    """vLLM's worker, which loads `model`."""

    def __init__(self, model, additional_config=None):
        scheduler = types.SimpleNamespace(max_num_batched_tokens=4, max_num_seqs=2)
        cache = types.SimpleNamespace(block_size=16)
        model_config = types.SimpleNamespace(get_vocab_size=lambda: 64, dtype=torch.bfloat16)
        self.vllm_config = types.SimpleNamespace(
            additional_config=additional_config or {},
            scheduler_config=scheduler,
            cache_config=cache,
            model_config=model_config,
            use_v2_model_runner=False,
        )
        self.model_runner = ModelRunner(model, self.vllm_config)
        self.loaded = False

    def load_model(self, *, load_dummy_weights=False):
        """Load the model."""
        self.loaded = True


class WorkerWrapperBase:
    """What vLLM's executors call: it makes the worker, and hands on what it does not define."""

    def __init__(self, worker):
        self.worker, self.vllm_config = worker, worker.vllm_config

    def __getattr__(self, name):
        return getattr(self.worker, name)


def init_device(self):
    """Done."""


class Slots(dict):
    """vLLM's enumeration of backends: the paths that are registered."""

    def __getitem__(self, name):
        return Slot(self, name)


def override_envs_for_invariance():
    """vLLM's mode: one channel of NCCL, and no multicast."""
    os.environ.update({"NCCL_MAX_NCHANNELS": "1", "NCCL_ALGO": "allreduce:tree", "NCCL_NVLS_ENABLE": "0"})


@contextlib.contextmanager
def installed(monkeypatch, version="0.26.0"):
    """Yields the modules of a fake vLLM in batch-invariant mode; the real one, if installed, is put aside."""
    origin = vllm.RELEASES[version].batch_invariant
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    modules = {}
    packages = [
        "vllm",
        "vllm.engine",
        "vllm.envs",
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.v1",
        "vllm.v1.worker",
        "vllm.v1.sample",
        "vllm.v1.core",
        "vllm.v1.core.sched",
        "vllm.platforms",
        "vllm.v1.engine",
        "vllm.model_executor.models",
        "vllm.model_executor.layers.rotary_embedding",
    ]
    packages += ("vllm.model_executor.determinism", "vllm.v1.attention", "vllm.v1.attention.backends")
    named = (LAYERNORM, SELECTOR, REGISTRY, VERSION, ARGUMENTS, CONFIG, WORKER, *LAYERS, SAMPLER)
    for name in (*packages, origin, *named, *fake_vllm_host.PLACES):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(modules[parent], child, module)
    fake_vllm_sampling.install(monkeypatch, modules, version)
    modules["vllm.platforms"].current_platform = type("CudaPlatform", (), {"_global_graph_pool": (0, 1)})()
    modules["vllm.envs"].VLLM_BATCH_INVARIANT = True
    modules["vllm.envs"].VLLM_ENABLE_V1_MULTIPROCESSING = False
    model = types.SimpleNamespace(hf_config=types.SimpleNamespace(to_dict=lambda: {}), dtype=torch.bfloat16)
    modules[CONFIG].get_current_vllm_config_or_none = lambda: types.SimpleNamespace(model_config=model)
    modules[origin].rms_norm_batch_invariant = modules[LAYERNORM].rms_norm_batch_invariant = stock_rms_norm
    modules[origin].override_envs_for_invariance = override_envs_for_invariance
    modules[SELECTOR]._cached_get_attn_backend = CHOICES[version]
    modules[ARGUMENTS].EngineArgs = type("EngineArgs", (EngineArgs,), {"create_engine_config": create_engine_config})
    modules[WORKER].WorkerWrapperBase = type("WorkerWrapperBase", (WorkerWrapperBase,), {"init_device": init_device})
    for place, made in ((place, made) for place, all_made in fake_vllm_host.PLACES.items() for made in all_made):
        functions = {name: value for name, value in vars(made).items() if inspect.isfunction(value)}
        setattr(modules[place], made.__name__, type(made.__name__, (made,), functions))
    modules[LINEAR].UnquantizedLinearMethod = UnquantizedLinearMethod
    modules[EMBEDDING].UnquantizedEmbeddingMethod = UnquantizedEmbeddingMethod
    fake_vllm_parallel.install(monkeypatch, modules, modules[LINEAR], modules[EMBEDDING])
    fake_vllm_moe.install(monkeypatch, modules)
    modules[LAYERNORM].RMSNorm, modules[ACTIVATION].SiluAndMul = RMSNorm, SiluAndMul
    modules[ROTARY].RotaryEmbedding, modules[QWEN3].Qwen3Attention = RotaryEmbedding, Qwen3Attention
    own = {"compute_logprobs": Sampler.__dict__["compute_logprobs"]}
    modules[SAMPLER].Sampler = type("Sampler", (Sampler, modules[SAMPLER].Sampler), own)
    modules["vllm.config"].CompilationMode = types.SimpleNamespace(NONE="NONE")
    modules["vllm.config"].CUDAGraphMode = types.SimpleNamespace(FULL="FULL")
    modules[VERSION].get_flash_attn_version = lambda head_size: 3
    modules[REGISTRY].AttentionBackendEnum = Slots()
    modules[REGISTRY].register_backend = lambda slot, path: slot.put(path)
    real_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version if n == "vllm" else real_version(n))
    vllm.installed.cache_clear()
    try:
        yield modules
    finally:
        vllm_plugin.unregister()
        vllm.installed.cache_clear()


def write_sources(root, release):
    """Writes the points of a release as Python sources under `root`; layernorm.py imports the norm by name."""
    bodies: dict[str, list[str]] = {}
    for point in (*vllm_plugin.patches_of(release), *vllm_plugin.kernels_of(release)):
        owner, _, name = point.attribute.rpartition(".")
        function = f"def {name}({', '.join(point.parameters)}): ..."
        if point.module == LAYERNORM and not owner:
            function = f"from {release.batch_invariant} import {name}"
        body = bodies.setdefault(point.module, [])
        if owner and f"class {owner}:" in body:
            body.insert(body.index(f"class {owner}:") + 1, f"    {function}")
        else:
            body += [f"class {owner}:", f"    {function}"] if owner else [function]
    for module, body in bodies.items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(body) + "\n")
