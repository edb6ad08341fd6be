"""The vLLM plugin against a stand-in module tree: what it replaces, gives back and refuses."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import json
import sys
import types
from collections import namedtuple

import pytest
import torch

from bi_ops import attention, vllm_plugin
from bi_ops._common import providers, runtime
from bi_ops.rollout import vllm_engine
from bi_ops.rollout.base import SamplingParams, attention_of
from bi_ops.vllm_plugin import backend

ORIGIN = "vllm.model_executor.layers.batch_invariant"
LAYERNORM = "vllm.model_executor.layers.layernorm"
SELECTOR = "vllm.v1.attention.selector"
REGISTRY = "vllm.v1.attention.backends.registry"
VERSION = "vllm.v1.attention.backends.fa_utils"


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
    """vLLM's choice of an attention backend, cached as there."""
    return types.SimpleNamespace(get_name=lambda: backend)


class Slots(dict):
    """vLLM's enumeration of backends: the paths that are registered."""

    def __getitem__(self, name):
        return types.SimpleNamespace(
            is_overridden=lambda: name in self,
            get_path=lambda: self.get(name),
            clear_override=lambda: self.pop(name, None),
            put=lambda path: self.update({name: path}),
        )


@pytest.fixture
def vllm(monkeypatch):
    """A fake vLLM 0.26.0 in batch-invariant mode; the real one, if installed, is put aside."""
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    modules = {}
    packages = ("vllm", "vllm.envs", "vllm.model_executor", "vllm.model_executor.layers", "vllm.v1")
    packages += ("vllm.v1.attention", "vllm.v1.attention.backends")
    for name in (*packages, ORIGIN, LAYERNORM, SELECTOR, REGISTRY, VERSION):
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
    modules[SELECTOR]._cached_get_attn_backend = stock_choice
    modules[VERSION].get_flash_attn_version = lambda head_size: 3
    modules[REGISTRY].AttentionBackendEnum = Slots()
    modules[REGISTRY].register_backend = lambda slot, path: slot.put(path)
    real_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.26.0" if n == "vllm" else real_version(n))
    providers.vllm_availability.cache_clear()
    yield modules
    vllm_plugin.unregister()
    providers.vllm_availability.cache_clear()


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


# --------------------------------------------------------------------------------------------------------------
# the attention backend

HEADS, HEAD_DIM, BLOCK = (4, 2), 24 if runtime.INTERPRET else 96, 16

#: A batch as (keys computed before, new queries) per sequence.
BATCHES = {
    "prefill": [(0, 40), (0, 3), (0, 17)],
    "chunked prefill": [(16, 24), (0, 3), (5, 12)],
    "decode": [(39, 1), (2, 1), (16, 1)],
    "mixed": [(39, 1), (0, 3), (16, 1)],
}

#: What a layer has beyond plain attention, as vLLM's models build it: sliding_window, logits_soft_cap and sinks.
LAYERS = {
    "plain": (None, None, None),
    "window": (9, None, None),
    "softcap": (None, 3.0, None),
    "sinks": (None, None, torch.linspace(-1, 3, HEADS[0])),
    "everything": (9, 3.0, torch.linspace(-1, 3, HEADS[0])),
}


def features(layer, device):
    """The arguments of bi_ops' attention for it: a window of 9 keys is a query's own and 8 before."""
    window, softcap, sinks = LAYERS[layer]
    return {
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": softcap or 0.0,
        "sinks": None if sinks is None else sinks.to(device),
    }


