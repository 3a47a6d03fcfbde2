"""Block arithmetic of the paged cache, and the small free list of the embedded driver.

`blocks_needed` is the one formula by which the scheduler frees the tail of a block table and the runner cuts its own
copy, so both agree on the new length without talking. `kv_token_bytes` is the one formula for what a token costs.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from redvtp.device import on_device


def blocks_needed(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def kv_token_bytes(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers. num_kv_heads: of this rank. itemsize: bytes of a number."""
    return 2 * num_layers * num_kv_heads * head_dim * itemsize


def slots_of(block_table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Slots [end - start] of a sequence's tokens: block id * block_size + offset. block_table: [blocks] int64."""
    logical = torch.arange(start, end, device=block_table.device)
    return block_table[logical // block_size] * block_size + logical % block_size


def padded_block_tables(tables: list[list[int]], device: torch.device) -> Tensor:
    """[sequences, blocks] int64, each padded with 0."""
    widest = max(map(len, tables))
    return on_device([table + [0] * (widest - len(table)) for table in tables], torch.int64, device)


def slots_of_tables(tables: Tensor, block_size: int) -> Tensor:
    """[sequences, blocks * block_size] int64, the slots of block tables [sequences, blocks]."""
    return (tables[:, :, None] * block_size + torch.arange(block_size, device=tables.device)).flatten(1)


class BlockPool:
    """Free list of cache blocks for `LocalEngine`; under vLLM its BlockPool does this work."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` block ids, or None (and nothing taken) when there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        self._free.extend(blocks)
