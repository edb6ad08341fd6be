"""bi_ops' kernels in the layers of a model that a stand-in for vLLM has loaded."""

from __future__ import annotations

import gc
import weakref
from typing import Literal

import pytest
import torch
from fake_vllm import (
    LINEAR,
    WORKER,
    Head,
    Linear,
    Qwen3Attention,
    RMSNorm,
    RotaryEmbedding,
    SiluAndMul,
    UnquantizedLinearMethod,
    Worker,
    installed,
    stock_rms_norm,
)

from bi_ops import activation, matmul, norm, vllm_plugin
from bi_ops.core import runtime
from bi_ops.core import vllm as releases
from bi_ops.vllm_plugin import layers
from bi_ops.vllm_plugin.warmup import row_counts

OWN = {"bi_ops": {"kernels": "vllm"}}


@pytest.fixture(params=["0.26.0", "0.33.0"])
def version(request) -> str:
    return request.param


@pytest.fixture
def vllm(monkeypatch, version):
    if not runtime.INTERPRET:
        pytest.skip("the stand-in for vLLM computes on the CPU")
    with installed(monkeypatch, version) as modules:
        vllm_plugin.register()
        yield modules


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.biased, self.head = Linear(32, 48), Linear(32, 48, bias=True), Head(32, 64)


def loaded(vllm, model, additional_config=None):
    wrapper = vllm[WORKER].WorkerWrapperBase(Worker(model, additional_config))
    wrapper.init_device()
    wrapper.load_model(load_dummy_weights=False)
    assert wrapper.loaded
    return model


def is_stock(y: torch.Tensor) -> bool:
    return bool((y == 7).all())


def test_an_engine_captures_into_memory_of_its_own(vllm):
    """torch refuses the pool of an engine whose graphs are gone, and vLLM has one for all engines of a process."""
    loaded(vllm, Model())
    assert vllm["vllm.platforms"].current_platform._global_graph_pool is None


def test_linear_layers_and_the_head_compute_with_bi_ops(vllm, version):
    model, x = loaded(vllm, Model()), torch.randn(3, 32).bfloat16()
    in_accumulator = releases.RELEASES[version].bias_in_accumulator
    assert in_accumulator is (version == "0.33.0")
    for layer in (model.plain, model.head):
        assert torch.equal(layer(x), matmul.linear(x, layer.weight))
        assert layer(x[None]).shape == (1, 3, layer.weight.shape[0])
    rounded = matmul.linear(x, model.biased.weight) + model.biased.bias
    once = matmul.linear(x, model.biased.weight, model.biased.bias, bias_order="in_accumulator")
    assert not torch.equal(rounded, once)  # the orders are two
    assert torch.equal(model.biased(x), once if in_accumulator else rounded)
    one = model.biased.bias[:1].clone()
    model.biased.bias = torch.nn.Parameter(one.repeat(48), requires_grad=False)
    full = model.biased(x)
    model.biased.bias = torch.nn.Parameter(one, requires_grad=False)  # vLLM expands it
    assert torch.equal(model.biased(x), full)
    with pytest.raises(TypeError, match=r"x is torch.float32 and the weight torch.bfloat16"):
        model.plain(x.float())


def test_vllms_own_kernels_stay_where_they_are_asked_for(vllm):
    x = torch.randn(3, 32).bfloat16()
    model = loaded(vllm, Model(), OWN)
    assert all(is_stock(layer(x)) for layer in model.children())
    other = loaded(vllm, Model())  # another engine of the process
    assert not any(is_stock(layer(x)) for layer in other.children())
    assert all(is_stock(layer(x)) for layer in model.children())
    vllm_plugin.unregister()
    assert all(is_stock(layer(x)) for layer in loaded(vllm, Model()).children())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kernels": "cuda"}, "kernels is 'cuda'; it must be bi_ops or vllm"),
        ({"kernel": "vllm"}, "has kernel; it may"),
        ({"peer_memory": 1}, "peer_memory is 1; it must be true or false"),
    ],
)
def test_what_additional_config_may_hold(vllm, config, message):
    wrapper = vllm[WORKER].WorkerWrapperBase(Worker(Model(), {"bi_ops": config}))
    with pytest.raises(ValueError, match=message):  # before the model is loaded
        wrapper.init_device()


