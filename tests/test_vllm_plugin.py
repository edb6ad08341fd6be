"""The vLLM plugin against a stand-in module tree: what it replaces, gives back and refuses."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.metadata
import inspect
import os
import re
import sys
from collections import namedtuple

import pytest
import torch
from fake_vllm import (
    ARGUMENTS,
    CHOICES,
    CONFIG,
    LAYERNORM,
    REGISTRY,
    SAMPLER,
    SELECTOR,
    VERSION,
    WORKER,
    Sampler,
    create_engine_config,
    init_device,
    installed,
    stock_rms_norm,
    write_sources,
)
from tiny import tiny_config

from bi_ops import vllm_plugin
from bi_ops.core import runtime
from bi_ops.core import vllm as releases
from bi_ops.logprob import token_logprobs
from bi_ops.rollout.vllm_engine import VllmEngine
from bi_ops.vllm_plugin import backend


@pytest.fixture(params=releases.RELEASES)
def version(request) -> str:
    return request.param


@pytest.fixture
def vllm(monkeypatch, version):
    with installed(monkeypatch, version) as modules:
        yield modules


def origin_of(vllm):
    """Where this release has its batch-invariant kernels."""
    [origin] = {r.batch_invariant for r in releases.RELEASES.values()} & vllm.keys()
    return vllm[origin]


def in_force(vllm) -> list[bool]:
    """Is each patch, and the backend?"""
    patched = [m.rms_norm_batch_invariant is not stock_rms_norm for m in (origin_of(vllm), vllm[LAYERNORM])]
    offered = dict(vllm[REGISTRY].AttentionBackendEnum) == {"CUSTOM": backend.PATH}
    chosen = vllm[SELECTOR]._cached_get_attn_backend not in CHOICES.values()
    compiled = vllm[ARGUMENTS].EngineArgs.create_engine_config is not create_engine_config
    loaded = vllm[WORKER].WorkerWrapperBase.init_device is not init_device
    sampler = vllm[SAMPLER].Sampler
    assert isinstance(inspect.getattr_static(sampler, "compute_logprobs"), staticmethod)
    scored = sampler.compute_logprobs is not Sampler.compute_logprobs
    return [*patched, chosen, compiled, scored, loaded, offered]


def test_register_is_idempotent_and_unregister_gives_back(vllm):
    vllm_plugin.register()
    assert vllm_plugin.is_registered()
    assert in_force(vllm) == [True] * 7
    first = vllm[LAYERNORM].rms_norm_batch_invariant
    vllm_plugin.register()
    assert vllm[LAYERNORM].rms_norm_batch_invariant is first
    vllm_plugin.unregister()
    vllm_plugin.unregister()
    assert not vllm_plugin.is_registered()
    assert in_force(vllm) == [False] * 7


def test_the_residual_path_is_a_rounded_add_then_the_stock_norm(vllm):
    vllm_plugin.register()
    patched = vllm[LAYERNORM].rms_norm_batch_invariant
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
    before = x.clone(), residual.clone()
    y, total = patched(x, weight, 1e-5, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, stock_rms_norm(x + residual, weight, 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    assert torch.equal(patched(x, weight, 1e-5), stock_rms_norm(x, weight, 1e-5))
    with pytest.raises(ValueError, match=r"\[3, 8\] and residual \[1, 8\] differ"):
        patched(x, weight, residual=residual[:1])


@pytest.mark.skipif(not runtime.INTERPRET, reason="the stand-in for vLLM computes on the CPU")
def test_the_v1_sampler_reads_logits_in_the_models_dtype(vllm):
    vllm_plugin.register()
    logits, ids = torch.randn(3, 48).bfloat16(), torch.tensor([5, 47, 0])
    out = vllm[SAMPLER].Sampler("raw_logprobs").forward(logits)
    assert out.dtype == torch.float32
    assert torch.equal(out.gather(1, ids[:, None])[:, 0], token_logprobs(logits, ids))
    vllm_plugin.unregister()
    assert torch.equal(vllm[SAMPLER].Sampler("raw_logprobs").forward(logits), logits.float().log_softmax(-1))


def test_nothing_happens_outside_batch_invariant_mode(vllm, caplog, monkeypatch):
    vllm["vllm.envs"].VLLM_BATCH_INVARIANT = False
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.0")  # and any version may be installed
    with caplog.at_level("INFO"):
        vllm_plugin.register()
    assert not vllm_plugin.is_registered()
    assert in_force(vllm) == [False] * 7
    assert "VLLM_BATCH_INVARIANT is not set" in caplog.text


@pytest.mark.parametrize("unknown", ["0.25.1", "0.33.1", "0.34.0", "0.33.0rc1"])
def test_another_vllm_version_is_refused(vllm, monkeypatch, unknown):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: unknown)
    message = f"vllm_plugin: vLLM {unknown} is not supported; supported: 0.26.0, 0.27.0, "
    with pytest.raises(RuntimeError, match=rf"^{re.escape(message)}.*, 0\.33\.0$"):
        vllm_plugin.register()
    assert in_force(vllm) == [False] * 7


def test_an_unknown_version_whose_sources_are_there_is_told_what_differs(vllm, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.34.0")
    vllm["vllm"].__spec__.submodule_search_locations = [str(tmp_path / "vllm")]
    write_sources(tmp_path, releases.RELEASES["0.33.0"])
    with pytest.raises(RuntimeError, match=r"0\.33\.0 \(its patch points look like those of 0\.33\.0, but"):
        vllm_plugin.register()
    write_sources(tmp_path, dataclasses.replace(releases.RELEASES["0.33.0"], choose_backend=("backend", "layer")))
    with pytest.raises(RuntimeError) as error:
        vllm_plugin.register()
    choice = "vllm.v1.attention.selector._cached_get_attn_backend has parameters ('backend', 'layer'), expected "
    assert f"(unlike in 0.33.0, {choice}('backend', 'attn_selector_config', 'num_heads', '_run_kv" in str(error.value)
    assert str(error.value).count("expected") == 1
    (tmp_path / "vllm/engine/arg_utils.py").unlink()
    with pytest.raises(RuntimeError, match=r"EngineArgs\.create_engine_config is missing"):
        vllm_plugin.register()
    assert in_force(vllm) == [False] * 7


def test_a_release_that_no_gpu_has_seen_is_named_in_a_warning(vllm, version, caplog):
    with caplog.at_level("WARNING"):
        vllm_plugin.register()
    shown = releases.RELEASES[version].shown
    assert (f"vLLM {version} was not shown" in caplog.text) is not shown
    assert ("not shown on a GPU" in releases.availability().reason) is not shown


@pytest.mark.parametrize("change", ["signature", "missing"])
def test_a_patch_point_that_looks_different_is_refused_and_nothing_is_patched(vllm, version, change):
    if change == "signature":
        vllm[LAYERNORM].rms_norm_batch_invariant = lambda x, weight, eps: x
    else:
        del vllm[LAYERNORM].rms_norm_batch_invariant
    with pytest.raises(RuntimeError, match=rf"layernorm\.rms_norm_batch_invariant .* in vLLM {re.escape(version)}"):
        vllm_plugin.register()
    assert origin_of(vllm).rms_norm_batch_invariant is stock_rms_norm
    assert not vllm_plugin.is_registered()


def test_another_plugin_that_has_the_backends_name_is_named_and_nothing_is_patched(vllm):
    vllm[REGISTRY].AttentionBackendEnum.update(CUSTOM="their.module.Backend")
    with pytest.raises(RuntimeError, match=r"CUSTOM is already their\.module\.Backend"):
        vllm_plugin.register()
    assert in_force(vllm) == [False] * 7


Layer = namedtuple("Layer", ("head_size", "attn_type"))  # as far as the plugin reads vLLM's


@pytest.mark.parametrize("head_dim", [64, 96, 80])
def test_a_head_size_that_flash_attention_cannot_keep_is_refused_with_the_way_out(vllm, head_dim):
    vllm_plugin.register()
    choose = vllm[SELECTOR]._cached_get_attn_backend
    with pytest.raises(ValueError, match=rf"^attention: .* head_dim {head_dim}, .*attention='triton'.* CUSTOM"):
        choose(backend="FLASH_ATTN", attn_selector_config=Layer(head_dim, "decoder"), num_heads=None)
    assert choose("CUSTOM", Layer(head_dim, "decoder")).get_name() == "CUSTOM"
    assert choose("FLASH_ATTN", Layer(head_dim, "encoder_only")).get_name() == "FLASH_ATTN"
    assert choose("FLASH_ATTN", Layer(128, "decoder")).get_name() == "FLASH_ATTN"
    vllm[VERSION].get_flash_attn_version = lambda head_size: 2
    assert choose("FLASH_ATTN", Layer(head_dim, "decoder")).get_name() == "FLASH_ATTN"
    vllm_plugin.unregister()
    choose = vllm[SELECTOR]._cached_get_attn_backend
    assert choose("FLASH_ATTN", Layer(head_dim, "decoder")).get_name() == "FLASH_ATTN"


def test_layers_whose_backend_nobody_named_take_bi_ops_own(vllm, caplog, monkeypatch):
    reasons: list[str] = []
    monkeypatch.setattr(backend, "unserved", lambda layer: reasons)
    vllm_plugin.register()
    choose = vllm[SELECTOR]._cached_get_attn_backend
    for head_dim in (64, 128):
        assert choose(None, Layer(head_dim, "decoder")).get_name().name == "CUSTOM"
        assert choose(None, Layer(head_dim, "encoder_only")).get_name() is None
    assert choose("FLASH_ATTN", Layer(128, "decoder")).get_name() == "FLASH_ATTN"
    reasons.append("kv_cache_dtype not supported")
    with caplog.at_level("WARNING"):
        assert choose(None, Layer(128, "decoder")).get_name() is None
    assert "CUSTOM does not serve this layer: kv_cache_dtype not supported" in caplog.text
    vllm_plugin.unregister()
    assert vllm[SELECTOR]._cached_get_attn_backend(None, Layer(128, "decoder")).get_name() is None


def test_an_engine_takes_full_graphs_without_inductor_unless_it_is_told_otherwise(vllm, caplog):
    vllm_plugin.register()
    arguments = vllm[ARGUMENTS].EngineArgs

    def compiled(**asked):
        found = arguments(**asked).create_engine_config().compilation_config
        return found.mode, found.cudagraph_mode

    with caplog.at_level("WARNING"):
        assert compiled() == ("NONE", "FULL")
    assert "without Inductor" in caplog.text
    assert compiled(cudagraph_mode="FULL_DECODE_ONLY") == ("NONE", "FULL_DECODE_ONLY")
    assert compiled(mode="NONE") == ("NONE", None)
    assert compiled(enforce_eager=True) == (None, None)
    for mode in ("VLLM_COMPILE", 3):
        with pytest.raises(ValueError, match=f"vllm_plugin: compilation mode {mode} was asked for"):
            compiled(mode=mode)
    vllm_plugin.unregister()
    assert compiled(mode=3) == (3, None)


@pytest.mark.parametrize("graphs", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("mode", [None, "NONE"])
def test_piecewise_graphs_are_captured_without_inductor(vllm, monkeypatch, caplog, graphs, mode):
    breakable = "VLLM_USE_BREAKABLE_CUDAGRAPH"
    monkeypatch.setenv(breakable, "1")  # so that it is as before afterwards
    monkeypatch.delenv(breakable)
    arguments = vllm[ARGUMENTS].EngineArgs(cudagraph_mode=graphs, mode=mode)
    vllm_plugin.register()
    with caplog.at_level("WARNING"):
        found = arguments.create_engine_config().compilation_config
    assert (found.mode, found.cudagraph_mode, os.environ[breakable]) == ("NONE", graphs, "1")
    assert ("piecewise CUDA graphs without Inductor" in caplog.text) is (mode is None)
    monkeypatch.setenv(breakable, "0")
    with pytest.raises(ValueError, match=rf"^vllm_plugin: cudagraph_mode {graphs} .* with {breakable}=0.* unset the"):
        vllm[ARGUMENTS].EngineArgs(cudagraph_mode=graphs, mode=mode).create_engine_config()


@pytest.mark.parametrize("quantization", ["mxfp4", "gpt_oss_mxfp4"])
def test_quantized_experts_without_an_invariant_kernel_are_refused_before_an_engine_starts(vllm, quantization):
    arguments = vllm[ARGUMENTS].EngineArgs
    arguments(quantization=quantization).create_engine_config()  # stock
    vllm_plugin.register()
    message = rf"^vllm_plugin: \./checkpoint is quantized with {quantization}, .* take a bf16 checkpoint"
    with pytest.raises(ValueError, match=message):
        arguments(quantization=quantization).create_engine_config()
    for other in (None, "fp8"):  # what else is quantized is decided by the layers that are loaded
        arguments(quantization=other).create_engine_config()


@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        ({"speculative_config": {"method": "ngram"}}, ["speculative decoding .* leave speculative_config out"]),
        ({"enable_lora": True}, ["LoRA .* merge the adapter into the weights"]),
        ({"enable_lora": True, "mode": 2, "enforce_eager": True}, ["compilation mode 2", "LoRA"]),
    ],
)
def test_what_training_has_other_bits_of_is_refused_before_an_engine_starts(vllm, asked, reasons):
    arguments = vllm[ARGUMENTS].EngineArgs
    arguments(**asked).create_engine_config()  # stock
    vllm_plugin.register()
    with pytest.raises(ValueError, match=r"^vllm_plugin: .*; or unset VLLM_BATCH_INVARIANT$") as error:
        arguments(**asked).create_engine_config()
    for reason in reasons:
        assert re.search(reason, str(error.value))


def test_the_digest_of_a_models_orders_is_logged_once(vllm, caplog):
    config = tiny_config()
    vllm[CONFIG].get_current_vllm_config_or_none().model_config.hf_config.to_dict = config.to_dict
    vllm_plugin.register()
    with caplog.at_level("INFO"):
        for _ in range(config.num_hidden_layers):
            vllm[SELECTOR]._cached_get_attn_backend("CUSTOM", Layer(config.head_dim, "decoder"))
        vllm[SELECTOR]._cached_get_attn_backend("FLEX_ATTENTION", Layer(config.head_dim, "decoder"))
    digest = VllmEngine.orders_of(config, "triton").digest
    said = [r.getMessage() for r in caplog.records if r.name == "vllm.bi_ops"]
    assert len(said) == 2
    assert f"reduction orders {digest} on " in said[0]
    assert "no record of reduction orders for this model: attention is vLLM's FLEX_ATTENTION" in said[1]
    assert [r.levelname for r in caplog.records if r.name == "vllm.bi_ops"] == ["INFO", "WARNING"]


def test_a_head_size_that_nothing_serves_offers_no_option():
    assert "use another model" in backend.fa3_refusal(264)
    assert [d for d in (8, 16, 20, 64, 80, 96, 256, 264) if backend.served(d)] == [16, 64, 80, 96, 256]


def test_without_vllm_the_error_says_how_to_get_it(vllm, monkeypatch):
    for name in vllm:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(releases.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"bi-ops\[vllm\]"):
        vllm_plugin.register()


def test_the_installed_vllm_has_the_patch_points():
    """Checks the real thing where it is installed, GPU or not."""
    pytest.importorskip("vllm")
    for patch in vllm_plugin.patches_of(releases.require("the test")):
        module = pytest.importorskip(patch.module)
        assert callable(patch.stock(module))


def entry_points(monkeypatch, *names):
    known = [importlib.metadata.EntryPoint(n, "bi_ops.vllm_plugin:register", "vllm.general_plugins") for n in names]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **wanted: importlib.metadata.EntryPoints(known).select(**wanted)
    )


def test_a_plugin_that_vllms_own_processes_would_not_load_is_refused(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    entry_points(monkeypatch, "another")
    with pytest.raises(RuntimeError, match=r"VllmEngine: .* without being installed; pip install it"):
        vllm_plugin.require_entry_point("VllmEngine")
    entry_points(monkeypatch, "another", "bi_ops")
    vllm_plugin.require_entry_point("VllmEngine")
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(RuntimeError, match=r"VLLM_PLUGINS is 'another', .* add bi_ops to it or unset it"):
        vllm_plugin.require_entry_point("VllmEngine")
    monkeypatch.setenv("VLLM_PLUGINS", "another,bi_ops")
    vllm_plugin.require_entry_point("VllmEngine")
