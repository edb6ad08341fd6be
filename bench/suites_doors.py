"""bi_ops behind the names that the tests of others import, by suite; `calls` counts what went through."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from conditions_server import Server

import bi_ops  # isort: skip  (before triton)
import torch

from bi_ops import attention, logprob, matmul, norm

Tensor = torch.Tensor

calls = [0]

#: vLLM's names of the attention backends that are bi_ops' own, or whose order bi_ops' training has.
ATTENTION = ("CUSTOM", "FLASH_ATTN")

#: Of each engine of vLLM's tests, since several share a GPU; the tests ask for most of one.
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 8 << 30}


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    return call


# --------------------------------------------------------------------------------------------------------------
# vLLM: its operators


def _last(x: Tensor, dim: int) -> None:
    if dim not in (-1, x.ndim - 1):
        raise NotImplementedError(f"bi_ops' softmax is over the last dimension, not {dim} of {list(x.shape)}")


def _log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    _last(x, dim)
    return logprob.log_softmax(x)


def _softmax(x: Tensor, dim: int = -1, *_: Any) -> Tensor:
    _last(x, dim)
    return logprob.softmax(x)


def _bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    found = matmul.bmm(a, b)
    return found if out is None else out.copy_(found)


def _rms_norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    out.copy_(norm.rms_norm(x, weight, eps))


def _add_rms_norm_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    for t, new in zip((x, residual), norm.add_rms_norm(x, residual, weight, eps), strict=True):
        t.copy_(new)


def _beside(tests: Path) -> None:
    """vLLM's tests import the `utils` beside them."""
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    sys.path.insert(0, str(tests if tests.is_dir() else tests.parent))
    importlib.import_module("vllm.config")  # what they import first imports it, and is imported by it


def vllm_doors(tests: Path) -> None:
    _beside(tests)
    from vllm import _custom_ops

    from bi_ops.core.vllm import batch_invariant_module

    with contextlib.suppress(ModuleNotFoundError):  # whose norm some tests compare with: it keeps vLLM's kernel
        importlib.import_module("vllm.model_executor.layers.layernorm")

    module = batch_invariant_module()
    doors: dict[str, Callable[..., Any]] = {
        "rms_norm_batch_invariant": norm.rms_norm,
        "matmul_batch_invariant": matmul.matmul,
        "mm_batch_invariant": matmul.mm,
        "bmm_batch_invariant": _bmm,
        "bmm_out_batch_invariant": _bmm,
        "linear_batch_invariant": matmul.linear,
        "log_softmax": _log_softmax,
        "softmax": _softmax,
        "softmax_batch_invariant": _softmax,
    }
    for name, function in doors.items():
        if hasattr(module, name):
            setattr(module, name, counted(function))
    _custom_ops.rms_norm = counted(_rms_norm_into)
    _custom_ops.fused_add_rms_norm = counted(_add_rms_norm_in_place)


# --------------------------------------------------------------------------------------------------------------
# vLLM: its engines, with the plugin


class RemoteOpenAIServer:
    """In the place of the class that vLLM's tests start a server with. Its log says what bi_ops computes there."""

    def __init__(self, model: str, arguments: list[str], **_: Any) -> None:
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # a server's engine is a process of its own
        self._log = Path(tempfile.mkdtemp(prefix="bi_ops_suites_")) / "server.log"
        memory = [f"--{name.replace('_', '-')}={value}" for name, value in MEMORY.items()]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", *arguments, *memory]
        self._server = Server(command, self._log)

    def __enter__(self) -> RemoteOpenAIServer:
        try:
            self._server.start()
        except BaseException:
            self._server.kill()
            print(self._log.read_text(errors="replace")[-4000:])
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        calls[0] += self._log.read_text(errors="replace").count("bi_ops: computes ")

    def get_client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self._server.port}/v1", api_key="none")


def engine_doors(tests: Path) -> None:
    """vLLM as it is, but with bi_ops' attention among the backends of the tests, and little memory for each engine."""
    _beside(tests)
    utils: Any = importlib.import_module("utils")
    utils.BACKENDS = [*ATTENTION, *(b for b in utils.BACKENDS if b not in ATTENTION)]
    matmul.inference_linear = counted(matmul.inference_linear)  # which the plugin gives every linear layer
    llm = importlib.import_module("vllm").LLM
    stock = llm.__init__

    @functools.wraps(stock)
    def with_less_memory(self: Any, *args: Any, **given: Any) -> None:
        stock(self, *args, **{**given, **MEMORY})

    llm.__init__ = with_less_memory
    package, helpers = ModuleType("tests"), ModuleType("tests.utils")
    package.__path__ = []
    package.utils, helpers.RemoteOpenAIServer = helpers, RemoteOpenAIServer  # type: ignore[attr-defined]
    sys.modules |= {"tests": package, "tests.utils": helpers}


# --------------------------------------------------------------------------------------------------------------
# flash-attention


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_: Any, **options: Any
):
    """flash_attn_varlen_func, without dropout and ALiBi; every backward is deterministic."""
    window = tuple(int(n) for n in options.get("window_size", (-1, -1)))
    left, right = (window[0], window[1])
    return attention.flash_attention(
        *(q, k, v, cu_q),
        cu_seqlens_k=cu_k,
        max_seqlen=max_q,
        max_seqlen_k=max_k,
        causal=options.get("causal", False),
        softmax_scale=options.get("softmax_scale"),
        window_size=(left, right),
        softcap=options.get("softcap", 0.0),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
    """flash_attn_func: [B, S, H, D]."""
    starts = [torch.arange(len(t) + 1, dtype=torch.int32, device=t.device) * t.shape[1] for t in (q, k)]
    packed = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    out = _varlen(packed[0], packed[1], packed[2], starts[0], starts[1], q.shape[1], k.shape[1], **options)
    return out.view(*q.shape[:3], v.shape[3])


def _refused(*_: Any, **__: Any) -> None:
    raise NotImplementedError("bi_ops has no such door")


def flash_attention_doors(tests: Path) -> None:
    """The package, with what is plain Python of it from the folder beside the tests."""
    names = ["", *("kvpacked_", "qkvpacked_", "varlen_", "varlen_kvpacked_", "varlen_qkvpacked_")]
    functions: dict[str, Callable[..., Any]] = {f"flash_attn_{n}func": _refused for n in names}
    functions |= {"flash_attn_func": counted(_dense), "flash_attn_varlen_func": counted(_varlen)}
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__path__ = [str(parent / "flash_attn") for parent in tests.resolve().parents]
    for name, function in {**functions, "flash_attn_with_kvcache": _refused, "_get_block_size_n": _refused}.items():
        setattr(package, name, function)
        setattr(interface, name, function)
    interface.USE_TRITON_ROCM = False  # type: ignore[attr-defined]
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


# --------------------------------------------------------------------------------------------------------------
# batch_invariant_ops


def batch_invariant_ops_doors(_: Path) -> None:
    @contextlib.contextmanager
    def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
        calls[0] += enabled
        with bi_ops.batch_invariant_backward_mode() if enabled else contextlib.nullcontext():
            yield

    module = ModuleType("batch_invariant_ops")
    module.set_batch_invariant_mode = set_batch_invariant_mode  # type: ignore[attr-defined]
    sys.modules["batch_invariant_ops"] = module


DOORS: dict[str, Callable[[Path], None]] = {
    "vllm": vllm_doors,
    "vllm engines": engine_doors,
    "flash-attention": flash_attention_doors,
    "batch_invariant_ops": batch_invariant_ops_doors,
}
