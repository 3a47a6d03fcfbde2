"""Pages in the layout of vLLM's CPU attention kernel: the kernel's write, and reads, which vLLM does not offer.

A block holds, for each key head, block_size * head_dim keys and then as many values. In which order they lie there is
the kernel's choice and depends on the processor: keys transposed for vector instructions, pairs interleaved for matrix
tiles. `probe_layout` finds the order out, once: the kernel writes numbers that name their places. Reads, and with them
compaction, scores and the torch backend, gather through what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

# Digits of the probe: every type that a cache can have stores whole numbers below it exactly.
_BASE = 128


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where one head's numbers lie inside a block. keys, values: [block_size, head_dim] int64, token and channel to
    offset. isa: the kernel's name for it."""

    isa: str
    keys: Tensor
    values: Tensor


@lru_cache
def probe_layout(block_size: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """The layout on this processor. Raises ValueError if the kernel does not give every number a place of its own."""
    isa = _get_attn_isa(dtype, block_size, head_dim)
    size = block_size * head_dim
    names = torch.arange(size)
    found = [torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)]
    place = 1
    while place < size:
        digits = (names // place % _BASE).to(dtype).view(block_size, 1, head_dim)
        pages = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        keys, values = pages.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digits, digits, keys, values, torch.arange(block_size), isa)
        for names_found, half in zip(found, (keys, values), strict=True):
            names_found += half.flatten().long() * place
        place *= _BASE
    for names_found in found:
        if not torch.equal(names_found.sort().values, names):
            raise ValueError(
                f"vLLM's CPU attention kernel ({isa}, block_size {block_size}, head_dim {head_dim}, {dtype}) does not "
                f"keep keys and values one by one; use attention 'torch'"
            )
    # The offset that each name was found at.
    by_key, by_value = (names_found.argsort().view(block_size, head_dim) for names_found in found)
    return PageLayout(isa, by_key, by_value)


class PackedKVCache:
    """`redvtp.kv.pages.KVPages` that vLLM's CPU attention kernel reads in place.

    keys, values: for each layer [num_blocks, kv_heads, block_size, head_dim] by shape only, see above.
    """

    row_major = False

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_blocks, num_kv_heads, 2 * block_size, head_dim)
        # zeros for the same reason as in PagedKVCache; and rubbish that is no number would spread from unused slots.
        pages = [torch.zeros(shape, dtype=dtype).chunk(2, dim=2) for _ in range(num_layers)]
        self.keys = [keys for keys, _ in pages]
        self.values = [values for _, values in pages]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layout = probe_layout(block_size, head_dim, dtype)
        self._heads = torch.arange(num_kv_heads)[:, None]

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [tokens, kv_heads, head_dim] at slots [tokens]."""
        ops.cpu_attn_reshape_and_cache(key, value, self.keys[layer], self.values[layer], slots, self.layout.isa)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values [tokens, kv_heads, head_dim] at slots [tokens]."""
        blocks, tokens = slots // self.block_size, slots % self.block_size
        return (
            self._gather(self.keys[layer], blocks, self.layout.keys[tokens]),
            self._gather(self.values[layer], blocks, self.layout.values[tokens]),
        )

    def _gather(self, pages: Tensor, blocks: Tensor, offsets: Tensor) -> Tensor:
        """pages: keys or values of a layer. blocks: [tokens]. offsets: [tokens, head_dim], inside a block's head."""
        inside = pages.flatten(2)
        return inside[blocks[:, None, None], self._heads, offsets[:, None, :]]
