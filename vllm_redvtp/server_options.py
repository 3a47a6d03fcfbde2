"""Options of a server that no request can change.

    --additional-config '{"redvtp": {"vision_cache_gb": 2, "attention": "torch"}}'

The same object holds the server's defaults for knobs (`vllm_redvtp.knobs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redvtp.errors import InvalidRequest
from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES
from redvtp.params import KNOB_NAMES
from redvtp.values import nearest, refused, shown

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VISION_CACHE_GB = "vision_cache_gb"
ATTENTION = "attention"
OPTIONS = (VISION_CACHE_GB, ATTENTION)
_KEY = "redvtp"


# How alike another key must be to ours; other plugins have keys beside it.
_ALIKE = 0.8


@contextmanager
def option_refusals() -> Iterator[None]:
    """Within it, a refused value is one of `--additional-config`, and the ValueError names it as it stands there."""
    try:
        yield
    except InvalidRequest as error:
        raise ValueError(f"--additional-config: {error.spelled(_in_options)}") from error


def _in_options(name: str) -> str:
    return f"{_KEY}.{KNOB_NAMES.get(name, name)}"


@option_refusals()
def additional_values(vllm_config: VllmConfig) -> dict[str, Any]:
    """The `redvtp` part of `--additional-config`. Raises ValueError where it is not an object, or is misspelt."""
    config = vllm_config.additional_config
    if not isinstance(config, dict):
        return {}
    for key in config:
        _refuse_misspelt(key)
    values = config.get(_KEY, {})
    if not isinstance(values, dict):
        raise InvalidRequest(f"{_KEY!r} must be an object of knobs, got {shown(values)}")
    return values


def _refuse_misspelt(key: object) -> None:
    """Raises InvalidRequest for a key that was meant to be ours: without it, the server's defaults would be others."""
    if key == _KEY or not isinstance(key, str) or not (_KEY in key.lower() or nearest(key, [_KEY], _ALIKE)):
        return
    knob = key.lower().removeprefix(f"{_KEY}_")
    meant = f'{{"{_KEY}": {{"{knob}": ...}}}}' if knob != key.lower() else f'"{_KEY}"'
    raise InvalidRequest(f"unknown key {shown(key)}; did you mean {meant}?")


@option_refusals()
def vision_cache_bytes(vllm_config: VllmConfig) -> int:
    """Size of the cache of visual tokens in each worker: `vision_cache_gb`, in GiB. Raises ValueError for no size."""
    size = additional_values(vllm_config).get(VISION_CACHE_GB, DEFAULT_CACHE_BYTES / (1 << 30))
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < float("inf"):
        raise refused(VISION_CACHE_GB, "a number of GiB, 0 for no cache", size)
    return int(size * (1 << 30))


def attention_option(vllm_config: VllmConfig) -> object:
    """The server's `attention` as it was given; `vllm_redvtp.attention.choice` says what it may be."""
    return additional_values(vllm_config).get(ATTENTION, "auto")
