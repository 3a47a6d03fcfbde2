"""Which attention a server runs on: the server option `attention`, and what `auto` makes of it.

    --additional-config '{"redvtp": {"attention": "torch"}}'

Told once, at the start, by front-end and workers alike: the pages' layout goes with it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from redvtp.attention.interface import MakeAttention
from redvtp.attention.torch_paged import TorchPagedAttention
from redvtp.checkpoint.config import DvlmConfig
from redvtp.kv.pages import KVPages, PagedKVCache
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.server_options import attention_option

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def runs_on_kernel(vllm_config: VllmConfig) -> bool:
    """Whether response steps run on vLLM's CPU kernel. Raises ValueError where it was asked for and cannot be had."""
    asked = attention_option(vllm_config)
    if asked == "auto":
        return torch_reason(vllm_config) is None
    obstacle = kernel_obstacle(vllm_config) if asked == "cpu" else None
    if obstacle:
        raise ValueError(f"attention 'cpu' cannot be used: {obstacle}; use 'auto' or 'torch'")
    return asked == "cpu"


def attention_over(cache: KVPages, config: DvlmConfig, vllm_config: VllmConfig) -> MakeAttention:
    """The backend that reads these pages."""
    if isinstance(cache, PagedKVCache):
        return partial(TorchPagedAttention, cache)
    from vllm_redvtp.attention.cpu import CpuPagedAttention
    from vllm_redvtp.attention.packed_pages import PackedKVCache

    assert isinstance(cache, PackedKVCache)
    heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
    return partial(CpuPagedAttention, cache, heads)


def attention_summary(vllm_config: VllmConfig) -> str:
    """One line for the log: what attention runs on, and why where that was not the user's word."""
    if runs_on_kernel(vllm_config):
        return "response steps on vLLM's CPU kernel, full steps on torch"
    if attention_option(vllm_config) == "torch":
        return "torch, as asked"
    return f"torch, since {torch_reason(vllm_config)}"


def torch_reason(vllm_config: VllmConfig) -> str | None:
    """Why `auto` does not mean vLLM's CPU kernel; None if it does."""
    obstacle = kernel_obstacle(vllm_config)
    config = engine_config(vllm_config.model_config)
    if obstacle is None and config.num_key_value_heads < config.num_attention_heads:
        # Measured, see docs/results.md: gathering fewer key heads costs torch little.
        return (
            f"{config.num_attention_heads} query heads share {config.num_key_value_heads} key heads, where vLLM's "
            f"kernel is the slower of the two"
        )
    return obstacle


def kernel_obstacle(vllm_config: VllmConfig) -> str | None:
    """Why vLLM's CPU attention kernel cannot serve this model on this machine; None if it can."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"vLLM's CPU kernel is not for {current_platform.device_name}"
    from vllm import _custom_ops  # noqa: F401  its import loads the kernels
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return "this build of vLLM has no CPU attention kernel"
    head_dim, sizes = engine_config(vllm_config.model_config).head_dim, CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        return f"vLLM's CPU kernel knows no head_dim {head_dim}, only {', '.join(map(str, sizes))}"
    dtype = vllm_config.model_config.dtype
    if dtype not in CPUAttentionBackend.supported_dtypes:
        return f"vLLM's CPU kernel knows no {dtype}"
    block_size = vllm_config.cache_config.block_size
    if block_size % _BLOCK_MULTIPLE:
        return f"vLLM's CPU kernel wants a --block-size that {_BLOCK_MULTIPLE} divides, not {block_size}"
    return None


# CPUAttentionBackend.get_supported_kernel_block_sizes says so, in a type of vLLM's own.
_BLOCK_MULTIPLE = 32
