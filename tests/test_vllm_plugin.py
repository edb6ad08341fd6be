"""The vLLM plugin against a stand-in module tree: what it replaces, gives back and refuses."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch

from bi_ops import vllm_plugin
from bi_ops._common import providers, runtime
from bi_ops.rollout import vllm_engine
from bi_ops.rollout.base import SamplingParams

ORIGIN = "vllm.model_executor.layers.batch_invariant"
LAYERNORM = "vllm.model_executor.layers.layernorm"


def stock_rms_norm(input, weight, eps=1e-6, residual=None):
    """vLLM's function as far as callers see it: with a residual it writes both inputs in place."""
    if residual is not None:
        residual.add_(input)
        input.copy_(stock_rms_norm(residual, weight, eps))
        return input, residual
    wide = input.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(input.dtype)


@pytest.fixture
def vllm(monkeypatch):
    """A fake vLLM 0.26.0 in batch-invariant mode; the real one, if installed, is put aside."""
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    modules = {}
    for name in ("vllm", "vllm.envs", "vllm.model_executor", "vllm.model_executor.layers", ORIGIN, LAYERNORM):
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
    modules[ORIGIN].rms_norm_batch_invariant = modules[LAYERNORM].rms_norm_batch_invariant = stock_rms_norm
    real_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.26.0" if n == "vllm" else real_version(n))
    providers.vllm_availability.cache_clear()
    yield modules
    vllm_plugin.unregister()
    providers.vllm_availability.cache_clear()


def in_force(vllm) -> list[bool]:
    return [vllm[m].rms_norm_batch_invariant is not stock_rms_norm for m in (ORIGIN, LAYERNORM)]


def test_register_is_idempotent_and_unregister_gives_back(vllm):
    vllm_plugin.register()
    assert vllm_plugin.is_registered()
    assert in_force(vllm) == [True, True]
    first = vllm[LAYERNORM].rms_norm_batch_invariant
    vllm_plugin.register()
    assert vllm[LAYERNORM].rms_norm_batch_invariant is first
    vllm_plugin.unregister()
    vllm_plugin.unregister()
    assert not vllm_plugin.is_registered()
    assert in_force(vllm) == [False, False]


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
    assert in_force(vllm) == [False, False]
    assert "VLLM_BATCH_INVARIANT is not set" in caplog.text


def test_another_vllm_version_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.27.1")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.27\.1 is not supported; supported: 0\.26\.0"):
        vllm_plugin.register()
    assert in_force(vllm) == [False, False]


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


# --------------------------------------------------------------------------------------------------------------
# the engine, as far as it needs neither vLLM nor a GPU


@pytest.mark.parametrize(("name", "value"), [("VLLM_BATCH_INVARIANT", "0"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "1")])
def test_a_contradicting_environment_is_refused(monkeypatch, name, value):
    for n, v in vllm_engine._ENVIRONMENT.items():
        monkeypatch.setenv(n, v)
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"{name}={value} is set"):
        vllm_engine._prepare_environment()


def test_a_vllm_that_runs_in_another_mode_is_refused(vllm, monkeypatch):
    for n, v in vllm_engine._ENVIRONMENT.items():
        monkeypatch.setenv(n, v)
    vllm_engine._prepare_environment()
    vllm["vllm.envs"].VLLM_BATCH_INVARIANT = False
    with pytest.raises(RuntimeError, match="another mode; start a new process"):
        vllm_engine._prepare_environment()


