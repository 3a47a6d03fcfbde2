"""The paged keys and values of all layers: what the engine needs of them, and the row-major layout.

Keys are stored with their rotary positions applied, as paged attention kernels expect them. A backend whose kernel
reads another layout brings a `KVPages` for it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KVPages(Protocol):
    """Key and value pages of this rank, in any layout: only `write` and `read` know where a token's numbers are.

    keys, values: one tensor for each layer, its first dimension [num_blocks].
    row_major: whether they are [num_blocks, block_size, kv_heads, head_dim], as most kernels read them.
    """

    row_major: bool
    keys: list[Tensor]
    values: list[Tensor]
    num_blocks: int
    block_size: int

    @property
    def num_layers(self) -> int: ...

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [tokens, kv_heads, head_dim] at slots [tokens]."""

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values [tokens, kv_heads, head_dim] at slots [tokens]."""


class PagedKVCache:
    """`KVPages` in the row-major layout [num_blocks, block_size, kv_heads, head_dim].

    Triton, flash and xformers kernels read this layout in place.
    """

    row_major = True

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        # zeros, not empty: torch's allocator then takes untouched pages, so an unused cache costs no memory on a CPU.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @staticmethod
    def _rows(pages: Tensor) -> Tensor:
        """[num_blocks * block_size, kv_heads, head_dim] view of one layer's pages."""
        return pages.view(-1, *pages.shape[2:])

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [tokens, kv_heads, head_dim] at slots [tokens]."""
        self._rows(self.keys[layer]).index_copy_(0, slots, key)
        self._rows(self.values[layer]).index_copy_(0, slots, value)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values [tokens, kv_heads, head_dim] at slots [tokens]."""
        return self._rows(self.keys[layer]).index_select(0, slots), self._rows(self.values[layer]).index_select(
            0, slots
        )
