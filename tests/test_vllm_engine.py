"""VllmEngine: what it checks and copies without vLLM or a GPU, and its bits on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import json
import types
from typing import Any

import pytest
import torch
from fake_vllm import installed

from bi_ops import attention, vllm_plugin
from bi_ops.core import runtime
from bi_ops.core.vllm import RELEASES
from bi_ops.rollout import vllm_checks, vllm_engine, vllm_requests, vllm_weights
from bi_ops.rollout.base import SamplingParams
from bi_ops.vllm_plugin import backend

#: An engine's options: a cache of a known size, so that it starts beside other tests on one GPU.
MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "max_model_len": 512}


@pytest.fixture(params=RELEASES)
def vllm(monkeypatch, request):
    with installed(monkeypatch, request.param) as modules:
        yield modules


# --------------------------------------------------------------------------------------------------------------
# as far as it needs neither vLLM nor a GPU


@pytest.mark.parametrize(
    ("attention", "head_dim", "plugin", "message"),
    [
        ("vllm", 64, True, r"head_dim 64, .*attention='triton'"),
        ("vllm", 96, True, r"head_dim 96, .*leave --attention-backend out"),
        ("triton", 20, True, "head_dim 20 is not built; it must be a multiple of 8"),
        ("triton", 128, False, "a part of the plugin"),
        ("flash", 128, True, "attention is 'flash'; it must be triton or vllm"),
    ],
)
def test_attention_that_cannot_keep_the_contract_is_refused(attention, head_dim, plugin, message):
    with pytest.raises(ValueError, match=f"VllmEngine: .*{message}"):
        vllm_checks.check_attention(attention, head_dim, plugin)


def test_kernels_that_are_none_are_refused():
    with pytest.raises(ValueError, match="VllmEngine: kernels is 'triton'; it must be bi_ops or vllm"):
        vllm_plugin.check_kernels("VllmEngine", "triton")


def test_attention_that_can_is_not():
    for case in (("vllm", 128, True), ("vllm", 256, True), ("triton", 64, True), ("triton", 128, True)):
        vllm_checks.check_attention(*case)
    vllm_checks.check_attention("vllm", 64, False)  # the negative control


@pytest.mark.parametrize(("name", "value"), [("VLLM_BATCH_INVARIANT", "0"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "1")])
def test_a_contradicting_environment_is_refused(monkeypatch, name, value):
    for n, v in vllm_checks.ENVIRONMENT.items():
        monkeypatch.setenv(n, v)
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"{name}={value} is set"):
        vllm_checks.prepare_environment()


def test_a_vllm_that_runs_in_another_mode_is_refused(vllm, monkeypatch):
    for n, v in vllm_checks.ENVIRONMENT.items():
        monkeypatch.setenv(n, v)
    vllm_checks.prepare_environment()
    vllm["vllm.envs"].VLLM_BATCH_INVARIANT = False
    with pytest.raises(RuntimeError, match="another mode; start a new process"):
        vllm_checks.prepare_environment()


def tiny_module(rows: int) -> Any:
    module: Any = torch.nn.Module()
    module.model = torch.nn.Module()
    module.model.embed_tokens = torch.nn.Embedding(rows, 4, dtype=torch.bfloat16)
    module.model.norm = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    return module


def test_weights_are_rounded_and_copied_in_place_and_the_vocabulary_may_be_padded():
    target = tiny_module(8)
    source = {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4, 4)}
    address, padding = target.model.norm.weight.data_ptr(), target.model.embed_tokens.weight[6:].clone()
    vllm_weights.copy_weights(source, target)
    assert torch.equal(target.model.norm.weight, source["model.norm.weight"].bfloat16())
    assert torch.equal(target.model.embed_tokens.weight[:6], source["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(target.model.embed_tokens.weight[6:], padding)
    assert target.model.norm.weight.data_ptr() == address


def test_every_weight_that_does_not_fit_is_listed_and_nothing_is_copied():
    target = tiny_module(8)
    before = target.model.embed_tokens.weight.clone()
    source = {"model.embed_tokens.weight": torch.randn(9, 4), "model.extra.weight": torch.randn(1)}
    with pytest.raises(ValueError, match="does not fit") as error:
        vllm_weights.copy_weights(source, target)
    for part in ("embed_tokens.weight is [9, 4]", "model.extra.weight is unknown", "model.norm.weight is missing"):
        assert part in str(error.value)
    assert torch.equal(target.model.embed_tokens.weight, before)


def tiny_config(**sizes):
    from bi_ops.models.qwen3 import Qwen3Config

    known = {
        **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    }
    return Qwen3Config(**{**known, **sizes})


def test_a_rank_takes_its_slices_by_vllms_loaders_and_another_model_is_refused():
    from bi_ops.models.qwen3 import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM(tiny_config())
    model.init_weights(0)
    taken: dict[str, torch.Tensor] = {}

    class Target(torch.nn.Module):
        def load_weights(self, weights):
            taken.update(weights)
            return {n for n, _ in self.named_parameters() if n != "model.norm.weight"}

    vllm_weights.load_slices(model, Target(), model.config)
    packed = torch.cat([taken[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    assert torch.equal(packed, model.model.layers[0].self_attn.qkv_proj.weight)
    assert len(taken) == sum(1 for _ in model.weight_slices())
    target: Any = Target()
    target.add_module("model", tiny_module(8).model)
    with pytest.raises(ValueError, match=r"no weights for vLLM's model\.norm\.weight"):
        vllm_weights.load_slices(model, target, model.config)
    with pytest.raises(ValueError, match="does not fit the engine: vocab_size 32, the engine has 48"):
        vllm_weights.load_slices(model, target, tiny_config(vocab_size=48))


def test_sizes_that_ranks_cannot_share_are_refused_and_few_kv_heads_are_copied():
    for size in (1, 2, 4):
        vllm_checks.check_tensor_parallel("VllmEngine", tiny_config(), size)
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=3 does not divide .*num_attention_heads 4, hidden_size"
    ):
        vllm_checks.check_tensor_parallel("VllmEngine", tiny_config(), 3)
    with pytest.raises(ValueError, match="num_key_value_heads 3 evenly"):
        vllm_checks.check_tensor_parallel("VllmEngine", tiny_config(num_attention_heads=12, num_key_value_heads=3), 4)
    with pytest.raises(ValueError, match="must be at least 1"):
        vllm_checks.check_tensor_parallel("VllmEngine", tiny_config(), 0)


def output(tokens, logprobs, finish_reason="length", ids=None):
    flat = types.SimpleNamespace(token_ids=list(tokens if ids is None else ids), logprobs=logprobs)
    return types.SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason=finish_reason)


def test_logprobs_survive_the_way_through_python_floats():
    exact = torch.randn(50)
    got = vllm_requests.completion_of(0, [1], output(range(50), [float(x) for x in exact]))
    assert torch.equal(got.logprobs, exact)
    assert got.logprobs.dtype == torch.float32


def test_an_answer_without_its_logprobs_is_refused():
    with pytest.raises(RuntimeError, match="no log-probability"):
        vllm_requests.completion_of(3, [1], output([4, 5], [-0.5], ids=[4]))
    with pytest.raises(RuntimeError, match="request 3 ended with 'abort'"):
        vllm_requests.completion_of(3, [1], output([4], [-0.5], "abort"))


@pytest.mark.skipif(not runtime.INTERPRET, reason="a GPU is here")
def test_without_a_gpu_the_error_names_the_other_engine(tmp_path):
    pytest.importorskip("bi_ops.models.qwen3", reason="the model family is needed")
    with pytest.raises(RuntimeError, match="EmbeddedEngine"):
        vllm_engine.VllmEngine(tmp_path)


# --------------------------------------------------------------------------------------------------------------
# vLLM itself, on a GPU

PROMPTS = [[5, 6, 7], [9] * 300, list(range(1, 130)), [3]]
PARAMS = [SamplingParams(24, temperature=t, seed=s) for s, t in enumerate((1.0, 0.0, 0.7, 1.0))]


def tiny_checkpoint(folder, seed, head_dim, vocab_size=1000):
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,  # 1000 is no multiple of 64, to which vLLM pads
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
@pytest.mark.parametrize(
    ("attention", "kernels", "cuda_graphs"),
    [
        (None, "bi_ops", False),
        (None, "bi_ops", True),
        ("vllm", "bi_ops", True),
        ("vllm", "vllm", False),
        (None, "vllm", True),
    ],
)
def test_engine_on_a_gpu(checkpoints, attention, kernels, cuda_graphs):
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.compositions import rescore

    options = {"cuda_graphs": cuda_graphs, **MEMORY}
    options |= {"attention": attention, "kernels": kernels}
    engine = vllm_engine.VllmEngine(checkpoints[0], **options)
    try:
        found = engine.describe()["backends"]
        assert {found[op] == "bi_ops" for op in ("linear", "norm", "qk_norm_rope", "activation")} == {
            kernels == "bi_ops"
        }
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
        assert engine.orders is not None
        model.adopt(engine.orders)
        reports = rescore(model, updated, orders=engine.orders)
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


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_the_first_requests_of_an_engine_are_sampled_as_later_ones(checkpoints):
    """All at temperature 1, which CUDA graphs sample; vLLM's warm-up has left filters and penalties behind."""
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.draws import redrawn

    params = [SamplingParams(24, seed=s) for s in range(64)]
    prompts = [[5 + i, 6, 7] for i in range(64)]
    engine = vllm_engine.VllmEngine(checkpoints[0], **MEMORY)
    try:
        found = [engine.generate(prompts, params) for _ in range(3)]
    finally:
        engine.close()
    assert same(found[0], found[1])
    assert same(found[1], found[2])
    model = Qwen3ForCausalLM.from_pretrained(checkpoints[0])
    assert engine.orders is not None
    model.adopt(engine.orders)
    report = redrawn(model, engine, found[0], params)
    assert report is not None
    assert (report.tokens_checked, report.tokens_different) == (64 * 24, 0), report
    eager = vllm_engine.VllmEngine(checkpoints[0], cuda_graphs=False, **MEMORY)  # samples as vLLM does
    try:
        assert same(found[0], eager.generate(prompts, params))
    finally:
        eager.close()


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_both_kernels_of_an_engine_have_the_same_bits(checkpoints):
    found = []
    for kernels in ("bi_ops", "vllm"):
        engine = vllm_engine.VllmEngine(checkpoints[0], kernels=kernels, **MEMORY)
        try:
            found.append(engine.generate(PROMPTS, PARAMS))
        finally:
            engine.close()
    assert same(*found)


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_a_worker_in_another_process_takes_weights_and_has_the_same_bits(checkpoints, tmp_path, monkeypatch):
    from bi_ops.models.qwen3 import Qwen3ForCausalLM

    info = tmp_path / "bi_ops_checkout-0.dist-info"  # an installed bi_ops has it, a checkout alone has not
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bi_ops_checkout\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbi_ops = bi_ops.vllm_plugin:register\n")
    if importlib.util.find_spec("ray") is None:  # 0.26 imports it, and calls nothing of it where weights go by IPC
        (tmp_path / "ray.py").touch()
    monkeypatch.syspath_prepend(tmp_path)  # which processes inherit
    models = [Qwen3ForCausalLM.from_pretrained(folder) for folder in checkpoints]
    found = []
    places: list[dict[str, Any]] = [{}, {"distributed_executor_backend": "mp"}]
    places += [{"device_ids": [1]}] if torch.cuda.device_count() > 1 else []
    for place in places:
        engine = vllm_engine.VllmEngine(checkpoints[0], **place, **MEMORY)
        try:
            assert (engine.weight_copies(models[0]) == {}) == bool(place)
            first = engine.generate(PROMPTS, PARAMS)
            engine.update_weights(models[1])  # which compares checksums
            second = engine.generate(PROMPTS, PARAMS)
            engine.update_weights(models[0])
            assert same(first, engine.generate(PROMPTS, PARAMS))
            assert not same(first, second)  # the negative control
            found.append((first, second))
        finally:
            engine.close()
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.memory  # it measures what an engine gives back
def test_an_engine_gives_its_memory_back_and_wakes_up_with_the_same_bits(checkpoints):
    from bi_ops.models.qwen3 import Qwen3ForCausalLM

    models = [Qwen3ForCausalLM.from_pretrained(folder) for folder in checkpoints]
    engine = vllm_engine.VllmEngine(checkpoints[0], gpu_memory_utilization=0.3, max_model_len=512, sleep_mode=True)
    try:
        assert engine.weight_copies(models[0]) == {}
        before = engine.generate(PROMPTS, PARAMS)
        for level in (2, 1, 2):
            free, total = torch.cuda.mem_get_info()
            engine.sleep(level)
            given = torch.cuda.mem_get_info()[0] - free
            assert given > 0.2 * total, f"level {level} gave {given / 2**30:.1f} GiB back"
            with pytest.raises(RuntimeError, match="generate: the engine is asleep"):
                engine.generate(PROMPTS, PARAMS)
            training = torch.full((int(0.15 * total) // 4,), float("nan"), device="cuda")  # in the memory it gave
            del training
            if level == 1:
                engine.wake_up()
            else:
                engine.update_weights(models[0])
            assert same(before, engine.generate(PROMPTS, PARAMS)), f"level {level}"
        engine.sleep()
        engine.wake_up()
        with pytest.raises(RuntimeError, match="forgot its weights"):
            engine.generate(PROMPTS, PARAMS)
        engine.update_weights(models[1])
        assert not same(before, engine.generate(PROMPTS, PARAMS))  # the negative control
        engine.update_weights(models[0])
        assert same(before, engine.generate(PROMPTS, PARAMS))
        engine.sleep()  # and it can be closed
    finally:
        engine.close()

    awake = vllm_engine.VllmEngine(checkpoints[0], **MEMORY)
    try:
        assert same(before, awake.generate(PROMPTS, PARAMS))
        with pytest.raises(RuntimeError, match="make it with sleep_mode=True"):
            awake.sleep()
    finally:
        awake.close()


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
def test_the_v1_model_runner_on_a_gpu(tmp_path, monkeypatch):
    """Its sampler would sum a row of logits in another order; at a vocabulary of this size that is seen."""
    from vllm import envs

    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.compositions import rescore

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    envs.disable_envs_cache()  # an engine keeps what it has read, for the process
    folder = tiny_checkpoint(tmp_path, 0, 128, vocab_size=151936)
    engine = vllm_engine.VllmEngine(folder, **MEMORY)
    try:
        assert engine.describe()["model_runner"] == "v1"
        completions = engine.generate(PROMPTS * 8, [SamplingParams(64, seed=s) for s in range(8 * len(PROMPTS))])
        model = Qwen3ForCausalLM.from_pretrained(folder)
        assert engine.orders is not None
        model.adopt(engine.orders)
        assert all(r.identical for r in rescore(model, completions, orders=engine.orders).values())
    finally:
        engine.close()
        envs.disable_envs_cache()


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
@pytest.mark.parametrize(
    ("head_dim", "attention", "cuda_graphs"),
    [(64, None, False), (64, None, True), (96, None, True), (128, None, True), (128, "triton", True)],
)
def test_own_attention_in_vllm_on_a_gpu(tmp_path, head_dim, attention, cuda_graphs, monkeypatch):
    """The default; prefill and decode share batches, and graphs hold them too."""
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.verify.compositions import rescore

    folder = tiny_checkpoint(tmp_path, 0, head_dim)
    # Fewer places than prompts: prefill and decode share batches, of up to 432 tokens.
    options = {"cuda_graphs": cuda_graphs, **MEMORY, "max_num_seqs": 3}
    if head_dim != 128:
        with pytest.raises(ValueError, match=f"head_dim {head_dim}, .*attention='triton'"):
            vllm_engine.VllmEngine(folder, attention="vllm", **options)
    import vllm.config

    sizes = functools.partial(vllm.config.CompilationConfig, cudagraph_capture_sizes=[1, 2, 3, 4, 64, 256, 320, 448])
    monkeypatch.setattr(vllm.config, "CompilationConfig", sizes)  # vLLM's own end at twice `max_num_seqs`
    engine = vllm_engine.VllmEngine(folder, attention=attention, **options)
    without_graph = []  # (longest query, sequences) of batches
    stock = backend.paged_output

    def counted(query, kv_cache, metadata, *args, **kwargs):
        without_graph.append((metadata.max_query_len, len(metadata.seq_lens)))
        return stock(query, kv_cache, metadata, *args, **kwargs)

    try:
        assert engine.describe()["backends"]["attention"] == "bi_ops triton"
        monkeypatch.setattr(backend, "paged_output", counted)
        completions = engine.generate(PROMPTS, PARAMS)
        if cuda_graphs:
            assert without_graph == []
        else:  # and that is no empty claim: prefill, decode and both
            assert {longest == 1 for longest, _ in without_graph} == {True, False}
            assert any(longest > 1 and n > 1 for longest, n in without_graph)
        assert same(completions, [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)])
        assert prefilled_otherwise(engine) == 0
    finally:
        engine.close()
    model = Qwen3ForCausalLM.from_pretrained(folder)
    assert engine.orders is not None
    model.adopt(engine.orders)
    reports = rescore(model, completions, orders=engine.orders)
    assert all(r.identical for r in reports.values()), reports


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.engine
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_windows_soft_capping_and_sinks_in_vllm_on_a_gpu(tmp_path, cuda_graphs, device, monkeypatch):
    """A checkpoint whose layers have a window; vLLM's Qwen3 gives them neither a cap nor sinks, so the test does."""
    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
    from bi_ops.verify.compositions import rescore

    folder = tiny_checkpoint(tmp_path, 0, 96)
    config, model = Qwen3Config.from_pretrained(folder), Qwen3ForCausalLM.from_pretrained(folder)
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | window))
    monkeypatch.setattr(vllm_engine, "load_config", lambda path: config)  # which refuses windows
    sinks, softcap = torch.linspace(-1, 3, 4, device=device), 3.0
    impl_cls = backend.PagedAttentionBackend.get_impl_cls()
    stock = impl_cls.__init__

    def build(self, *args, **kwargs):
        stock(self, *args, sinks=sinks, **kwargs)
        assert (self.sliding_window, self.logits_soft_cap) == ((63, 0), 0)
        self.logits_soft_cap = softcap

    monkeypatch.setattr(impl_cls, "__init__", build)
    options = {"cuda_graphs": cuda_graphs, **MEMORY, "max_num_seqs": 3}
    engine = vllm_engine.VllmEngine(folder, attention="triton", **options)
    try:
        completions = engine.generate(PROMPTS, PARAMS)
        assert same(completions, [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)])
        assert prefilled_otherwise(engine) == 0
    finally:
        engine.close()
    features = {"window_size": (63, 0), "softcap": softcap, "sinks": sinks}
    assert engine.orders is not None
    model.adopt(engine.orders)
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
    engine = vllm_engine.VllmEngine(folder, plugin=False, cuda_graphs=False, **MEMORY)
    try:
        assert prefilled_otherwise(engine) > 0
    finally:
        engine.close()