def tiny_module(rows: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.model = torch.nn.Module()
    module.model.embed_tokens = torch.nn.Embedding(rows, 4, dtype=torch.bfloat16)
    module.model.norm = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    return module


def test_weights_are_rounded_and_copied_in_place_and_the_vocabulary_may_be_padded():
    target = tiny_module(8)
    source = {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4, 4)}
    address, padding = target.model.norm.weight.data_ptr(), target.model.embed_tokens.weight[6:].clone()
    vllm_engine.copy_weights(source, target)
    assert torch.equal(target.model.norm.weight, source["model.norm.weight"].bfloat16())
    assert torch.equal(target.model.embed_tokens.weight[:6], source["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(target.model.embed_tokens.weight[6:], padding)
    assert target.model.norm.weight.data_ptr() == address


def test_every_weight_that_does_not_fit_is_listed_and_nothing_is_copied():
    target = tiny_module(8)
    before = target.model.embed_tokens.weight.clone()
    source = {"model.embed_tokens.weight": torch.randn(9, 4), "model.extra.weight": torch.randn(1)}
    with pytest.raises(ValueError, match="does not fit") as error:
        vllm_engine.copy_weights(source, target)
    for part in ("embed_tokens.weight is [9, 4]", "model.extra.weight is unknown", "model.norm.weight is missing"):
        assert part in str(error.value)
    assert torch.equal(target.model.embed_tokens.weight, before)


def output(tokens, logprobs, finish_reason="length", ids=None):
    flat = types.SimpleNamespace(token_ids=list(tokens if ids is None else ids), logprobs=logprobs)
    return types.SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason=finish_reason)


def test_logprobs_survive_the_way_through_python_floats():
    exact = torch.randn(50)
    got = vllm_engine._completion(0, [1], output(range(50), [float(x) for x in exact]))
    assert torch.equal(got.logprobs, exact)
    assert got.logprobs.dtype == torch.float32


def test_an_answer_without_its_logprobs_is_refused():
    with pytest.raises(RuntimeError, match="no log-probability"):
        vllm_engine._completion(3, [1], output([4, 5], [-0.5], ids=[4]))
    with pytest.raises(RuntimeError, match="request 3 ended with 'abort'"):
        vllm_engine._completion(3, [1], output([4], [-0.5], "abort"))


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_without_a_gpu_the_error_names_the_other_engine(tmp_path):
    pytest.importorskip("bi_ops.models.qwen3", reason="the model family is needed")
    with pytest.raises(RuntimeError, match="EmbeddedEngine"):
        vllm_engine.VllmEngine(tmp_path)


# --------------------------------------------------------------------------------------------------------------
# the engine itself

PROMPTS = [[5, 6, 7], [9] * 300, list(range(1, 130)), [3]]
PARAMS = [SamplingParams(24, temperature=t, seed=s) for s, t in enumerate((1.0, 0.0, 0.7, 1.0))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folders of two tiny random checkpoints with head_dim 128."""
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1000,  # not a multiple of 64, to which vLLM pads
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
    )
    folders = []
    for seed in (0, 1):
        model = Qwen3ForCausalLM(config)
        model.init_weights(seed)
        folders.append(tmp_path_factory.mktemp(f"seed{seed}"))
        model.save_pretrained(folders[-1])
    return folders


def same(a, b) -> bool:
    return all(x.tokens == y.tokens and torch.equal(x.logprobs, y.logprobs) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engine_on_a_gpu(checkpoints, cuda_graphs):
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.recompose import rescore

    options = {"cuda_graphs": cuda_graphs, "gpu_memory_utilization": 0.2, "max_model_len": 512}
    engine = vllm_engine.VllmEngine(checkpoints[0], **options)
    try:
        first = engine.generate(PROMPTS, PARAMS)
        assert [c.prompt for c in first] == [tuple(p) for p in PROMPTS]
        assert all(len(c.tokens) == 24 and c.finish_reason == "length" for c in first)
        assert same(first, engine.generate(PROMPTS, PARAMS))
        alone = [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
        assert same(first, alone)
        stop = first[0].tokens[3]
        stopped = engine.generate(PROMPTS[:1], SamplingParams(24, seed=0, stop_token_ids=(stop,)))[0]
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == first[0].tokens[: first[0].tokens.index(stop) + 1]
        for bad in (SamplingParams(2, seed=-1), SamplingParams(2, temperature=1e-3), SamplingParams(600)):
            with pytest.raises(ValueError, match="generate: "):
                engine.generate(PROMPTS[:1], bad)

        model = Qwen3ForCausalLM.from_pretrained(checkpoints[1])
        engine.update_weights(model)
        updated = engine.generate(PROMPTS, PARAMS)
        assert not same(first, updated)
        reports = rescore(model, updated)
        assert all(r.identical for r in reports.values()), reports
        assert engine.describe()["plugin"] is True
    finally:
        engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPTS, PARAMS)

    fresh = vllm_engine.VllmEngine(checkpoints[1], **options)
    try:
        assert same(updated, fresh.generate(PROMPTS, PARAMS))
    finally:
        fresh.close()
