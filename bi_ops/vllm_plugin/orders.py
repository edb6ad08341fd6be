"""Which reduction orders a server samples in: their digest in its log, to be compared with training's."""

from __future__ import annotations

import logging

#: Below vLLM's own logger, so that the line is in the server's log.
logger = logging.getLogger("vllm.bi_ops")

#: What vLLM calls its attention backends -> what bi_ops calls them. FLASH_ATTN in version 3 alone.
BACKENDS = {"FLASH_ATTN": "vllm", "CUSTOM": "triton"}

#: What was logged in this process: vLLM chooses a backend for every layer anew.
_logged: set[str] = set()


def forget_logged() -> None:
    """Log again what was logged in this process."""
    _logged.clear()


def log_orders(attention: str) -> None:
    """Log, once, the digest that `bi-ops orders MODEL --engine vllm` prints for the model that vLLM is building.

    attention: the name of the backend that vLLM chose for a layer that decodes. Called where vLLM's config is set.
    """
    from vllm.config import get_current_vllm_config_or_none

    from bi_ops.models import orders, registry

    level = logging.INFO
    config = get_current_vllm_config_or_none()
    if config is None or (model := config.model_config) is None:
        return  # a backend that is asked for on its own
    try:
        if attention not in BACKENDS:
            raise ValueError(
                f"attention is vLLM's {attention}, whose order is not known, so training cannot have its bits; leave "
                "--attention-backend out"
            )
        shapes = orders.shapes_of(registry.config_from(model.hf_config.to_dict()), model.dtype)
        record = orders.record(shapes, BACKENDS[attention])
        text = f"bi_ops: reduction orders {record.digest} on {record.arch}, attention {BACKENDS[attention]}"
    except (RuntimeError, ValueError) as e:
        text = f"bi_ops: no record of reduction orders for this model: {e}"
        level = logging.INFO if attention in BACKENDS else logging.WARNING
    if text not in _logged:
        _logged.add(text)
        logger.log(level, text)
