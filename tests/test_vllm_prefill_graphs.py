"""CUDA graphs of long prefills: which steps get one, and what vLLM is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_vllm import ARGUMENTS, installed

from bi_ops import vllm_plugin
from bi_ops.core.vllm import RELEASES
from bi_ops.vllm_plugin import prefill_graphs

SMALL = SimpleNamespace(
    hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128
)
LARGE = SimpleNamespace(
    hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128
)
STOCK = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
ASKED = {"bi_ops": {"prefill_graphs": True}}


@pytest.fixture(params=["0.26.0", "0.33.0"])
def vllm(monkeypatch, request):
    assert request.param in RELEASES
    with installed(monkeypatch, request.param) as modules:
        yield modules


@pytest.mark.parametrize(
    ("model", "ranks", "most", "found"),
    [
        (SMALL, 1, 8192, [768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]),
        (SMALL, 1, 5000, [768, 1024, 1536, 2048, 3072, 4096, 5000]),  # vLLM's longest step is one of them
        (SMALL, 1, 512, []),
        (LARGE, 1, 8192, [768, 1024, 1536, 2048, 3072]),  # longer ones keep the GPU busy: padding would cost time
        (LARGE, 4, 8192, [768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]),  # a rank has a quarter of the weights
    ],
)
def test_steps_are_captured_as_long_as_they_would_wait_for_python(model, ranks, most, found):
    assert prefill_graphs.sizes(STOCK, prefill_graphs.layer_weights(model, ranks), most) == found


def test_weights_of_a_layer_are_those_that_a_token_meets():
    assert prefill_graphs.layer_weights(SMALL, 1) == 1024 * (2 * 16 * 128 + 2 * 8 * 128 + 3 * 3072)
    bare = SimpleNamespace(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    assert prefill_graphs.layer_weights(bare, 1) == 64 * (4 * 64 + 3 * 128)
    experts = SimpleNamespace(**vars(SMALL), num_experts_per_tok=8, moe_intermediate_size=768)
    assert prefill_graphs.layer_weights(experts, 1) == 1024 * (2 * 24 * 128 + 3 * 8 * 768)


def test_an_engine_captures_them_unless_it_is_asked_not_to(vllm, caplog):
    vllm_plugin.register()
    arguments = vllm[ARGUMENTS].EngineArgs

    def captured(**asked):
        compiled = arguments(text=SMALL, sizes=STOCK, **asked).create_engine_config().compilation_config
        return compiled.cudagraph_capture_sizes, compiled.max_cudagraph_capture_size

    assert captured(additional_config={"bi_ops": {"prefill_graphs": False}}) == (STOCK, STOCK[-1])
    with caplog.at_level("INFO"):
        found, most = captured()
    assert (found, most) == captured(additional_config=ASKED)
    assert found == [*STOCK, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
    assert most == found[-1]
    assert "steps of 768, 1024" in caplog.text


@pytest.mark.parametrize("asked", [{"cudagraph_mode": "FULL_DECODE_ONLY"}, {"enforce_eager": True, "sizes": []}])
def test_without_full_graphs_of_every_step_it_says_so(vllm, caplog, asked):
    vllm_plugin.register()
    options = {"text": SMALL, "sizes": STOCK, "additional_config": ASKED} | asked
    with caplog.at_level("WARNING"):
        compiled = vllm[ARGUMENTS].EngineArgs(**options).create_engine_config().compilation_config
    assert compiled.cudagraph_capture_sizes == options["sizes"]
    assert "no CUDA graphs of long prefills" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        vllm[ARGUMENTS].EngineArgs(**options | {"additional_config": {}}).create_engine_config()
    assert "long prefills" not in caplog.text  # nobody asked


@pytest.mark.parametrize(("asked", "captured"), [(None, True), (True, True), (False, False)])
def test_on_several_gpus_they_are_captured_unless_it_is_declined(asked, captured):
    compiled = SimpleNamespace(
        cudagraph_capture_sizes=list(STOCK), cudagraph_mode="FULL", max_cudagraph_capture_size=512
    )
    config = SimpleNamespace(
        compilation_config=compiled,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        model_config=SimpleNamespace(hf_text_config=SMALL),
    )
    prefill_graphs.extend(config, asked)
    assert (compiled.max_cudagraph_capture_size == 8192) == captured
    assert (compiled.cudagraph_capture_sizes == STOCK) != captured


def test_what_is_neither_true_nor_false_is_refused_before_an_engine_starts(vllm):
    vllm_plugin.register()
    asked = {"bi_ops": {"prefill_graphs": 1}}
    with pytest.raises(ValueError, match="prefill_graphs is 1; it must be true or false"):
        vllm[ARGUMENTS].EngineArgs(additional_config=asked).create_engine_config()
