"""The KV cache of the embedded engine: how many blocks it has, by blocks, by bytes or by requests."""

from __future__ import annotations

import torch

from redvtp.errors import InvalidRequest, Knob
from redvtp.families.config import DvlmConfig
from redvtp.kv.blocks import blocks_needed, kv_token_bytes
from redvtp.kv.pages import PagedKVCache
from redvtp.values import refused

# What the longest requests may take where neither blocks nor bytes are named; one of them always fits.
CACHE_BYTES = 4 << 30


def embedded_cache(
    config: DvlmConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    longest: tuple[int, int],
    num_blocks: int | None,
    memory_bytes: int | None,
) -> PagedKVCache:
    """Empty pages.

    longest: tokens of the longest request, and how many of those to hold where neither of the following is named.
    num_blocks: cache blocks in all. memory_bytes: as many blocks as fit.

    Raises ValueError for sizes that hold nothing.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    block_bytes = kv_token_bytes(layers, heads, config.head_dim, dtype.itemsize) * block_size
    if memory_bytes is not None:
        if num_blocks is not None:
            raise InvalidRequest("num_blocks and ", Knob("kv_cache_memory_bytes"), " exclude each other")
        if memory_bytes < block_bytes:
            rule = f"at least {block_bytes:,}, what a block of {block_size} tokens takes"
            raise refused("kv_cache_memory_bytes", rule, memory_bytes)
        num_blocks = memory_bytes // block_bytes
    if num_blocks is None:
        tokens, requests = longest
        one = blocks_needed(tokens, block_size)
        num_blocks = max(one, min(one * requests, CACHE_BYTES // block_bytes))
    return PagedKVCache(layers, num_blocks, block_size, heads, config.head_dim, dtype, device)
