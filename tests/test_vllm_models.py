"""Models beyond Qwen3 in vLLM: what bi_ops computes in their layers, and what is left to vLLM by its sources."""

from __future__ import annotations

import ast

import pytest
import torch
from fake_vllm import WORKER, CustomOp, Linear, RMSNorm, Worker, installed

from bi_ops import norm, vllm_plugin
from bi_ops.core import runtime
from bi_ops.core import vllm as releases
from bi_ops.vllm_plugin import sources


@pytest.fixture(params=["0.26.0", "0.33.0"])
def vllm(monkeypatch, request):
    if not runtime.INTERPRET:
        pytest.skip("the stand-in for vLLM computes on the CPU")
    with installed(monkeypatch, request.param) as modules:
        vllm_plugin.register()
        yield modules


class GemmaRMSNorm(CustomOp):
    """vLLM's, of torch's operators."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size).bfloat16())

    def forward_native(self, x, residual=None):
        """x [..., size]"""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.float())).to(x.dtype)

    def forward_cuda(self, x, residual=None):
        """As vLLM has it."""
        return self.forward_native(x, residual)


class TPAwareRMSNorm(RMSNorm):
    """A norm that vLLM puts into a model of transformers, which derives from its own."""

    def forward(self, x, residual=None):
        """x [1, T, size], as transformers' models have it."""
        return super().forward(x, residual)


class GateLinear(Linear):
    """The router of a mixture of experts, which derives from a linear layer."""

    def __init__(self, k, n, **chosen):
        super().__init__(k, n)
        self.allow_specialized_router_gemm, self.allow_ll_bf16_gemm = True, False
        vars(self).update(chosen)


def test_layers_that_derive_from_vllms_compute_with_bi_ops_and_others_stay(vllm):
    model = torch.nn.Module()
    model.norm, model.gate, model.gemma = TPAwareRMSNorm(64), GateLinear(64, 8), GemmaRMSNorm(64)
    x = torch.randn(1, 5, 64).bfloat16()
    before = model.gemma(x)
    wrapper = vllm[WORKER].WorkerWrapperBase(Worker(model))
    wrapper.init_device()
    wrapper.load_model(load_dummy_weights=False)
    assert vllm_plugin.operators_of(model, releases.require("test")) == {"norm": 1, "linear": 1}
    assert torch.equal(model.norm(x), norm.rms_norm(x, model.norm.weight, 1e-6))
    scores = model.gate(x)
    assert scores.shape == (1, 5, 8)
    assert not (scores == 7).all()
    assert torch.equal(model.gemma(x), before)


@pytest.mark.parametrize("kernels", ["bi_ops", "vllm"])
def test_a_router_that_counts_tokens_is_refused_by_name(vllm, kernels):
    def loaded(**chosen):
        model = torch.nn.Module()
        model.mlp = torch.nn.Module()
        model.mlp.gate = GateLinear(64, 8, **chosen)
        wrapper = vllm[WORKER].WorkerWrapperBase(Worker(model, {"bi_ops": {"kernels": kernels}}))
        wrapper.init_device()
        wrapper.load_model(load_dummy_weights=False)

    loaded()
    message = r"vllm_plugin: mlp\.gate picks its GEMM by the number of tokens \(ll_bf16_gemm, cublas_router_gemm\)"
    with pytest.raises(ValueError, match=message):
        loaded(allow_ll_bf16_gemm=True, allow_cublas_router_gemm=True)


# --------------------------------------------------------------------------------------------------------------
# vLLM's sources, wherever they are found


def body_of(module: str, attribute: str) -> str:
    """The source of a function or Class.method, of a class, or of a module ("")."""
    root = sources.installed_root()
    if root is None:
        pytest.skip("no sources of vLLM")
    body = sources.statements(root, module)
    for name in filter(None, attribute.split(".")):
        [found] = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        body = found.body
    return "\n".join(ast.unparse(n) for n in body)


LAYERS, MODELS = "vllm.model_executor.layers", "vllm.model_executor.models"
#: Module, function and what its source says: why vLLM's own kernel does not depend on the batch.
SAYS = [
    (f"{LAYERS}.layernorm", "GemmaRMSNorm.forward_cuda", "return self.forward_native(x, residual)"),
    ("vllm.ir.ops.layernorm", "rms_norm", "x_var.pow(2).mean(dim=-1, keepdim=True)"),
    ("vllm.ir.ops.layernorm", "fused_add_rms_norm", "x_var.pow(2).mean(dim=-1, keepdim=True)"),
    ("vllm.kernels.vllm_c", "", "weight is None or weight.dtype == x.dtype"),  # never Gemma's, which are fp32
    (f"{LAYERS}.rotary_embedding.phi3_long_rope_scaled_rope", "", "max_model_len > original_max_position_embeddings"),
    (f"{LAYERS}.fused_moe.fused_moe", "get_default_config", "if envs.VLLM_BATCH_INVARIANT:\n    return {"),
    (f"{LAYERS}.fused_moe.fused_moe", "get_moe_configs", "if envs.VLLM_BATCH_INVARIANT:\n    return None"),
    (f"{LAYERS}.fused_moe.experts.triton_moe", "TritonExperts._supports_batch_invariance", "return True"),
    (f"{LAYERS}.fused_moe.experts.triton_moe", "TritonExperts", "self.moe_sum("),
    (f"{LAYERS}.fused_moe.oracle.unquantized", "_get_priority_backends", "is_device_capability_family(90)"),
    (f"{LAYERS}.fused_moe.unquantized_fused_moe_method", "", "layer.register_parameter('w13_weight', w13_weight)"),
    (f"{LAYERS}.fused_moe.router.fused_topk_router", "FusedTopKRouter._compute_routing", "fused_topk(hidden_states="),
    (f"{LAYERS}.fused_moe.modular_kernel", "FusedMoEExperts", "envs.VLLM_BATCH_INVARIANT and (not cls._supports_batch"),
    (f"{MODELS}.registry", "", "'Olmo2ForCausalLM': ('transformers', 'TransformersForCausalLM')"),
    (f"{MODELS}.gpt_oss", "OAIAttention", "sinks=self.sinks"),
    (f"{LAYERS}.quantization.mxfp4", "", "'gpt_oss_mxfp4'"),
]


@pytest.mark.parametrize(("module", "attribute", "text"), SAYS, ids=[f"{m.rpartition('.')[2]}.{a}" for m, a, _ in SAYS])
def test_vllms_own_kernels_that_models_rely_on(module, attribute, text):
    assert text in body_of(module, attribute)


def test_vllms_mode_replaces_the_mean_that_gemmas_norms_take():
    if sources.installed_root() is None:
        pytest.skip("no sources of vLLM")
    release = releases.require("test")
    body = body_of(release.batch_invariant, "enable_batch_invariant_mode")
    assert "impl('aten::mean.dim', mean_batch_invariant, key)" in body
    assert "tl.program_id(0)" in body_of(release.batch_invariant, "mean_kernel")


def test_routers_of_which_releases_count_tokens():
    """GateLinear's attributes say so; 0.33 turns them off in the batch-invariant mode."""
    text = body_of(f"{LAYERS}.fused_moe.router.gate_linear", "GateLinear")
    assert "self.allow_ll_bf16_gemm and x.shape[0] <=" in text
    assert {f"self.allow_{tier}_gemm" in text for tier in ("ll_bf16", "fp32_router", "cublas_router")} == {True}
    if releases.require("test").version == "0.33.0":
        assert "and (not batch_invariant)" in text


def test_longrope_looks_at_no_batch():
    """Earlier releases chose the factors by the largest position of a batch."""
    name = "rotary_embedding.phi3_long_rope_scaled_rope"
    body = body_of(f"{LAYERS}.{name}", "Phi3LongRoPEScaledRotaryEmbedding.forward")
    assert "torch.any" not in body
    assert ".max(" not in body
