"""Mixtures of experts in a stand-in for vLLM: the router and the experts compute with bi_ops, others are refused."""

from __future__ import annotations

import pytest
import torch
from fake_vllm import WORKER, Head, Linear, Worker, installed
from fake_vllm_moe import CutlassExperts, SparseMoeBlock, TritonExperts
from tiny import tiny_config, tiny_moe_config, tiny_moe_model

from bi_ops import matmul, moe, vllm_plugin
from bi_ops.core import runtime
from bi_ops.core import vllm as releases
from bi_ops.rollout.vllm_checks import check_tensor_parallel
from bi_ops.rollout.vllm_weights import copy_weights, named_as_vllm


@pytest.fixture(params=["0.26.0", "0.33.0"])
def vllm(monkeypatch, request):
    if not runtime.INTERPRET:
        pytest.skip("the stand-in for vLLM computes on the CPU")
    with installed(monkeypatch, request.param) as modules:
        vllm_plugin.register()
        yield modules


def loaded(vllm, block, kernels="bi_ops"):
    model = torch.nn.Module()
    model.mlp, model.head = block, Head(32, 64)
    wrapper = vllm[WORKER].WorkerWrapperBase(Worker(model, {"bi_ops": {"kernels": kernels}}))
    wrapper.init_device()
    wrapper.load_model(load_dummy_weights=False)
    return model, vllm_plugin.operators_of(model, releases.require("test"))


def test_router_and_experts_compute_with_bi_ops(vllm):
    model, found = loaded(vllm, SparseMoeBlock(Linear(32, 4)))
    assert found == {"linear": 2, "router": 1, "experts": 1}
    x, routed = torch.randn(5, 32).bfloat16(), model.mlp.experts.routed_experts
    weights, ids = moe.router(matmul.linear(x, model.mlp.gate.weight), 2, normalize=True)
    assert torch.equal(model.mlp(x), moe.experts(x, routed.w13_weight, routed.w2_weight, weights, ids))


def test_the_router_is_bi_ops_where_vllms_kernels_are_asked_for(vllm):
    model, found = loaded(vllm, SparseMoeBlock(Linear(32, 4)), kernels="vllm")
    assert found == {"router": 1}
    x = torch.randn(5, 32).bfloat16()
    assert (model.mlp(x) == 7).all()
    logits = torch.randn(5, 4).bfloat16()
    got = model.mlp.experts.router.select_experts(x, logits, torch.int64)
    expected = moe.router(logits, 2, normalize=True)
    assert got[1].dtype == torch.int64
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].int(), expected[1])


def test_their_kernels_compile_before_the_profile_run(vllm):
    model = torch.nn.Module()
    model.mlp = SparseMoeBlock(Linear(32, 4))
    worker = Worker(model)
    wrapper = vllm[WORKER].WorkerWrapperBase(worker)
    wrapper.init_device()
    wrapper.load_model(load_dummy_weights=False)
    called = []
    for layer, slot in ((model.mlp.experts.router, "_compute_routing"), (model.mlp.experts.routed_experts, "apply")):
        holder = getattr(layer, "quant_method", layer)
        function = getattr(holder, slot)

        def counted(*args, function=function):
            called.append((function.operator, len(args[1])))
            return function(*args)

        counted.operator = function.operator  # type: ignore[attr-defined]
        setattr(holder, slot, counted)
    worker.model_runner.profile_run()
    assert worker.model_runner.profiled == [False]
    assert {rows for operator, rows in called if operator == "router"} == {1, 2, 3, 4}
    assert {rows for operator, rows in called if operator == "experts"} == {1, 2, 3, 4}


@pytest.mark.parametrize("kernels", ["bi_ops", "vllm"])
def test_experts_of_an_unknown_order_are_refused_by_name(vllm, kernels):
    with pytest.raises(ValueError, match=r"mlp\.experts\.routed_experts computes its experts with CutlassExperts"):
        loaded(vllm, SparseMoeBlock(Linear(32, 4), experts_cls=CutlassExperts), kernels)


def test_quantized_experts_of_a_known_kernel_are_left_to_vllm_with_a_warning(vllm, caplog):
    block = SparseMoeBlock(Linear(32, 4))
    method = type("Fp8MoEMethod", (torch.nn.Module,), {"experts_cls": TritonExperts})()
    block.experts.routed_experts.quant_method = method
    with caplog.at_level("WARNING", "vllm.bi_ops"):
        assert loaded(vllm, block)[1] == {"linear": 2, "router": 1}
    assert "experts quantized with Fp8MoEMethod are left to vLLM" in caplog.text


@pytest.mark.parametrize("change", [{"swiglu_limit": 7.0}, {"apply_router_weight_on_input": True}])
def test_experts_that_bi_ops_does_not_compute_stay_vllms(vllm, change):
    model, found = loaded(vllm, SparseMoeBlock(Linear(32, 4), **change))
    assert found == {"linear": 2, "router": 1}
    assert (model.mlp(torch.randn(5, 32).bfloat16()) == 7).all()


def test_shared_experts_stay_vllms(vllm):
    model, _ = loaded(vllm, SparseMoeBlock(Linear(32, 4), shared_experts=torch.nn.Identity()))
    assert (model.mlp(torch.randn(5, 32).bfloat16()) == 7).all()


def test_a_sigmoid_router_stays_vllms(vllm):
    block = SparseMoeBlock(Linear(32, 4))
    block.experts.router.scoring_func = "sigmoid"
    assert loaded(vllm, block)[1] == {"linear": 2, "experts": 1}


def test_weights_go_over_under_vllms_names():
    """As vLLM's own parameters are called and shaped, in its fused layout."""
    model = tiny_moe_model()
    named = named_as_vllm(model)
    prefix = "model.layers.0.mlp.experts.routed_experts"
    assert named[f"{prefix}.w13_weight"].shape == (4, 32, 32)
    assert named[f"{prefix}.w2_weight"].shape == (4, 32, 16)
    target = torch.nn.Module()
    block = target.block = torch.nn.Module()
    for name in ("w13_weight", "w2_weight"):
        own = torch.zeros(named[f"{prefix}.{name}"].shape, dtype=torch.bfloat16)
        block.register_parameter(name, torch.nn.Parameter(own))
    source = {f"block.{n}": named[f"{prefix}.{n}"].detach().cpu() for n in ("w13_weight", "w2_weight")}
    copy_weights(source, target)
    for n, p in target.named_parameters():
        assert torch.equal(p, source[n].bfloat16())
    assert len(named) == len(list(model.parameters()))


def test_experts_that_ranks_cannot_share_are_refused_before_vllm_starts():
    config = tiny_moe_config()
    for expert_parallel in (False, True):
        for size in (1, 2):
            check_tensor_parallel("VllmEngine", config, size, expert_parallel)
    odd = {"num_experts": 3, "moe_intermediate_size": 17}
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide the model's moe_intermediate_size 17"):
        check_tensor_parallel("VllmEngine", tiny_moe_config(**odd), 2)
    with pytest.raises(ValueError, match="does not divide the model's num_experts 3"):
        check_tensor_parallel("VllmEngine", tiny_moe_config(**odd), 2, True)
    with pytest.raises(ValueError, match="Qwen3Config has no experts; leave it out"):
        check_tensor_parallel("VllmEngine", tiny_config(), 2, True)
