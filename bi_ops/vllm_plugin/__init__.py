"""The vLLM plugin: makes `VLLM_BATCH_INVARIANT=1` hold where stock vLLM breaks it, and brings an attention backend.

vLLM loads `register` through the `vllm.general_plugins` entry point in every one of its processes. Outside vLLM's
batch-invariant mode it changes nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

from bi_ops.core import vllm
from bi_ops.vllm_plugin import backend, sources
from bi_ops.vllm_plugin.layers import kernels_of, operators_of, stock_methods
from bi_ops.vllm_plugin.orders import forget_logged
from bi_ops.vllm_plugin.patches import Patch, patches_of
from bi_ops.vllm_plugin.worker import KERNELS, check_kernels

__all__ = [
    "KERNELS",
    "backend",
    "check_kernels",
    "is_registered",
    "kernels_of",
    "operators_of",
    "patches_of",
    "register",
    "require_entry_point",
    "unregister",
]

logger = logging.getLogger(__name__)

#: The stock function behind every patch in force.
_stock: dict[Patch, Callable[..., Any]] = {}


def is_registered() -> bool:
    """Are the patches in force in this process?"""
    return bool(_stock)


def require_entry_point(op: str) -> None:
    """Raise RuntimeError unless processes that vLLM starts would load the plugin."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="bi_ops")
    chosen = os.environ.get("VLLM_PLUGINS")
    if not found:
        raise RuntimeError(
            f"{op}: vLLM's own processes find the plugin by its entry point, and bi_ops has none here: it was imported "
            "without being installed; pip install it"
        )
    if chosen is not None and "bi_ops" not in chosen.split(","):
        raise RuntimeError(f"{op}: VLLM_PLUGINS is {chosen!r}, without the plugin; add bi_ops to it or unset it")


def register() -> None:
    """Put every patch in force and offer the attention backend.

    Nothing happens when they are already, or outside vLLM's batch-invariant mode.

    Raises:
        RuntimeError: vLLM is missing or not a supported version, a patch point does not look as it did there, or
            another plugin has taken the backend's name. Nothing is patched then.
    """
    if _stock:
        return
    try:
        envs = importlib.import_module("vllm.envs")
    except ModuleNotFoundError:
        vllm.require("vllm_plugin")
        raise
    if not getattr(envs, "VLLM_BATCH_INVARIANT", False):
        logger.info("bi_ops: VLLM_BATCH_INVARIANT is not set, so vLLM is left as it is")
        return
    release = _release()
    patches = patches_of(release)
    # All modules are imported and checked before the first is changed: a module imported later would copy a patched
    # function by name, and unregister could not give it the stock one back.
    modules = [importlib.import_module(p.module) for p in patches]
    stock = [p.stock(m) for p, m in zip(patches, modules, strict=True)]
    stock_methods(release)  # which are replaced in a loaded model: checked before anything is patched
    backend.install()
    for patch, module, function in zip(patches, modules, stock, strict=True):
        patch.replace(module, patch.build(function))
        _stock[patch] = function
        logger.info("bi_ops: replaced %s.%s: %s", patch.module, patch.attribute, patch.why)
    if not release.shown:
        logger.warning(
            "bi_ops: vLLM %s was not shown to keep the contract on a GPU: compare with bi-ops parity --engine vllm",
            release.version,
        )


def _release() -> vllm.Release:
    """The installed release; the error for an unknown one also says where its patch points differ."""
    try:
        return vllm.require("vllm_plugin")
    except RuntimeError as error:
        root = sources.installed_root()
        if root is None:
            raise
        raise RuntimeError(f"{error} ({sources.unlike(root)})") from None


def unregister() -> None:
    """Give vLLM its own functions back. CUDA graphs that an engine captured before keep what they captured."""
    if _stock:
        backend.uninstall()
        forget_logged()
    while _stock:
        patch, function = _stock.popitem()
        patch.replace(importlib.import_module(patch.module), function)
