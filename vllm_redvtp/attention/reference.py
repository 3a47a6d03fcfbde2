"""The backend `torch`: the engine's reference (`redvtp.attention.torch_paged`). It serves everything, everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redvtp.attention.interface import AttentionBackend
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.pages import KVPages, PagedKVCache
from vllm_redvtp.attention.server_backend import PageShape, ServerBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _nothing(vllm_config: VllmConfig) -> None:
    return None


def row_major_pages(shape: PageShape) -> KVPages:
    """Pages that torch and the kernels for cards read."""
    return PagedKVCache(
        shape.num_layers,
        shape.num_blocks,
        shape.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        shape.dtype,
        shape.device,
    )


def _make(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    return TorchAttention(pages, scale)


TORCH = ServerBackend("torch", "torch", _nothing, _nothing, row_major_pages, _make)
