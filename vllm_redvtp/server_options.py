"""Options of a server that no request can change.

    --additional-config '{"redvtp": {"vision_cache_gb": 2, "attention": "torch"}}'

The same object holds the server's defaults for knobs (`vllm_redvtp.knobs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VISION_CACHE_GB = "vision_cache_gb"
ATTENTION = "attention"
OPTIONS = (VISION_CACHE_GB, ATTENTION)


def additional_values(vllm_config: VllmConfig) -> dict[str, Any]:
    """The `redvtp` part of `--additional-config`. Raises ValueError where it is not an object."""
    config = vllm_config.additional_config
    values = config.get("redvtp", {}) if isinstance(config, dict) else {}
    if not isinstance(values, dict):
        raise ValueError(f"additional_config 'redvtp' must be an object of knobs, got {values!r}")
    return values


def vision_cache_bytes(vllm_config: VllmConfig) -> int:
    """Size of the cache of visual tokens in each worker: `vision_cache_gb`, in GiB. Raises ValueError for no size."""
    size = additional_values(vllm_config).get(VISION_CACHE_GB, DEFAULT_CACHE_BYTES / (1 << 30))
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < float("inf"):
        raise ValueError(f"{VISION_CACHE_GB} must be a number of GiB, 0 for no cache, got {size!r}")
    return int(size * (1 << 30))


def attention_option(vllm_config: VllmConfig) -> object:
    """The server's `attention` as it was given; `vllm_redvtp.attention.choice` says what it may be."""
    return additional_values(vllm_config).get(ATTENTION, "auto")