def test_who_computes_can_be_read_off_a_model(vllm, version):
    release = releases.RELEASES[version]
    found = list(layers.attached(loaded(vllm, Model()), release))
    assert [(type(layer), f.operator) for layer, f in found] == [(Linear, "linear")] * 2 + [(Head, "linear")]
    assert list(layers.attached(loaded(vllm, Model(), OWN), release)) == []


@pytest.mark.parametrize("size", [64, 40])
def test_norms_are_one_kernel_with_and_without_a_residual(vllm, size):
    x, residual = torch.randn(3, size).bfloat16(), torch.randn(3, size).bfloat16()
    layer = loaded(vllm, RMSNorm(size, 1e-5))
    before = x.clone(), residual.clone()
    assert torch.equal(layer(x), norm.rms_norm(x, layer.weight.data, 1e-5))
    for a, b in zip(layer(x, residual), norm.add_rms_norm(x, residual, layer.weight.data, 1e-5), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    layer.pass_weight = False
    assert torch.equal(layer(x), norm.rms_norm(x, None, 1e-5))


def test_norms_that_bi_ops_does_not_compute_stay_vllms(vllm, version):
    x, residual = torch.randn(2, 3, 64).bfloat16()
    wide = loaded(vllm, RMSNorm(64, dtype=torch.float32))  # a weight that bi_ops would round
    y, total = wide(x, residual)
    assert torch.equal(y, stock_rms_norm(x + residual, wide.weight.data))
    assert torch.equal(total, x + residual)
    release = releases.RELEASES[version]
    assert list(layers.attached(loaded(vllm, RMSNorm(64, variance_size=32)), release)) == []
    gemma = type("GemmaRMSNorm", (RMSNorm,), {"forward_cuda": lambda self, x, residual=None: x})
    assert list(layers.attached(loaded(vllm, gemma(64)), release)) == []
    derived = type("Derived", (RMSNorm,), {})  # the same method
    assert len(list(layers.attached(loaded(vllm, derived(64)), release))) == 1


def test_activations(vllm):
    x = torch.randn(3, 64).bfloat16()
    layer = loaded(vllm, SiluAndMul())
    assert torch.equal(layer(x), activation.silu_and_mul(x))
    assert is_stock(loaded(vllm, SiluAndMul(), OWN)(x))


@pytest.mark.parametrize("build", [lambda: RMSNorm(64, native=True), lambda: SiluAndMul(native=True)])
def test_operators_that_custom_ops_disables_are_refused(vllm, build):
    with pytest.raises(ValueError, match=r"custom_ops leave (RMSNorm|SiluAndMul) to plain PyTorch"):
        loaded(vllm, build())
    loaded(vllm, build(), OWN)


def test_qwen3_normalises_and_rotates_in_one_kernel(vllm, monkeypatch):
    layer, x, positions = loaded(vllm, Qwen3Attention()), torch.randn(5, 64).bfloat16(), torch.tensor([3, 0, 1, 2, 63])
    apart = Qwen3Attention.forward(layer, positions, x)  # vLLM's forward over the same norms, one by one
    calls, fused = [], norm.qk_norm_rope

    def counted(*args, **options):
        calls.append(options["constant_weight"])
        return fused(*args, **options)

    monkeypatch.setattr(layers, "_qk_norm_rope", counted)
    layer.rotary_emb.cos_sin_cache = layer.rotary_emb.cos_sin_cache.float()
    out = layer(positions, x)
    assert torch.equal(out, layer(positions, x))
    assert calls == [False, True]  # the first call converts the angles, which a graph would write
    assert torch.equal(out, apart)
    assert not torch.equal(out, layer(positions.flip(0), x))
    assert torch.equal(layer(positions[2:3], x[2:3]), out[2:3])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Qwen3Attention(rotary=RotaryEmbedding(32, 16)),
        lambda: Qwen3Attention(eps=1e-5),
        lambda: Qwen3Attention(rotary=type("MRope", (RotaryEmbedding,), {"forward_cuda": lambda *a: a[2:]})(32)),
    ],
    ids=["part of a head", "two epsilons", "another rotation"],
)
def test_an_attention_that_looks_different_keeps_its_norms_and_rotation_apart(vllm, version, build):
    found = layers.operators_of(loaded(vllm, build()), releases.RELEASES[version])
    assert found == {"norm": 2, "linear": 2}


class Fp8LinearMethod(UnquantizedLinearMethod):
    def apply(self, layer, x, bias=None):
        return x


class AutoGPTQLinearMethod(Fp8LinearMethod):
    pass


