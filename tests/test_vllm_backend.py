"""The plugin's attention backend: training's bits in vLLM's batches, what is refused, and vLLM's own classes."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import pytest
import torch

from bi_ops import attention
from bi_ops.core import runtime, vllm
from bi_ops.vllm_plugin import backend

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


def metadata(release, **changes):
    """That release's FlashAttentionMetadata, as far as it is read."""
    unused = {f: False if f == "use_cascade" else None for f in release.refused_metadata.values()}
    return types.SimpleNamespace(**({"causal": True, **unused} | changes))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_has_its_training_bits_whatever_is_in_vllms_batch(layer, batch, layout, device):
    hq, hkv = HEADS
    lengths = [before + new for before, new in BATCHES[batch]]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v = (torch.randn(sum(lengths), h, HEAD_DIM, device=device).bfloat16() for h in (hq, hkv, hkv))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    trained = attention.flash_attention(q, k, v, cu_seqlens, backend="triton", **features(layer, device))

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
        vllm.RELEASES["0.33.0"],
        num_actual_tokens=len(rows),
        max_query_len=1,  # of a capture, say
        query_start_loc=torch.tensor([sum(news[:i]) for i in range(len(news) + 1)], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.to(device),
    )
    with torch.no_grad():
        attend = functools.partial(backend.paged_output, query, cache, found, HEAD_DIM, HEAD_DIM**-0.5)
        assert attend(output, **features(layer, device)) is output
        if layer != "plain":  # negative control
            assert not torch.equal(attend(output.clone())[: len(rows)], trained[rows])
    assert torch.equal(output[: len(rows)], trained[rows])
    assert torch.equal(output[len(rows) :], torch.full_like(output[len(rows) :], -1.0))


@pytest.mark.parametrize(
    ("version", "change", "what"),
    [
        ("0.26.0", {"causal": False}, "not causal"),
        ("0.33.0", {"causal": torch.ones(1)}, "not causal"),
        ("0.26.0", {"use_cascade": True}, "cascade"),
        ("0.26.0", {"mm_prefix_range_tensor": torch.ones(1)}, "multimodal prefixes"),
        ("0.33.0", {"mm_prefix_query_range_tensor": torch.ones(1)}, "multimodal prefixes"),
        ("0.33.0", {"rswa_prefix_lens": torch.ones(1)}, "sliding windows"),
        ("0.26.0", {"dcp_context_kv_lens": torch.ones(1), "use_cascade": True}, "cascade attention, context parallel"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(version, change, what):
    release = vllm.RELEASES[version]
    backend.check_metadata(metadata(release), release)
    with pytest.raises(NotImplementedError, match=what):
        backend.check_metadata(metadata(release, **change), release)


#: What vLLM asks a backend since 0.28, by what makes it ask.
NEW = {
    "rswa": "supports_rswa",
    "dcp": "supports_dcp",
    "adaptive_verification": "supports_device_cpu_query_lens_mismatch",
}


def real(name):
    """A module of the installed vLLM, which is imported before bi_ops' stand-ins; skips without it."""
    pytest.importorskip("transformers.tokenization_utils_base")
    return pytest.importorskip(f"vllm.{name}")


def test_the_installed_vllm_finds_the_backend_and_what_it_cannot_do():
    """Checks the real thing where it is installed, GPU or not."""
    registry, interface = real("v1.attention.backends.registry"), real("v1.attention.backend")
    flash = real("v1.attention.backends.flash_attn")
    questions = vllm.require("the test").questions
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

    asked: dict[str, Any] = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
    }
    asked |= {"has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False}
    asked |= {"device_capability": real("platforms.interface").DeviceCapability(9, 0), "attn_type": "decoder"}
    asked |= {"use_batch_invariant": True}
    assert found.validate_configuration(**asked) == []
    assert found.validate_configuration(**(asked | {"has_sliding_window": True, "has_sink": True})) == []
    changes: tuple[dict[str, Any], ...] = (
        *({"head_size": 20}, {"dtype": torch.float32}, {"kv_cache_dtype": "fp8"}, {"block_size": 8}),
        *({"use_mm_prefix": True}, {"attn_type": "encoder_only"}, {"use_non_causal": True}, {"use_mla": True}),
        *({"use_per_head_quant_scales": True}, {"use_kv_connector": True, "use_pcp": True}),
        *({f"use_{name}": True} for name in ("rswa", "dcp", "adaptive_verification") if NEW[name] in questions),
    )
    for change in changes:
        assert found.validate_configuration(**(asked | change)) != [], change
    builder = found.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) == interface.AttentionCGSupport.ALWAYS
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
    cache = torch.zeros(2, 2, 16, 128, device=device).bfloat16()  # [blocks, Hkv, block_size, 2 * D]
    cache[0], cache[1, :, :4] = k[:16].transpose(0, 1), k[16:].transpose(0, 1)
    whole = torch.tensor([0, 20], dtype=torch.int32, device=device)
    query = torch.randn(20, 2, 64, device=device).bfloat16()
    arguments = features(layer, device) | {"sinks": sinks, "backend": "triton"}
    keys, values = k[..., :64].contiguous(), k[..., 64:].contiguous()
    expected = attention.flash_attention(query, keys, values, whole, **arguments)
    given: dict[str, Any] = {
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
    given = {f.name: given[f.name] for f in dataclasses.fields(flash.FlashAttentionMetadata) if f.name in given}
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
        vllm.require("the test"),
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
        mm_prefix_range_tensor=None,  # the Triton backend's name for it in every release
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
    with pytest.raises(ValueError, match=r"head_dim 64.*leave --attention-backend out"):
        backend.choose_backend(stock)(flash, layer)


def test_layers_whose_backend_nobody_named_take_bi_ops_own_where_it_serves(monkeypatch):
    """The installed vLLM's own description of a layer, and its own questions."""
    selector, platforms = real("v1.attention.selector"), real("platforms")
    capability = real("platforms.interface").DeviceCapability(9, 0)
    real("v1.attention.backends.flash_attn")
    here = type(platforms.current_platform)
    monkeypatch.setattr(here, "get_device_capability", classmethod(lambda cls, device_id=0: capability))
    layer = selector.AttentionSelectorConfig(96, torch.bfloat16, "auto", None, use_batch_invariant=True)

    def asked(**change):
        def stock(chosen, layer):
            return types.SimpleNamespace(get_name=lambda: getattr(chosen, "name", chosen))

        return backend.choose_backend(stock)(change.pop("named", None), layer._replace(**change)).get_name()

    assert asked() == asked(head_size=64, has_sliding_window=True, has_sink=True) == backend.NAME
    assert asked(named="FLEX_ATTENTION") == "FLEX_ATTENTION"
    for change in ({"kv_cache_dtype": "fp8"}, {"use_mla": True}, {"attn_type": "encoder_only"}, {"head_size": 512}):
        assert asked(**change) is None
