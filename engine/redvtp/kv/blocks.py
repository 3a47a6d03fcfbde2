"""Block arithmetic of the paged cache, and the small free list of the embedded driver.

`blocks_needed` is the one formula by which the scheduler frees the tail of a block table and the runner cuts its own
copy, so both agree on the new length without talking.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def blocks_needed(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def slots_of(block_table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Slots [end - start] of a sequence's tokens: block id * block_size + offset. block_table: [blocks] int64."""
    logical = torch.arange(start, end, device=block_table.device)
    return block_table[logical // block_size] * block_size + logical % block_size


def slots_of_all(
    block_tables: list[list[int]], lengths: list[int], block_size: int, device: torch.device
) -> list[Tensor]:
    """Slots [length] of the first tokens of each sequence of a batch: `slots_of`, a few operations for all of them."""
    blocks = torch.tensor([block for table in block_tables for block in table], dtype=torch.int64, device=device)
    slots = (blocks[:, None] * block_size + torch.arange(block_size, device=device)).view(-1)
    parts = slots.split([len(table) * block_size for table in block_tables])
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


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
