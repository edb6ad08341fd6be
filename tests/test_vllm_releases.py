"""The table of vLLM releases against vLLM's sources, wherever they are found: nothing of vLLM is imported, no GPU."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
from pathlib import Path

import pytest
from fake_vllm import write_sources

from bi_ops import vllm_plugin
from bi_ops.core import vllm
from bi_ops.vllm_plugin import sources

#: The questions that every release asks an attention backend.
QUESTIONS = {
    f"supports_{what}"
    for what in (
        *("head_size", "dtype", "kv_cache_dtype", "block_size", "sink", "alibi_sqrt", "mm_prefix", "combination"),
        *("per_head_quant_scales", "sliding_window", "non_causal", "batch_invariance", "kv_connector", "pcp"),
        *("attn_type", "compute_capability"),
    )
}

FUSED_MOE = "vllm.model_executor.layers.fused_moe"

#: Module, function or Class.method, and the parameters by which bi_ops calls or overrides it; None: it must be there.
CALLED = [
    ("vllm.entrypoints.llm", "LLM.apply_model", ("self", "func")),
    ("vllm.entrypoints.llm", "LLM.reset_prefix_cache", ("self", "reset_running_requests", "reset_connector")),
    ("vllm.entrypoints.llm", "LLM.sleep", ("self", "level", "mode")),
    ("vllm.v1.worker.gpu_worker", "Worker.init_weight_transfer_engine", ("self", "init_info")),
    ("vllm.v1.worker.gpu_worker", "Worker.start_weight_update", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.update_weights", ("self", "update_info")),
    ("vllm.v1.worker.gpu_worker", "Worker.finish_weight_update", ("self",)),
    ("vllm.distributed.utils", "StatelessProcessGroup.create", None),
    (
        "vllm.distributed.device_communicators.pynccl",
        "PyNcclCommunicator.__init__",
        ("self", "group", "device", "library_path"),
    ),
    (
        "vllm.distributed.weight_transfer.packed_tensor",
        "packed_nccl_broadcast_producer",
        ("iterator", "group", "src", "post_iter_func", "buffer_size_bytes", "num_buffers"),
    ),
    ("vllm.distributed.weight_transfer.nccl_engine", "NCCLWeightTransferEngine.receive_weights", None),
    (
        "vllm.distributed.device_communicators.pynccl",
        "PyNcclCommunicator.broadcast",
        ("self", "tensor", "src", "stream"),
    ),
    ("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.destroy", ("self",)),
    ("vllm.distributed.device_communicators.pynccl_wrapper", "NCCLLibrary.__init__", ("self", "so_file")),
    ("vllm.entrypoints.llm", "LLM.wake_up", ("self", "tags")),
    ("vllm.plugins", "load_general_plugins", ()),
    *(
        ("vllm.distributed", f"tensor_model_parallel_{what}", ("input_", "dim"))
        for what in ("all_gather", "reduce_scatter")
    ),
    (f"{FUSED_MOE}.modular_kernel", "FusedMoEKernel.output_is_reduced", ("self",)),
    ("vllm.config.vllm", "VllmConfig.use_v2_model_runner", ("self",)),
    ("vllm.config.compilation", "CUDAGraphMode.has_full_cudagraphs", ("self",)),
    ("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version", None),
    ("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path", "is_mamba")),
    *(
        ("vllm.v1.attention.backends.registry", f"AttentionBackendEnum.{name}", ("self",))
        for name in ("is_overridden", "clear_override")
    ),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.get_path", ("self", "include_classname")),
    (
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl.forward",
        (
            *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            *("output_scale", "output_block_scale"),
        ),
    ),
    (
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl.__init__",
        (
            *("self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
            *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks"),
        ),
    ),
    ("vllm.v1.worker.gpu.sample.logprob", "compute_token_logprobs", ("logits", "token_ids")),
    ("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample", None),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor._gather_logits", ("self", "logits")),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self", "load_dummy_weights")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.profile_run", None),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.profile_run", None),
    (
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
    ),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.capture_model", None),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler.add_request", None),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler.apply_staged_writes", ("self",)),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch.make_dummy", None),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_model", ("self",)),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.get_model", ("self",)),
    ("vllm.config.model", "ModelConfig.get_vocab_size", ("self",)),
    ("vllm.distributed", "get_tensor_model_parallel_world_size", ()),
    ("vllm.distributed.parallel_state", "get_tp_group", ()),
    ("vllm.distributed", "tensor_model_parallel_all_gather", ("input_", "dim")),
    ("vllm.model_executor.parameter", "_ColumnvLLMParameter.load_column_parallel_weight", ("self", "loaded_weight")),
    ("vllm.model_executor.layers.linear", "LinearBase.update_param_tp_status", ("self",)),
    ("vllm.model_executor.models.qwen3", "Qwen3ForCausalLM.load_weights", ("self", "weights")),
    ("vllm.model_executor.models.qwen3_moe", "Qwen3MoeForCausalLM.load_weights", ("self", "weights")),
    (
        f"{FUSED_MOE}.routed_experts",
        "RoutedExperts.forward_modular",
        ("self", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    (f"{FUSED_MOE}.fused_moe_method_base", "FusedMoEMethodBase.apply", None),
    (
        "vllm.model_executor.layers.rotary_embedding.base",
        "RotaryEmbedding.forward_cuda",
        ("self", "positions", "query", "key"),
    ),
    (
        "vllm.model_executor.layers.rotary_embedding.base",
        "RotaryEmbeddingBase._match_cos_sin_cache_dtype",
        ("self", "query"),
    ),
]

#: Class of vLLM to the fields that bi_ops reads or sets.
FIELDS = {
    ("vllm.config.attention", "AttentionConfig"): {"backend", "flash_attn_version"},
    ("vllm.config.compilation", "CompilationConfig"): {"mode", "cudagraph_mode"},
    ("vllm.logprobs", "FlatLogprobs"): {"token_ids", "logprobs"},
    ("vllm.sampling_params", "SamplingParams"): {
        *("max_tokens", "temperature", "seed", "stop_token_ids", "ignore_eos", "top_p", "top_k", "min_p", "logprobs"),
        *("flat_logprobs", "detokenize", "output_kind"),
    },
    ("vllm.engine.arg_utils", "EngineArgs"): {
        *("model", "skip_tokenizer_init", "dtype", "seed", "tensor_parallel_size", "gpu_memory_utilization"),
        "kv_cache_memory_bytes",
        *("max_model_len", "max_num_seqs", "enable_prefix_caching", "generation_config", "logprobs_mode"),
        *("enforce_eager", "compilation_config", "attention_config", "speculative_config", "enable_lora"),
        *("additional_config", "distributed_executor_backend", "enable_sleep_mode", "weight_transfer_config"),
        *("load_format", "enable_expert_parallel", "device_ids"),
    },
    (f"{FUSED_MOE}.config", "FusedMoEParallelConfig"): {
        *("tp_size", "ep_size", "dp_size", "pcp_size", "enable_eplb", "is_sequence_parallel"),
    },
    (f"{FUSED_MOE}.config", "FusedMoEConfig"): {"moe_parallel_config", "skip_final_all_reduce", "has_bias"},
    (f"{FUSED_MOE}.routed_experts", "RoutedExperts"): {"expert_map", "_load_w2"},
    ("vllm.config.vllm", "VllmConfig"): {"additional_config", "scheduler_config", "model_config", "cache_config"},
    ("vllm.distributed.weight_transfer.ipc_engine", "IPCWeightTransferUpdateInfo"): {
        *("names", "dtype_names", "shapes", "ipc_handles"),
    },
    ("vllm.distributed.weight_transfer.nccl_engine", "NCCLWeightTransferUpdateInfo"): {
        *("names", "dtype_names", "shapes"),
    },
    ("vllm.distributed.weight_transfer.nccl_common", "NCCLWeightTransferInitInfo"): {
        *("master_address", "master_port", "rank_offset", "world_size"),
    },
    ("vllm.config.model", "ModelConfig"): {"model", "quantization"},
    ("vllm.config.scheduler", "SchedulerConfig"): {"max_num_batched_tokens", "max_num_seqs"},
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadata"): {
        *("causal", "num_actual_tokens", "block_table", "query_start_loc", "seq_lens", "max_query_len"),
    },
}


@pytest.fixture
def release() -> vllm.Release:
    if sources.installed_root() is None:
        pytest.skip("no sources of vLLM")
    version = importlib.metadata.version("vllm")
    assert version.split("+")[0] in vllm.RELEASES, "read its patch points and add it to bi_ops/core/vllm.py"
    return vllm.RELEASES[version.split("+")[0]]


def root() -> Path:
    found = sources.installed_root()
    assert found is not None
    return found


def names_in(module: str, owner: str) -> set[str]:
    """The annotated fields and the methods of a class."""
    body = sources.statements(root(), module)
    [found] = [n for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
    fields = {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return fields | {n.name for n in found.body if isinstance(n, ast.FunctionDef)}


def test_patch_points(release):
    assert sources.differences(release, root()) == []


def test_attention_metadata(release):
    """A field of another release's that this one has too would be a refusal that is lost."""
    module, owner = "vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadata"
    known = {field for r in vllm.RELEASES.values() for field in r.refused_metadata.values()}
    assert names_in(module, owner) & known == set(release.refused_metadata.values())


def test_questions_to_a_backend(release):
    asked = {n for n in names_in("vllm.v1.attention.backend", "AttentionBackend") if n.startswith("supports_")}
    assert asked - QUESTIONS == release.questions
    assert asked >= QUESTIONS
    assert "supports_dcp" in names_in("vllm.v1.attention.backend", "AttentionImplBase")


def test_bmm_and_bias(release):
    body = sources.statements(root(), release.batch_invariant)
    assert any("torch.bmm = " in ast.unparse(n) for n in body) is release.replaces_bmm
    [linear] = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == "linear_batch_invariant"]
    after = "output + bias" in ast.unparse(linear)
    assert after is not release.bias_in_accumulator
    assert after or "bias=bias" in ast.unparse(linear)
    matmul = sources.parameters(root(), release.batch_invariant, "matmul_persistent")
    assert matmul == ("a", "b", "bias")


@pytest.mark.parametrize(("module", "attribute", "expected"), CALLED, ids=[attribute for _, attribute, _ in CALLED])
def test_what_bi_ops_calls_and_overrides(release, module, attribute, expected):
    found = sources.parameters(root(), module, attribute)
    assert found is not None
    assert expected is None or found == expected


@pytest.mark.parametrize(("module", "owner"), FIELDS, ids=[owner for _, owner in FIELDS])
def test_what_bi_ops_reads_and_sets(release, module, owner):
    assert names_in(module, owner) >= FIELDS[module, owner]


