"""What a server must know of an attention backend before it starts. One value for each, in a file of its own.

A new backend is such a file and its name in `redvtp.attention.choice.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from redvtp.attention.interface import AttentionBackend
from redvtp.kv.pages import KVPages

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class PageShape:
    """The KV cache of one rank."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class ServerBackend:
    """One way to compute attention in a server.

    name: its value in the server option `attention`.
    summary: what runs where, for the log.
    obstacle: why it cannot serve a configuration; None where it can.
    drawback: why `auto` passes over it though it could serve; None where nothing speaks against it.
    make_pages: pages in the layout that it reads.
    make: (pages, query heads of this rank, scale of the logits) -> the backend.
    """

    name: str
    summary: str
    obstacle: Callable[[VllmConfig], str | None]
    drawback: Callable[[VllmConfig], str | None]
    make_pages: Callable[[PageShape], KVPages]
    make: Callable[[KVPages, int, float], AttentionBackend]
