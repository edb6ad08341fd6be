"""vLLM releases as data: which bi_ops accepts, and what differs between them. Imports nothing of vLLM by itself."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

from bi_ops.core.backends import Support


@dataclass(frozen=True)
class Release:
    """What differs from release to release in the parts of vLLM that bi_ops calls, replaces or derives from.

    batch_invariant: the module of vLLM's batch-invariant kernels. choose_backend: the parameters of the function that
    chooses a layer's attention backend. refused_metadata: fields of the attention metadata that ask for what
    `paged_attention` does not compute, by the feature's name. questions: the names `supports_...` by which vLLM asks an
    attention backend what it can do, beyond those of 0.26. bias_in_accumulator: a linear layer's bias joins the fp32
    accumulator, else it is added after rounding. replaces_bmm: the batch-invariant mode puts a function without a
    gradient in torch.bmm's place. shown: rollout and training were compared bit for bit on a GPU with this release; of
    the others the sources were read.
    """

    version: str
    batch_invariant: str
    choose_backend: tuple[str, ...]
    refused_metadata: Mapping[str, str]
    bias_in_accumulator: bool
    replaces_bmm: bool
    questions: frozenset[str] = frozenset()
    shown: bool = True

    @property
    def bias_order(self) -> Literal["in_accumulator", "after_rounding"]:
        """The order of a linear layer's bias, as `matmul.linear` names it."""
        return "in_accumulator" if self.bias_in_accumulator else "after_rounding"


_CHOOSE = ("backend", "attn_selector_config", "num_heads")
_REFUSED = {"reference sliding windows": "rswa_prefix_lens", "context parallelism": "dcp_context_kv_lens"}
_CASCADE = {"cascade attention": "use_cascade"}

_0_26 = Release(
    version="0.26.0",
    batch_invariant="vllm.model_executor.layers.batch_invariant",
    choose_backend=_CHOOSE,
    refused_metadata=_REFUSED | _CASCADE | {"multimodal prefixes": "mm_prefix_range_tensor"},
    bias_in_accumulator=False,
    replaces_bmm=True,
)
# 0.27 to 0.32 need torch 2.13.
_0_27 = replace(_0_26, version="0.27.0", shown=False)
_0_28 = replace(
    _0_27,
    version="0.28.0",
    refused_metadata=_REFUSED | _CASCADE | {"multimodal prefixes": "mm_prefix_query_range_tensor"},
    questions=frozenset({"supports_device_cpu_query_lens_mismatch"}),
)
_0_29 = replace(
    _0_28,
    version="0.29.0",
    batch_invariant="vllm.model_executor.determinism.batch_invariant",
    questions=_0_28.questions | {"supports_non_causal_dcp"},
)
_0_30 = replace(_0_29, version="0.30.0", questions=_0_29.questions | {"supports_rswa", "supports_dcp"})
_0_31 = replace(_0_30, version="0.31.0", choose_backend=(*_CHOOSE, "_run_kv_cache_dtype"))
_0_32 = replace(
    _0_31,
    version="0.32.0",
    refused_metadata={k: v for k, v in _0_31.refused_metadata.items() if k not in _CASCADE},
    bias_in_accumulator=True,
    replaces_bmm=False,
)
_0_33 = replace(_0_32, version="0.33.0", questions=_0_32.questions | {"supports_kv_cache_update_bypass"}, shown=True)

#: Every release that is accepted, oldest first. Another one is added here, after its patch points were read.
RELEASES = {
    r.version: r for r in (_0_26, _0_27, replace(_0_27, version="0.27.1"), _0_28, _0_29, _0_30, _0_31, _0_32, _0_33)
}


@functools.cache
def installed() -> tuple[Support, Release | None]:
    """The installed release, if bi_ops accepts it, and why (not). Imports nothing of vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return Support(False, "vLLM is not installed; pip install 'bi-ops[vllm]'"), None
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return Support(False, "a vllm folder is importable but has no package metadata; reinstall vLLM"), None
    release = RELEASES.get(version.split("+")[0])
    if release is None:
        return Support(False, f"vLLM {version} is not supported; supported: {', '.join(RELEASES)}"), None
    return Support(True, f"vLLM {version}" + ("" if release.shown else ", not shown on a GPU")), release


def availability() -> Support:
    """Is a supported vLLM installed?"""
    return installed()[0]


def require(op: str) -> Release:
    """The installed release. Raises RuntimeError naming `op` and the supported ones if there is none of them."""
    here, release = installed()
    if release is None:
        raise RuntimeError(f"{op}: {here.reason}")
    return release


def batch_invariant_module() -> ModuleType:
    """vLLM's module of batch-invariant kernels, imported from where the installed release has it."""
    return importlib.import_module(require("vllm").batch_invariant)