def test_quantized_layers_are_left_to_vllm_or_refused_by_name(vllm, caplog):
    model, x = Model(), torch.randn(3, 32).bfloat16()
    model.plain.quant_method = Fp8LinearMethod()
    with caplog.at_level("WARNING"):
        loaded(vllm, model)
    assert "quantized with Fp8LinearMethod are left to vLLM" in caplog.text
    assert model.plain(x) is x
    model = Model()
    model.biased.quant_method = AutoGPTQLinearMethod()
    with pytest.raises(ValueError, match=r"biased is quantized with AutoGPTQLinearMethod, .*kernels"):
        loaded(vllm, model)
    assert is_stock(model.plain(x))
    assert is_stock(loaded(vllm, Model(), OWN).plain(x))


def test_every_gemm_runs_before_the_profile_run_and_never_for_the_first_time_later(vllm, monkeypatch, caplog):
    """Verification and compilation happen at the first call of a shape."""
    ran, verified, stock = [], [], matmul.inference_linear

    def linear(x, weight, *args, **kwargs):
        ran.append((*x.shape, len(weight)))
        return stock(x, weight, *args, **kwargs)

    def warmup():
        verified.append(len(ran))
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(matmul, "inference_linear", linear)
    monkeypatch.setattr(matmul, "warmup", warmup)
    wrapper = vllm[WORKER].WorkerWrapperBase(Worker(Model()))
    wrapper.init_device()
    wrapper.load_model()
    assert not ran
    runner = wrapper.worker.model_runner
    runner.profile_run(randomize_inputs=True)
    assert runner.profiled == [True]
    assert "GEMMs of many rows run in Triton, more slowly: no compiler is here" in caplog.text
    sweep = len(row_counts(4)) * 2 + len(row_counts(2))
    assert verified == [sweep + 3]  # compiled; then each shape once, before the sweep over rows
    assert sorted(r for r, *_ in ran[sweep : sweep + 3]) == [2, 4, 4]  # of the most rows: few are never cuBLASLt's
    assert ran[:sweep] == ran[sweep + 3 :]
    assert {r for r, k, n in ran if n == 48} == {1, 2, 3, 4}
    assert {r for r, k, n in ran if n == 64} == {1, 2}  # the head: a row per sequence
    runner.profile_run()
    assert len(ran) == 2 * sweep + 3
    assert runner.profiled == [True, False]


def test_a_worker_is_gone_with_its_engine(vllm):
    """And CUDA graphs with it: another engine of the process captures into the same pool."""
    gc.collect()
    gc.disable()
    try:
        wrapper = vllm[WORKER].WorkerWrapperBase(Worker(Model(), OWN))
        wrapper.init_device()
        wrapper.load_model()
        wrapper.worker.model_runner.profile_run()
        left = weakref.ref(wrapper.worker)
        assert left() is not None
        del wrapper
        assert left() is None
    finally:
        gc.enable()


def test_row_counts_meet_both_sides_of_each_power_of_two():
    assert row_counts(1) == [1]
    assert row_counts(20) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 20]


def test_a_method_that_looks_different_is_refused_before_anything_is_patched(monkeypatch, version):
    with installed(monkeypatch, version) as modules:
        different = type("UnquantizedLinearMethod", (), {"apply": lambda self, layer, x: x})
        monkeypatch.setattr(modules[LINEAR], "UnquantizedLinearMethod", different)
        with pytest.raises(
            RuntimeError, match=r"UnquantizedLinearMethod\.apply has parameters \('self', 'layer', 'x'\)"
        ):
            vllm_plugin.register()
        assert not vllm_plugin.is_registered()


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_have_the_bits_of_vllms_batch_invariant_kernel(device, dtype):
    release, stock = releases.require("test"), releases.batch_invariant_module().linear_batch_invariant
    weight = torch.randn(1536, 1024, dtype=dtype, device=device)
    bias = torch.randn(1536, dtype=dtype, device=device)
    order = release.bias_order
    other: Literal["in_accumulator", "after_rounding"] = (
        "after_rounding" if order == "in_accumulator" else "in_accumulator"
    )
    for rows in (1, 2, 17, 64, 300):
        x = torch.randn(rows, 1024, dtype=dtype, device=device)
        assert torch.equal(matmul.linear(x, weight), stock(x, weight))
        assert torch.equal(matmul.linear(x, weight, bias, bias_order=order), stock(x, weight, bias))
    assert not torch.equal(matmul.linear(x, weight, bias, bias_order=other), stock(x, weight, bias))  # control
