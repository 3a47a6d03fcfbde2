"""The engine's paged cache inside vLLM's memory budget: what vLLM accounts for, and the tensors themselves.

vLLM counts blocks and decides how many there are; the layout of a block is that of the attention backend
(`vllm_redvtp.attention`). All take the same space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from redvtp.families.config import DvlmConfig
from redvtp.kv.blocks import kv_token_bytes
from redvtp.kv.pages import KVPages
from vllm_redvtp.attention.choice import chosen_backend
from vllm_redvtp.attention.server_backend import PageShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def kv_cache_spec(config: DvlmConfig, vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """One entry for each layer, equal on all ranks. Non-causal: vLLM keeps chunked prefill and prefix caching off."""
    spec = FullAttentionSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=_kv_heads(config, vllm_config),
        head_size=config.head_dim,
        dtype=_dtype(vllm_config),
        non_causal=True,
    )
    return {f"language_model.layers.{layer}.self_attn": spec for layer in range(config.num_hidden_layers)}


def allocate_kv_cache(
    config: DvlmConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, device: torch.device
) -> KVPages:
    """The pages of this rank. Raises ValueError where their size is not what vLLM has set aside for them."""
    (group,) = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    cache = make_pages(config, vllm_config, config.num_hidden_layers, kv_cache_config.num_blocks, device)
    taken = sum(pages.nbytes for pages in (*cache.keys, *cache.values))
    granted = kv_cache_config.num_blocks * spec.page_size_bytes * config.num_hidden_layers
    if taken != granted:
        raise ValueError(f"the KV cache takes {taken:,} bytes where vLLM granted {granted:,}")
    return cache


def make_pages(
    config: DvlmConfig, vllm_config: VllmConfig, num_layers: int, num_blocks: int, device: torch.device
) -> KVPages:
    """This rank's share of so many blocks, in the layout that the server's attention wants."""
    block_size = vllm_config.cache_config.block_size
    heads, dtype = _kv_heads(config, vllm_config), _dtype(vllm_config)
    shape = PageShape(num_layers, num_blocks, block_size, heads, config.head_dim, dtype, device)
    return chosen_backend(vllm_config).make_pages(shape)


def token_bytes(config: DvlmConfig, vllm_config: VllmConfig) -> int:
    """Keys and values of one token on this rank."""
    heads = _kv_heads(config, vllm_config)
    return kv_token_bytes(config.num_hidden_layers, heads, config.head_dim, _dtype(vllm_config).itemsize)


def _kv_heads(config: DvlmConfig, vllm_config: VllmConfig) -> int:
    return config.num_key_value_heads // vllm_config.parallel_config.tensor_parallel_size


def _dtype(vllm_config: VllmConfig) -> torch.dtype:
    # vLLM has resolved names to types by now; its annotation still allows both.
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype
