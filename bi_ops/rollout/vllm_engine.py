"""Rollouts with vLLM: its `LLM`, batch-invariant, with the bi_ops plugin; on this GPU, or on others of the host."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bi_ops import vllm_plugin
from bi_ops.core import runtime, vllm
from bi_ops.core.orders import OrderRecord
from bi_ops.models import load_config, orders
from bi_ops.models.config import CausalLMConfig
from bi_ops.rollout import nccl_transfer, weight_transfer
from bi_ops.rollout.base import Completion, LogprobsMode, SamplingParams, check_logprobs_mode, check_request
from bi_ops.rollout.sleep import TAGS, SleepMode
from bi_ops.rollout.vllm_checks import (
    ATTENTION,
    attention_kernels,
    check_attention,
    check_tensor_parallel,
    prepare_environment,
)
from bi_ops.rollout.vllm_requests import completion_of, redraw, vllm_params
from bi_ops.rollout.vllm_weights import copy_weights, load_slices, named_as_vllm
from bi_ops.vllm_plugin.worker import forget_graph_pool

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM


class VllmEngine:
    """vLLM in its batch-invariant mode; the releases are those of `bi_ops.core.vllm.RELEASES`.

    Args:
        path: a checkpoint folder of a model that `bi_ops.models` knows.
        plugin: replace what is batch-variant in stock vLLM. False is the negative control and breaks the contract.
        attention: "triton", bi_ops' own kernels, at every head_dim; or "vllm", its FlashAttention 3, at head_dim 128
            and 256. They differ in bits: training adopts the orders of the one that sampled (`orders`). None: the
            plugin's default, "triton"; without the plugin "vllm".
        kernels: who computes everything else: "bi_ops", its own operators, or "vllm", vLLM's batch-invariant kernels.
            Same bits. Without the plugin vLLM computes all.
        cuda_graphs: capture full CUDA graphs of decoding, prefill and both in one batch; False runs eagerly. Same bits.
        dtype: of weights and activations.
        max_model_len: longest prompt + completion; None takes the model's.
        gpu_memory_utilization: the share of the GPU's memory that vLLM may fill.
        kv_cache_memory_bytes: the KV cache's size, whatever that share leaves. Without it vLLM measures free memory
            while it starts, and refuses to where another process gives memory back meanwhile.
        max_num_seqs: the most sequences decoded at once.
        seed: vLLM's own, with which it also reseeds this process's global generators; requests bring theirs.
        tensor_parallel_size: GPUs that share the model. With the plugin each size has the bits of one GPU, since no
            output is a sum over ranks (`vllm_plugin.parallel`); without it the sizes differ.
        enable_expert_parallel: the GPUs have whole experts of a mixture of experts; else each has a slice of every
            one. Same bits.
        peer_memory: these GPUs, of one host, gather over each other's memory and not by collectives. Same bits. None:
            where they reach it.
        distributed_executor_backend: vLLM's: "external_launcher", where torchrun has started a process for each GPU and
            all make the same calls, so that every rank hands over its own weights; or "mp", where vLLM starts the
            processes itself: `update_weights` reaches one of them, by CUDA IPC, but several only on `device_ids`. None:
            the first under torchrun, else vLLM's choice.
        device_ids: GPUs of vLLM's own, none of them the trainer's, as many as tensor_parallel_size, counted as torch
            counts them: workers there are processes ("mp"), and `update_weights` goes by NCCL. Same bits. None: the
            trainer's GPU.
        logprobs_mode: "raw_logprobs", of the logits as they are, or "processed_logprobs", of the distribution that was
            sampled: with the plugin training has these bits too.
        sleep_mode: allocate weights and KV cache so that `sleep` can give their memory back. Same bits.
        load_format: vLLM's: "auto" reads the checkpoint; "dummy" needs its config.json alone, and the weights have
            values that are of use from `update_weights` on.

    Raises:
        RuntimeError: no GPU, no supported vLLM, another mode already set, vLLM chose another attention kernel, or
            its processes would not find the plugin or what they import, or did not join the trainer.
        ValueError: a head size that cannot keep the contract, sizes that the ranks do not divide, device_ids that
            cannot be, or an unknown attention, kernels or logprobs_mode.
    """

    name = "vllm"
    #: What vLLM raised when it failed.
    _died = ""
    #: To GPUs of vLLM's own.
    _transfer: nccl_transfer.NcclTransfer | None = None
    #: What the last `update_weights` took, where it went to other GPUs.
    last_transfer: nccl_transfer.Transfer | None = None

    def __init__(
        self,
        path: str | Path,
        *,
        plugin: bool = True,
        attention: str | None = None,
        kernels: str = "bi_ops",
        cuda_graphs: bool = True,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.5,
        kv_cache_memory_bytes: int | None = None,
        max_num_seqs: int = 256,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        peer_memory: bool | None = None,
        distributed_executor_backend: str | None = None,
        device_ids: Sequence[int] | None = None,
        logprobs_mode: LogprobsMode = "raw_logprobs",
        sleep_mode: bool = False,
        load_format: str = "auto",
    ) -> None:
        check_logprobs_mode("VllmEngine", logprobs_mode)
        if runtime.INTERPRET:
            raise RuntimeError("VllmEngine: needs a CUDA GPU; bi_ops.rollout.embedded.EmbeddedEngine runs without one")
        vllm.require("VllmEngine")
        config = load_config(path)
        attention = attention or (ATTENTION[0] if plugin else "vllm")
        check_attention(attention, config.head_dim, plugin)
        check_tensor_parallel("VllmEngine", config, tensor_parallel_size, enable_expert_parallel)
        vllm_plugin.check_kernels("VllmEngine", kernels)
        if device_ids is not None:
            nccl_transfer.check_devices(
                "VllmEngine",
                device_ids,
                tensor_parallel_size,
                distributed_executor_backend,
                sleep_mode,
                own=torch.cuda.current_device(),
                count=torch.cuda.device_count(),
            )
            distributed_executor_backend = "mp"
        if distributed_executor_backend is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed_executor_backend = "external_launcher"
        alone = tensor_parallel_size == 1
        if peer_memory and (alone or not plugin):
            raise ValueError(
                "VllmEngine: peer_memory is how several GPUs gather under the plugin; leave it out, or take a "
                "tensor_parallel_size above 1 and plugin=True"
            )
        transfer: dict[str, str] | None = None  # where workers in other processes can take weights
        if distributed_executor_backend == "mp" and (alone or device_ids is not None):
            transfer = weight_transfer.CONFIG if device_ids is None else nccl_transfer.CONFIG
        if plugin and (transfer or (not alone and distributed_executor_backend != "external_launcher")):
            vllm_plugin.require_entry_point("VllmEngine")
        prepare_environment()
        if transfer:
            weight_transfer.require("VllmEngine", transfer["backend"])
        if device_ids is not None:
            nccl_transfer.check_library("VllmEngine")
        from vllm import LLM
        from vllm.config import CompilationConfig
        from vllm.plugins import load_general_plugins

        # vLLM loads its plugins once per process: done here, so that afterwards ours is in force or is not.
        load_general_plugins()
        if plugin:
            vllm_plugin.register()
        else:
            vllm_plugin.unregister()
        backend: dict[str, object] = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
        if attention == "triton":
            backend = {"backend": vllm_plugin.backend.NAME}
        bmm = torch.bmm
        try:
            self._llm: Any = LLM(
                model=str(path),
                skip_tokenizer_init=True,
                load_format=load_format,
                dtype=dtype,
                seed=seed,
                tensor_parallel_size=tensor_parallel_size,
                enable_expert_parallel=enable_expert_parallel,
                distributed_executor_backend=distributed_executor_backend,
                device_ids=None if device_ids is None else list(device_ids),
                weight_transfer_config=transfer,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=False,
                generation_config="vllm",  # the checkpoint's own would add sampling defaults and stop tokens
                logprobs_mode=logprobs_mode,
                enable_sleep_mode=sleep_mode,
                enforce_eager=not cuda_graphs,
                # Mode 0 keeps Inductor from rewriting norms and activations; graphs then hold the eager kernels.
                compilation_config=CompilationConfig(mode=0, cudagraph_mode="FULL") if cuda_graphs else None,
                attention_config=backend,
                additional_config={"bi_ops": {"kernels": kernels, "peer_memory": peer_memory}},
            )
        finally:
            # Some releases put a function without a gradient in torch.bmm's place, for the whole process. The
            # override of aten::bmm, under which autograd still works, stays and runs the same kernel.
            torch.bmm = bmm
        self.plugin, self.cuda_graphs, self.dtype, self._kernel = plugin, cuda_graphs, dtype, attention
        self.kernels = kernels if plugin else "vllm"
        if self._llm.llm_engine.vllm_config.use_v2_model_runner:  # the v1 runner draws from a generator's state
            self.redraw = redraw
        self.tensor_parallel_size, self._config = tensor_parallel_size, config
        self.device_ids = None if device_ids is None else tuple(device_ids)
        self._in_process = (alone and not transfer) or distributed_executor_backend == "external_launcher"
        if transfer == weight_transfer.CONFIG:
            self._llm.init_weight_transfer_engine({"init_info": {}})
        self.logprobs_mode = logprobs_mode
        self._memory = SleepMode(self._llm, sleep_mode)
        #: See `RolloutEngine`; without the plugin there are no bits that training could have.
        self.orders: OrderRecord | None = self.orders_of(config, attention, dtype) if plugin else None
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._vocab_size = config.vocab_size
        try:
            self._check_choices()
            if device_ids is not None:
                self._transfer = nccl_transfer.NcclTransfer(self._llm, tensor_parallel_size)
        except RuntimeError:
            self.close()
            raise

    @staticmethod
    def orders_of(config: CausalLMConfig, attention: str | None = None, dtype: str = "bfloat16") -> OrderRecord:
        """The orders of an engine, or a separate `vllm serve`, with the plugin, on this machine.

        Raises:
            ValueError: an attention or a dtype that is none. RuntimeError: vLLM's attention cannot run here.
        """
        attention = attention or ATTENTION[0]
        check_attention(attention, config.head_dim, plugin=True)
        known = {"auto": config.dtype, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if dtype not in known:
            raise ValueError(f"VllmEngine: dtype is {dtype!r}; it must be {', '.join(known)}")
        return orders.record(orders.shapes_of(config, known[dtype]), attention)

    def _check_choices(self) -> None:
        """Raise RuntimeError where vLLM silently chose something else than it was asked for."""
        found = set().union(*self._llm.apply_model(attention_kernels))
        wanted = "FLASH_ATTN 3" if self._kernel == "vllm" else vllm_plugin.backend.NAME
        if found != {wanted}:
            raise RuntimeError(
                f"VllmEngine: vLLM chose attention {sorted(found)} instead of {wanted}; the contract was shown on "
                "Hopper (sm_90) only"
            )
        if (self.kernels == "bi_ops") != bool(self._operators()["linear"]):  # a mixture's router is always bi_ops'
            raise RuntimeError(f"VllmEngine: kernels={self.kernels!r}, but bi_ops computes {dict(self._operators())}")
        mode = self._llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        if (mode.name == "FULL") != self.cuda_graphs:  # not FULL_DECODE_ONLY either, which vLLM may fall back to
            raise RuntimeError(f"VllmEngine: vLLM chose cudagraph_mode {mode.name} with cuda_graphs={self.cuda_graphs}")

    def _operators(self) -> Counter[str]:
        """How many of vLLM's layers compute with each operator of bi_ops'."""
        count = functools.partial(vllm_plugin.operators_of, release=vllm.require("VllmEngine"))
        found: list[Counter[str]] = self._open().apply_model(count)
        return found[0]

    def _open(self) -> Any:
        if self._llm is None:
            raise RuntimeError("VllmEngine: the engine is closed; make a new one")
        if self._died:
            raise RuntimeError(f"VllmEngine: the engine died ({self._died}); close it and make a new one")
        return self._llm

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> list[Completion]:
        """One completion per prompt (token ids), in order.

        Raises:
            ValueError: as `RolloutEngine.generate`, or a seed or temperature that vLLM would replace by another.
            RuntimeError: the engine is closed or asleep, vLLM failed, which ends the engine, or returned no
                log-probability for a token.
        """
        llm = self._open()
        self._memory.check("generate")
        each = check_request(prompts, params, vocab_size=self._vocab_size, max_model_len=self.max_model_len)
        requests = [vllm_params(i, p) for i, p in enumerate(each)]
        if not requests:
            return []
        try:
            outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], requests, use_tqdm=False)
        except Exception as error:  # of its own kind too, as EngineDeadError; its requests are left unfinished
            self._died = f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"generate: vLLM's engine died ({self._died}); close it and make a new one. A training run goes on "
                "from its last checkpoint with --resume"
            ) from error
        processed = self.logprobs_mode == "processed_logprobs"
        return [
            completion_of(i, prompt, o.outputs[0], p.distribution if processed else None)
            for i, (prompt, o, p) in enumerate(zip(prompts, outputs, each, strict=True))
        ]

    @property
    def model(self) -> torch.nn.Module:
        """vLLM's own model, in this process: this rank's share of it.

        Raises:
            RuntimeError: it is in other processes.
        """
        llm = self._open()
        if not self._in_process:
            raise RuntimeError(
                "VllmEngine: vLLM's own processes hold the weights (distributed_executor_backend='mp'), out of "
                "reach from here; start one process for each GPU with torchrun, for 'external_launcher', or name GPUs "
                "of vLLM's own in device_ids"
            )
        return llm.apply_model(lambda model: model)[0]

    def weight_copies(self, model: CausalLM) -> dict[torch.nn.Parameter, torch.Tensor]:
        """vLLM's own weights by those of `model`, where an optimizer may write them.

        Whole, bf16, contiguous, on the device of the model's.
        They stay where they are: captured CUDA graphs read them. None in sleep mode, in which they come and go.
        """
        if self.tensor_parallel_size > 1 or self._memory.enabled or not self._in_process:
            return {}  # a rank has slices
        own = {n: p.data for n, p in self.model.named_parameters()}
        found = {p: own[name][: p.shape[0]] for name, p in named_as_vllm(model).items() if name in own}
        return {
            p: t
            for p, t in found.items()
            if t.dtype == torch.bfloat16 and t.shape == p.shape and t.device == p.device and t.is_contiguous()
        }

    def update_weights(self, model: CausalLM, written: Collection[torch.Tensor] = ()) -> None:
        """Copy the model's weights, rounded to the engine's dtype, into vLLM's own and forget every cached prefix.

        An engine that sleeps wakes up, its weights before its KV cache.

        written: parameters that `weight_copies` has a tensor for, which holds their values already.

        Raises:
            ValueError: the model does not fit; every tensor that does not is listed.
            RuntimeError: the engine is closed or still generating, the weights are in several other processes on the
                trainer's GPU, another process has other bits afterwards, or has failed, which ends the engine.
        """
        llm = self._open()
        elsewhere = self._transfer is not None or (self.tensor_parallel_size == 1 and not self._in_process)
        target = None if elsewhere else self.model
        self._memory.wake_up("weights")
        if self._transfer is not None:
            try:
                self.last_transfer = self._transfer.update(model, llm.model_config.dtype)
            except nccl_transfer.TransferFailed as error:
                self._died = str(error)
                raise
        elif target is None:
            weight_transfer.update(llm, model, llm.model_config.dtype)
        elif self.tensor_parallel_size > 1:
            load_slices(model, target, self._config)
        else:
            parameters = named_as_vllm(model)
            source = {n: p.detach() for n, p in parameters.items()}
            copy_weights(source, target, {n for n, p in parameters.items() if p in written})
        torch.cuda.synchronize()  # vLLM need not run on the stream that copied
        self._memory.filled()
        self._memory.wake_up("kv_cache")
        if not llm.reset_prefix_cache():
            raise RuntimeError("update_weights: vLLM still holds unfinished requests; let generate return first")

    def sleep(self, level: int = 2) -> None:
        """Give the memory of the weights and of the KV cache back, until `update_weights` or `wake_up`.

        level: 1 keeps the weights in the host's memory, 2 forgets them: then `update_weights` has to come first. CUDA
        graphs stay. Nothing happens if the engine is asleep.

        Raises:
            RuntimeError: the engine is closed or has no sleep_mode. ValueError: another level.
        """
        self._open()
        self._memory.sleep(level)

    def wake_up(self) -> None:
        """Take the memory again, and after `sleep(level=1)` the weights' values. Nothing happens if it is awake."""
        self._open()
        self._memory.wake_up(*TAGS)

    def describe(self) -> dict[str, Any]:
        """What a report needs to be reproduced."""
        import triton
        import vllm as package

        config, ours = self._open().llm_engine.vllm_config, self._operators()
        return {
            "engine": self.name,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name(),
            "cuda_graphs": self.cuda_graphs,
            "logprobs": self.logprobs_mode,
            "plugin": self.plugin,
            "tensor_parallel_size": self.tensor_parallel_size,
            "device_ids": self.device_ids,
            "model_runner": "v2" if config.use_v2_model_runner else "v1",
            "orders": None if self.orders is None else self.orders.digest,
            "bias_order": vllm.require("VllmEngine").bias_order,
            "backends": {
                "attention": "FLASH_ATTN 3" if self._kernel == "vllm" else "bi_ops triton",
                "linear": "bi_ops" if ours["linear"] else "vllm matmul_persistent",
                **{op: "bi_ops" if ours[op] else "vllm" for op in ("norm", "qk_norm_rope", "activation")},
                **{op: "bi_ops" if ours[op] else "vllm" for op in ("router", "experts") if ours["router"]},
            },
            "versions": {
                "vllm": package.__version__,
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
            },
        }

    def close(self) -> None:
        """Shut vLLM down and free its GPU memory. Closing twice is fine."""
        if self._llm is None:
            return
        for step in (
            lambda: self._memory.wake_up(*TAGS),  # vLLM would free what is not there
            lambda: self._llm.llm_engine.engine_core.shutdown(),
            self._transfer.close if self._transfer else lambda: None,
        ):
            with contextlib.suppress(Exception) if self._died else contextlib.nullcontext():
                step()  # of an engine that died, why it did is what counts
        self._llm = None
        gc.collect()
        torch.cuda.empty_cache()
        forget_graph_pool()
