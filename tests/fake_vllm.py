"""A module tree that stands in for vLLM, as far as the plugin and the engine read it."""

# Modules are made and filled here.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import sys
import types

import torch

from bi_ops import vllm_plugin
from bi_ops.core import vllm

LAYERNORM = "vllm.model_executor.layers.layernorm"
SELECTOR = "vllm.v1.attention.selector"
REGISTRY = "vllm.v1.attention.backends.registry"
VERSION = "vllm.v1.attention.backends.fa_utils"
ARGUMENTS = "vllm.engine.arg_utils"
CONFIG = "vllm.config"
WORKER = "vllm.v1.worker.gpu_worker"
LINEAR = "vllm.model_executor.layers.linear"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"


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

    def __init__(self, mode=None, cudagraph_mode=None, enforce_eager=False):
        self.compilation_config = types.SimpleNamespace(mode=mode, cudagraph_mode=cudagraph_mode)
        self.enforce_eager = enforce_eager


def create_engine_config(self, usage_context=None, headless=False):
    """What vLLM would run: the compilation mode and the graphs."""
    return self.compilation_config.mode, self.compilation_config.cudagraph_mode


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


class Worker:
    """vLLM's worker, which loads `model`."""

    def __init__(self, model, additional_config=None):
        scheduler = types.SimpleNamespace(max_num_batched_tokens=4, max_num_seqs=2)
        self.vllm_config = types.SimpleNamespace(additional_config=additional_config or {}, scheduler_config=scheduler)
        self.model_runner = types.SimpleNamespace(get_model=lambda: model)
        self.loaded = False


def load_model(self, *, load_dummy_weights=False):
    """Load the model."""
    self.loaded = True


class Slots(dict):
    """vLLM's enumeration of backends: the paths that are registered."""

    def __getitem__(self, name):
        return Slot(self, name)


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
    ]
    packages += ("vllm.model_executor.determinism", "vllm.v1.attention", "vllm.v1.attention.backends")
    for name in (
        *packages,
        origin,
        LAYERNORM,
        SELECTOR,
        REGISTRY,
        VERSION,
        ARGUMENTS,
        CONFIG,
        WORKER,
        LINEAR,
        EMBEDDING,
    ):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(modules[parent], child, module)
    modules["vllm.envs"].VLLM_BATCH_INVARIANT = True
    modules["vllm.envs"].VLLM_ENABLE_V1_MULTIPROCESSING = False
    model = types.SimpleNamespace(hf_config=types.SimpleNamespace(to_dict=lambda: {}), dtype=torch.bfloat16)
    modules[CONFIG].get_current_vllm_config_or_none = lambda: types.SimpleNamespace(model_config=model)
    modules[origin].rms_norm_batch_invariant = modules[LAYERNORM].rms_norm_batch_invariant = stock_rms_norm
    modules[SELECTOR]._cached_get_attn_backend = CHOICES[version]
    modules[ARGUMENTS].EngineArgs = type("EngineArgs", (EngineArgs,), {"create_engine_config": create_engine_config})
    modules[WORKER].Worker = type("Worker", (Worker,), {"load_model": load_model})
    modules[LINEAR].UnquantizedLinearMethod = UnquantizedLinearMethod
    modules[EMBEDDING].UnquantizedEmbeddingMethod = UnquantizedEmbeddingMethod
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
        body.append(f"class {owner}:\n    {function}\n" if owner else f"{function}\n")
    for module, body in bodies.items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(body))