def test_how_weights_are_packed_is_told_once(release):
    """At the start or with each update; `NcclTransfer` asks the first."""
    folder = "vllm.distributed.weight_transfer"
    told = [
        {"packed", "packed_buffer_size_bytes", "packed_num_buffers"} <= names_in(f"{folder}.{module}", owner)
        for module, owner in (
            ("nccl_common", "NCCLWeightTransferInitInfo"),
            ("nccl_engine", "NCCLWeightTransferUpdateInfo"),
        )
    ]
    assert sorted(told) == [False, True]


#: Class of vLLM to the attributes of its instances that a replaced method reads.
ATTRIBUTES = {
    ("vllm.model_executor.layers.layernorm", "RMSNorm"): {
        *("weight", "variance_epsilon", "variance_size_override", "pass_weight", "pass_weight_add"),
    },
    ("vllm.model_executor.custom_op", "CustomOp"): {"_forward_method"},
    ("vllm.model_executor.layers.linear", "LinearBase"): {
        *("quant_method", "skip_bias_add", "output_size", "params_dtype"),
    },
    ("vllm.model_executor.layers.linear", "RowParallelLinear"): {
        *("tp_rank", "tp_size", "input_size_per_partition", "output_size_per_partition", "output_partition_sizes"),
        *("input_is_parallel", "reduce_results", "bias"),
    },
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"): {
        *("quant_method", "num_embeddings"),
    },
    ("vllm.model_executor.layers.rotary_embedding.base", "RotaryEmbeddingBase"): {
        *("is_neox_style", "rotary_dim", "use_flashinfer"),
    },
    (f"{FUSED_MOE}.routed_experts", "RoutedExperts"): {
        *("moe_config", "activation", "apply_router_weight_on_input", "quant_method", "swiglu_limit", "top_k"),
    },
    (f"{FUSED_MOE}.router.base_router", "BaseRouter"): {"top_k"},
    (f"{FUSED_MOE}.router.fused_topk_router", "FusedTopKRouter"): {"renormalize", "scoring_func"},
    (f"{FUSED_MOE}.runner.moe_runner", "MoERunner"): {"gate", "router", "routed_experts"},
    (f"{FUSED_MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"): {"experts_cls", "moe_kernel"},
    **{
        (f"vllm.model_executor.models.{module}", owner): {
            *("head_dim", "num_heads", "qkv_proj", "o_proj", "attn", "rotary_emb", "q_norm", "k_norm"),
        }
        for module, owner in (("qwen3", "Qwen3Attention"), ("qwen3_moe", "Qwen3MoeAttention"))
    },
}


@pytest.mark.parametrize(("module", "owner"), ATTRIBUTES, ids=[owner for _, owner in ATTRIBUTES])
def test_what_replaced_methods_read(release, module, owner):
    body = sources.statements(root(), module)
    [found] = [n for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
    assigned = {
        n.attr
        for n in ast.walk(found)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    assert assigned >= ATTRIBUTES[module, owner]


# --------------------------------------------------------------------------------------------------------------
# the reader itself, on sources made here


@pytest.mark.parametrize("version", vllm.RELEASES)
def test_a_release_equals_itself_and_one_that_differs_is_described(version, tmp_path):
    release = vllm.RELEASES[version]
    write_sources(tmp_path, release)
    assert sources.differences(release, tmp_path) == []
    moved = dataclasses.replace(release, batch_invariant="vllm.elsewhere")  # negative control
    assert sources.differences(moved, tmp_path) == [
        f"vllm.elsewhere.{name} is missing" for name in ("rms_norm_batch_invariant", "override_envs_for_invariance")
    ]


def test_an_empty_folder_lacks_every_patch_point(tmp_path):
    release = vllm.RELEASES["0.26.0"]
    found = sources.differences(release, tmp_path)
    assert len(found) == len(vllm_plugin.patches_of(release)) + len(vllm_plugin.kernels_of(release))
    assert all(difference.endswith("is missing") for difference in found)


def test_a_name_is_followed_through_a_package_that_imports_everything(tmp_path):
    package = tmp_path / "vllm" / "distributed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .utils import *\nfrom .communication_op import *\n")
    (package / "utils.py").write_text("def other(): ...\n")
    (package / "communication_op.py").write_text("def all_reduce(input_): ...\n")
    (tmp_path / "vllm" / "layers.py").write_text("from vllm.distributed import all_reduce\n")
    assert sources.parameters(tmp_path, "vllm.layers", "all_reduce") == ("input_",)
    assert sources.parameters(tmp_path, "vllm.layers", "reduce_scatter") is None