def metadata(**changes):
    """vLLM's FlashAttentionMetadata, as far as it is read."""
    unused = {"mm_prefix_range_tensor": None, "rswa_prefix_lens": None, "dcp_context_kv_lens": None}
    return types.SimpleNamespace(**({"causal": True, "use_cascade": False, **unused} | changes))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_has_its_training_bits_whatever_is_in_vllms_batch(layer, batch, layout, device):
    hq, hkv = HEADS
    lengths = [before + new for before, new in BATCHES[batch]]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v = (torch.randn(sum(lengths), h, HEAD_DIM, device=device).bfloat16() for h in (hq, hkv, hkv))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    with attention.providers.forced("triton"):
        trained = attention.flash_attention(q, k, v, cu_seqlens, **features(layer, device))

    blocks = [-(-n // BLOCK) for n in lengths]
    table = torch.full((len(lengths), max(blocks)), 1, dtype=torch.int32)
    free = iter(torch.randperm(sum(blocks)).tolist())
    sizes = (sum(blocks), BLOCK, hkv) if layout == "NHD" else (sum(blocks), hkv, BLOCK)
    cache = torch.full((*sizes, 2 * HEAD_DIM), 7.0, device=device).bfloat16()
    cache = (
        cache.transpose(1, 2) if layout == "NHD" else cache
    )  # [blocks, Hkv, block_size, 2 * D], as vLLM hands it over
    for i, n in enumerate(lengths):
        for at in range(n):
            if at % BLOCK == 0:
                table[i, at // BLOCK] = next(free)
            row = torch.cat((k[starts[i] + at], v[starts[i] + at]), -1)
            cache[int(table[i, at // BLOCK]), :, at % BLOCK] = row

    rows = [starts[i] + at for i, (before, new) in enumerate(BATCHES[batch]) for at in range(before, before + new)]
    news = [new for _, new in BATCHES[batch]]
    query = torch.cat((q[rows], torch.zeros_like(q[:2])))  # vLLM pads a batch
    output = torch.full_like(query, -1.0)
    found = metadata(
        num_actual_tokens=len(rows),
        max_query_len=max(news),
        query_start_loc=torch.tensor([sum(news[:i]) for i in range(len(news) + 1)], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.to(device),
    )
    with torch.no_grad():
        attend = functools.partial(backend.attend, query, cache, found, HEAD_DIM, HEAD_DIM**-0.5)
        assert attend(output, **features(layer, device)) is output
        if layer != "plain":  # negative control
            assert not torch.equal(attend(output.clone())[: len(rows)], trained[rows])
    assert torch.equal(output[: len(rows)], trained[rows])
    assert torch.equal(output[len(rows) :], torch.full_like(output[len(rows) :], -1.0))
    assert attention.providers.why() != "forced"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"causal": False}, "not causal"),
        ({"causal": torch.ones(1)}, "not causal"),
        ({"use_cascade": True}, "cascade"),
        ({"rswa_prefix_lens": torch.ones(1)}, "sliding windows"),
        ({"dcp_context_kv_lens": torch.ones(1), "use_cascade": True}, "cascade attention, context parallelism"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(change, what):
    none = torch.empty(0)
    with pytest.raises(NotImplementedError, match=what):
        backend.attend(none, none, metadata(**change), 64, 0.125, none)


def real(name):
    """A module of the installed vLLM, which is imported before bi_ops' stand-ins; skips without it."""
    pytest.importorskip("transformers.tokenization_utils_base")
    return pytest.importorskip(f"vllm.{name}")


def test_the_installed_vllm_finds_the_backend_and_what_it_cannot_do():
    """Checks the real thing where it is installed, GPU or not."""
    registry, interface = real("v1.attention.backends.registry"), real("v1.attention.backend")
    flash = real("v1.attention.backends.flash_attn")
    backend.install()
    try:
        found = registry.AttentionBackendEnum.CUSTOM.get_class()
        assert found is backend.PagedAttentionBackend
        assert found.full_cls_name() == tuple(backend.PATH.rsplit(".", 1))
        assert issubclass(found, flash.FlashAttentionBackend)
        assert registry.AttentionBackendEnum[found.get_name()].get_path() == backend.PATH
    finally:
        backend.uninstall()
    assert not registry.AttentionBackendEnum.CUSTOM.is_overridden()

    asked = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False}
    asked |= {"has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False}
    asked |= {"device_capability": real("platforms.interface").DeviceCapability(9, 0), "attn_type": "decoder"}
    asked |= {"use_batch_invariant": True}
    assert found.validate_configuration(**asked) == []
    assert found.validate_configuration(**(asked | {"has_sliding_window": True, "has_sink": True})) == []
    for change in (
        *({"head_size": 20}, {"dtype": torch.float32}, {"kv_cache_dtype": "fp8"}, {"block_size": 8}),
        *({"use_mm_prefix": True}, {"attn_type": "encoder_only"}, {"use_non_causal": True}, {"use_mla": True}),
        *({"use_per_head_quant_scales": True}, {"use_kv_connector": True, "use_pcp": True}),
    ):
        assert found.validate_configuration(**(asked | change)) != [], change
    builder = found.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) == interface.AttentionCGSupport.UNIFORM_BATCH
    assert builder.use_cascade_attention(None) is False


@pytest.mark.parametrize("layer", LAYERS)
def test_the_installed_vllms_layer_runs_the_kernel(layer, device, monkeypatch):
    """The methods that vLLM calls, with its own metadata class, on one decoded row."""
    flash = real("v1.attention.backends.flash_attn")
    monkeypatch.setattr(flash, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash, "flash_attn_supports_sinks", lambda: False, raising=False)  # no matter: ours does
    impl_cls = backend.PagedAttentionBackend.get_impl_cls()
    window, softcap, sinks = LAYERS[layer]
    if sinks is not None:
        sinks = torch.nn.Parameter(sinks[:2].to(device))  # as vLLM's models hold them
    impl = impl_cls(2, 64, 0.125, 2, None, window, "auto", softcap, "decoder", None, sinks=sinks)
    k = torch.randn(20, 2, 128, device=device).bfloat16()
    shape = backend.PagedAttentionBackend.get_kv_cache_shape(2, 16, 2, 64)
    cache = torch.zeros(shape, device=device).bfloat16()
    assert cache.shape == (2, 2, 16, 128)
    cache[0], cache[1, :, :4] = k[:16].transpose(0, 1), k[16:].transpose(0, 1)
    whole = torch.tensor([0, 20], dtype=torch.int32, device=device)
    query = torch.randn(20, 2, 64, device=device).bfloat16()
    with attention.providers.forced("triton"):
        arguments = features(layer, device) | {"sinks": sinks}
        keys, values = k[..., :64].contiguous(), k[..., 64:].contiguous()
        expected = attention.flash_attention(query, keys, values, whole, **arguments)
    given = {
        "num_actual_tokens": 1,
        "max_query_len": 1,
        "max_seq_len": 20,
        "use_cascade": False,
        "common_prefix_len": 0,
    }
    given |= {"slot_mapping": None, "cu_prefix_query_lens": None, "prefix_kv_lens": None, "suffix_kv_lens": None}
    given |= {"block_table": torch.tensor([[0, 1]], dtype=torch.int32, device=device)}
    given |= {"query_start_loc": torch.tensor([0, 1], dtype=torch.int32, device=device), "seq_lens": whole[1:]}
    given |= {"sliding_window": (2, 0)}  # the group's, which is not the layer's
    output = torch.zeros(1, 2, 64, device=device).bfloat16()
    with torch.inference_mode():
        impl.forward(None, query[19:], None, None, cache, flash.FlashAttentionMetadata(**given), output)
    assert torch.equal(output[0], expected[19])
    assert not impl.forward(None, query, None, None, cache, None, torch.ones(1, 2, 64, device=device)).any()
    with pytest.raises(NotImplementedError, match="quantize"):
        impl.forward(None, query, None, None, cache, None, output, output_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="ALiBi"):
        impl_cls(2, 64, 0.125, 2, [0.5, 0.25], None, "auto")
    with pytest.raises(ValueError, match=r"sinks must be \[2\], got \[3\]"):
        impl_cls(2, 64, 0.125, 2, None, None, "auto", sinks=torch.zeros(3))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_installed_vllms_own_kernel_computes_the_same_function(layer, device, monkeypatch):
    """Its Triton backend, built from the same arguments: the same window, cap and sinks, in other bits."""
    if not real("triton_utils").HAS_TRITON:
        pytest.skip("vLLM has put Triton aside; without a GPU CUDA_VISIBLE_DEVICES='' keeps it")
    flash, triton_attn = real("v1.attention.backends.flash_attn"), real("v1.attention.backends.triton_attn")
    monkeypatch.setattr(flash, "get_flash_attn_version", lambda **_: 3)
    window, softcap, sinks = LAYERS[layer]
    sinks = None if sinks is None else sinks.to(device)
    # Triton's interpreter multiplies in bf16 only with bi_ops' help, which vLLM's kernel does not take.
    dtype, tolerance = (torch.float32, 1e-4) if runtime.INTERPRET else (torch.bfloat16, 2e-2)
    lengths, page, head_dim = [5, 40, 1], 16, 64
    q, k, v = (1.5 * torch.randn(sum(lengths), h, head_dim, device=device).to(dtype) for h in (4, 2, 2))
    cache = torch.zeros(5, 2, page, 2 * head_dim, device=device, dtype=dtype)  # [blocks, Hkv, block_size, 2 * D]
    starts = [0, 5, 45, 46]
    table = torch.tensor([[3, 3, 3], [0, 4, 1], [2, 2, 2]], dtype=torch.int32, device=device)
    for i, n in enumerate(lengths):
        for at in range(n):
            row = torch.cat((k[starts[i] + at], v[starts[i] + at]), -1)
            cache[int(table[i, at // page]), :, at % page] = row
    found = metadata(
        num_actual_tokens=46,
        max_query_len=40,
        max_seq_len=40,
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table,
        seq_threshold_3D=None,
        num_par_softmax_segments=None,
        softmax_segm_output=None,
        softmax_segm_max=None,
        softmax_segm_expsum=None,
        rswa_window=None,
    )
    scales = types.SimpleNamespace(
        _q_scale=None, **dict.fromkeys(("_k_scale", "_v_scale"), torch.ones(1, device=device))
    )

    def run(impl_cls, window):
        impl = impl_cls(4, head_dim, 0.125, 2, None, window, "auto", softcap, "decoder", None, sinks=sinks)
        with torch.inference_mode():
            return impl.forward(scales, q, k, v, cache, found, torch.zeros_like(q))

    theirs = run(triton_attn.TritonAttentionImpl, window)
    impl_cls = backend.PagedAttentionBackend.get_impl_cls()
    close = functools.partial(torch.allclose, theirs, rtol=tolerance, atol=tolerance)
    assert close(run(impl_cls, window))
    if window is not None:  # negative control
        assert not close(run(impl_cls, window + 1))
        assert not close(run(impl_cls, window - 1))


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllms_own_choice_of_flash_attention_is_refused_at_model_load():
    selector, registry = real("v1.attention.selector"), real("v1.attention.backends.registry")
    layer = selector.AttentionSelectorConfig(64, torch.bfloat16, "auto", None, use_batch_invariant=True)
    flash = registry.AttentionBackendEnum.FLASH_ATTN
    stock = selector._cached_get_attn_backend
    assert stock(flash, layer).get_name() == "FLASH_ATTN"
    with pytest.raises(ValueError, match=r"head_dim 64.*attention='triton'"):
        backend.refuse_head_sizes(stock)(flash, layer)


# --------------------------------------------------------------------------------------------------------------
# the engine, as far as it needs neither vLLM nor a GPU


@pytest.mark.parametrize(
    ("attention", "head_dim", "plugin", "message"),
    [
        ("vllm", 64, True, r"head_dim 64, .*attention='triton'"),
        ("vllm", 96, True, r"head_dim 96, .*--attention triton"),
        ("triton", 20, True, "head_dim 20 is not built; it must be a multiple of 8"),
        ("triton", 128, False, "a part of the plugin"),
        ("flash", 128, True, "attention is 'flash'; it must be vllm or triton"),
    ],
)
def test_attention_that_cannot_keep_the_contract_is_refused(attention, head_dim, plugin, message):
    with pytest.raises(ValueError, match=f"VllmEngine: .*{message}"):
        vllm_engine.check_attention(attention, head_dim, plugin)


def test_attention_that_can_is_not():
    for case in (("vllm", 128, True), ("vllm", 256, True), ("triton", 64, True), ("triton", 128, True)):
        vllm_engine.check_attention(*case)
    vllm_engine.check_attention("vllm", 64, False)  # the negative control


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


def tiny_checkpoint(folder, seed, head_dim):
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1000,  # not a multiple of 64, to which vLLM pads
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=1024,
    )
    model = Qwen3ForCausalLM(config)
    model.init_weights(seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folders of two tiny random checkpoints with head_dim 128."""
    return [tiny_checkpoint(tmp_path_factory.mktemp(f"seed{seed}"), seed, 128) for seed in (0, 1)]


def same(a, b) -> bool:
    return all(x.tokens == y.tokens and torch.equal(x.logprobs, y.logprobs) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
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


def prefilled_otherwise(engine) -> int:
    """How many greedily decoded tokens have other bits when everything before them is a prompt."""
    decoded = engine.generate(PROMPTS, SamplingParams(24, temperature=0))
    prompts = [(*c.prompt, *c.tokens[:i]) for c in decoded for i in range(24)]
    prefilled = engine.generate(prompts, SamplingParams(1, temperature=0))
    logprobs, tokens = torch.cat([c.logprobs for c in decoded]), [t for c in decoded for t in c.tokens]
    return sum(
        c.tokens != (token,) or not torch.equal(c.logprobs, logprob[None])
        for c, token, logprob in zip(prefilled, tokens, logprobs, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.parametrize(("head_dim", "cuda_graphs"), [(64, False), (64, True), (96, True), (128, True)])
def test_own_attention_in_vllm_on_a_gpu(tmp_path, head_dim, cuda_graphs):
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.recompose import rescore

    folder = tiny_checkpoint(tmp_path, 0, head_dim)
    # Fewer places than prompts: prefill and decode share batches.
    options = {"cuda_graphs": cuda_graphs, "gpu_memory_utilization": 0.2, "max_model_len": 512, "max_num_seqs": 3}
    if head_dim != 128:
        with pytest.raises(ValueError, match=f"head_dim {head_dim}, .*attention='triton'"):
            vllm_engine.VllmEngine(folder, **options)
    engine = vllm_engine.VllmEngine(folder, attention="triton", **options)
    try:
        assert engine.describe()["providers"]["attention"] == "bi_ops triton"
        completions = engine.generate(PROMPTS, PARAMS)
        assert same(completions, [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)])
        assert prefilled_otherwise(engine) == 0
    finally:
        engine.close()
    with attention_of(engine):
        reports = rescore(Qwen3ForCausalLM.from_pretrained(folder), completions)
    assert all(r.identical for r in reports.values()), reports


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_windows_soft_capping_and_sinks_in_vllm_on_a_gpu(tmp_path, cuda_graphs, device, monkeypatch):
    """A checkpoint whose layers have a window; vLLM's Qwen3 gives them neither a cap nor sinks, so the test does."""
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
    from bi_ops.verify.recompose import rescore

    folder = tiny_checkpoint(tmp_path, 0, 96)
    config, model = Qwen3Config.from_pretrained(folder), Qwen3ForCausalLM.from_pretrained(folder)
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | window))
    monkeypatch.setattr(Qwen3Config, "from_pretrained", lambda path: config)  # which refuses windows
    sinks, softcap = torch.linspace(-1, 3, 4, device=device), 3.0
    impl_cls = backend.PagedAttentionBackend.get_impl_cls()
    stock = impl_cls.__init__

    def build(self, *args, **kwargs):
        stock(self, *args, sinks=sinks, **kwargs)
        assert (self.sliding_window, self.logits_soft_cap) == ((63, 0), 0)
        self.logits_soft_cap = softcap

    monkeypatch.setattr(impl_cls, "__init__", build)
    options = {"cuda_graphs": cuda_graphs, "gpu_memory_utilization": 0.2, "max_model_len": 512, "max_num_seqs": 3}
    engine = vllm_engine.VllmEngine(folder, attention="triton", **options)
    try:
        completions = engine.generate(PROMPTS, PARAMS)
        assert same(completions, [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)])
        assert prefilled_otherwise(engine) == 0
    finally:
        engine.close()
    features = {"window_size": (63, 0), "softcap": softcap, "sinks": sinks}
    with attention_of(engine):
        for left_out in features:  # negative control
            rest = {name: value for name, value in features.items() if name != left_out}
            with monkeypatch.context() as m:
                m.setattr(attention, "flash_attention", functools.partial(attention.flash_attention, **rest))
                assert not rescore(model, completions, ["together"])["together"].identical, left_out
        monkeypatch.setattr(attention, "flash_attention", functools.partial(attention.flash_attention, **features))
        reports = rescore(model, completions)
    assert all(r.identical for r in reports.values()), reports


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_flash_attention_at_head_dim_64_is_caught(tmp_path):
    """Negative control: what is refused, forced by leaving the plugin out."""
    folder = tiny_checkpoint(tmp_path, 0, 64)
    engine = vllm_engine.VllmEngine(folder, plugin=False, cuda_graphs=False, gpu_memory_utilization=0.2)
    try:
        assert prefilled_otherwise(engine) > 0
    finally:
        engine.close()
