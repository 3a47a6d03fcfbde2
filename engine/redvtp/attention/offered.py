"""Paged kernels that other packages offer to an engine without a server, by entry point; the plugin offers vLLM's.

A package names an `OfferedKernel` under the entry point group `redvtp.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from redvtp.attention.interface import AttentionBackend
from redvtp.kv.pages import KVPages

KERNELS = "redvtp.attention"


@dataclass(frozen=True, slots=True)
class OfferedKernel:
    """An attention backend over row-major pages.

    obstacle: (device, dtype, head_dim, block_size) -> why it cannot serve there; None where it can.
    make: (pages, query heads, scale of the logits) -> the backend.
    """

    obstacle: Callable[[torch.device, torch.dtype, int, int], str | None]
    make: Callable[[KVPages, int, float], AttentionBackend]


def offered_kernels() -> dict[str, OfferedKernel]:
    """{name: kernel} of all installed packages, in the order of their names."""
    return {entry.name: entry.load() for entry in sorted(entry_points(group=KERNELS), key=lambda entry: entry.name)}
