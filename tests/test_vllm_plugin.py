"""The vLLM plugin against a stand-in module tree: what it replaces, gives back and refuses."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from collections import namedtuple

import pytest
import torch
from fake_vllm import CONFIG, LAYERNORM, ORIGIN, REGISTRY, SELECTOR, VERSION, installed, stock_choice, stock_rms_norm
from tiny import tiny_config

from bi_ops import vllm_plugin
from bi_ops.core import providers
from bi_ops.rollout.vllm_engine import VllmEngine
from bi_ops.vllm_plugin import backend


@pytest.fixture
def vllm(monkeypatch):
    with installed(monkeypatch) as modules:
        yield modules


def in_force(vllm) -> list[bool]:
    """Is each patch, and the backend?"""
    patched = [vllm[m].rms_norm_batch_invariant is not stock_rms_norm for m in (ORIGIN, LAYERNORM)]
    offered = dict(vllm[REGISTRY].AttentionBackendEnum) == {"CUSTOM": backend.PATH}
    return [*patched, vllm[SELECTOR]._cached_get_attn_backend is not stock_choice, offered]


def test_register_is_idempotent_and_unregister_gives_back(vllm):
    vllm_plugin.register()
    assert vllm_plugin.is_registered()
    assert in_force(vllm) == [True] * 4
    first = vllm[LAYERNORM].rms_norm_batch_invariant
    vllm_plugin.register()
    assert vllm[LAYERNORM].rms_norm_batch_invariant is first
    vllm_plugin.unregister()
    vllm_plugin.unregister()
    assert not vllm_plugin.is_registered()
    assert in_force(vllm) == [False] * 4


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


def test_nothing_happens_outside_batch_invariant_mode(vllm, caplog, monkeypatch):
    vllm["vllm.envs"].VLLM_BATCH_INVARIANT = False
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.0")  # and any version may be installed
    with caplog.at_level("INFO"):
        vllm_plugin.register()
    assert not vllm_plugin.is_registered()
    assert in_force(vllm) == [False] * 4
    assert "VLLM_BATCH_INVARIANT is not set" in caplog.text


def test_another_vllm_version_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.27.1")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.27\.1 is not supported; supported: 0\.26\.0"):
        vllm_plugin.register()
    assert in_force(vllm) == [False] * 4


@pytest.mark.parametrize("change", ["signature", "missing"])
def test_a_patch_point_that_looks_different_is_refused_and_nothing_is_patched(vllm, change):
    if change == "signature":
        vllm[LAYERNORM].rms_norm_batch_invariant = lambda x, weight, eps: x
    else:
        del vllm[LAYERNORM].rms_norm_batch_invariant
    with pytest.raises(RuntimeError, match=r"layernorm\.rms_norm_batch_invariant .* in vLLM 0\.26\.0"):
        vllm_plugin.register()
    assert vllm[ORIGIN].rms_norm_batch_invariant is stock_rms_norm
    assert not vllm_plugin.is_registered()


def test_another_plugin_that_has_the_backends_name_is_named_and_nothing_is_patched(vllm):
    vllm[REGISTRY].AttentionBackendEnum.update(CUSTOM="their.module.Backend")
    with pytest.raises(RuntimeError, match=r"CUSTOM is already their\.module\.Backend"):
        vllm_plugin.register()
    assert in_force(vllm) == [False] * 4


Layer = namedtuple("Layer", ("head_size", "attn_type"))  # as far as the plugin reads vLLM's


@pytest.mark.parametrize("head_dim", [64, 96, 80])
def test_a_head_size_that_flash_attention_cannot_keep_is_refused_with_the_way_out(vllm, head_dim):
    vllm_plugin.register()
    choose = vllm[SELECTOR]._cached_get_attn_backend
    with pytest.raises(ValueError, match=rf"^attention: .* head_dim {head_dim}, .*attention='triton'.* CUSTOM$"):
        choose(backend="FLASH_ATTN", attn_selector_config=Layer(head_dim, "decoder"), num_heads=None)
    assert choose("CUSTOM", Layer(head_dim, "decoder")).get_name() == "CUSTOM"
    assert choose("FLASH_ATTN", Layer(head_dim, "encoder_only")).get_name() == "FLASH_ATTN"
    assert choose("FLASH_ATTN", Layer(128, "decoder")).get_name() == "FLASH_ATTN"
    vllm[VERSION].get_flash_attn_version = lambda head_size: 2
    assert choose("FLASH_ATTN", Layer(head_dim, "decoder")).get_name() == "FLASH_ATTN"
    vllm_plugin.unregister()
    choose = vllm[SELECTOR]._cached_get_attn_backend
    assert choose("FLASH_ATTN", Layer(head_dim, "decoder")).get_name() == "FLASH_ATTN"


def test_the_digest_of_a_models_orders_is_logged_once(vllm, caplog):
    config = tiny_config()
    vllm[CONFIG].get_current_vllm_config_or_none().model_config.hf_config.to_dict = config.to_dict
    vllm_plugin.register()
    with caplog.at_level("INFO"):
        for _ in range(config.num_hidden_layers):
            vllm[SELECTOR]._cached_get_attn_backend("CUSTOM", Layer(config.head_dim, "decoder"))
        vllm[SELECTOR]._cached_get_attn_backend("TREE_ATTN", Layer(config.head_dim, "decoder"))
    digest = VllmEngine.orders_of(config, "triton").digest
    said = [r.getMessage() for r in caplog.records if r.name == "vllm.bi_ops"]
    assert len(said) == 2
    assert f"reduction orders {digest} on " in said[0]
    assert "no record of reduction orders for this model: attention is vLLM's TREE_ATTN" in said[1]


def test_a_head_size_that_nothing_serves_offers_no_option():
    assert "use another model" in backend.way_out(264)
    assert [d for d in (8, 16, 20, 64, 80, 96, 256, 264) if backend.served(d)] == [16, 64, 80, 96, 256]


def test_without_vllm_the_error_says_how_to_get_it(vllm, monkeypatch):
    for name in vllm:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"bi-ops\[vllm\]"):
        vllm_plugin.register()


def test_the_installed_vllm_has_the_patch_points():
    """Checks the real thing where it is installed, GPU or not."""
    pytest.importorskip("vllm")
    for patch in vllm_plugin.PATCHES:
        module = pytest.importorskip(patch.module)
        assert patch.stock(module)
