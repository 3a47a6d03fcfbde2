"""Which attention a server runs on: the server option `attention`, and what `auto` makes of it.

    --additional-config '{"redvtp": {"attention": "torch"}}'

Front-end and workers make the same choice at the start; the pages' layout goes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redvtp.errors import InvalidRequest, Knob
from redvtp.values import did_you_mean, refused
from vllm_redvtp.attention.cpu import CPU
from vllm_redvtp.attention.flash import FLASH
from vllm_redvtp.attention.reference import TORCH
from vllm_redvtp.attention.server_backend import ServerBackend
from vllm_redvtp.attention.triton import TRITON
from vllm_redvtp.server_options import ATTENTION, attention_option, option_refusals

if TYPE_CHECKING:
    from vllm.config import VllmConfig

AUTO = "auto"
# By name, the best first: `auto` takes the first one that nothing speaks against. torch is the last.
BACKENDS: dict[str, ServerBackend] = {backend.name: backend for backend in (CPU, FLASH, TRITON, TORCH)}


@option_refusals()
def chosen_backend(vllm_config: VllmConfig) -> ServerBackend:
    """Raises ValueError for a backend that there is not, or that cannot serve this configuration."""
    option = attention_option(vllm_config)
    if option == AUTO:
        return next(backend for backend in BACKENDS.values() if _against(backend, vllm_config) is None)
    if not isinstance(option, str) or option not in BACKENDS:
        names = (AUTO, *reversed(BACKENDS))
        raise refused(ATTENTION, f"one of {', '.join(names)}", option, did_you_mean(option, names))
    obstacle = BACKENDS[option].obstacle(vllm_config)
    if obstacle is not None:
        raise InvalidRequest(Knob(ATTENTION), f" {option!r} cannot be used: {obstacle}; use 'auto' or 'torch'")
    return BACKENDS[option]


def attention_summary(vllm_config: VllmConfig) -> str:
    """One line for the log: what attention runs on, and why where `auto` passed over a backend."""
    backend = chosen_backend(vllm_config)
    if attention_option(vllm_config) != AUTO:
        return f"{backend.summary}, as configured"
    better = list(BACKENDS.values())[: list(BACKENDS).index(backend.name)]
    reasons = "; ".join(reason for each in better if (reason := _against(each, vllm_config)) is not None)
    return f"{backend.summary}, since {reasons}" if reasons else backend.summary


def _against(backend: ServerBackend, vllm_config: VllmConfig) -> str | None:
    return backend.obstacle(vllm_config) or backend.drawback(vllm_config)
