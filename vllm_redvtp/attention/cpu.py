"""The backend `cpu`: vLLM's CPU attention kernel, where vLLM runs on a CPU.

`redvtp.attention.cpu_kernel` has the attention itself; it is imported only where the kernel is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from redvtp.attention.interface import AttentionBackend
from redvtp.kv.pages import KVPages
from vllm_redvtp.attention.server_backend import PageShape, ServerBackend
from vllm_redvtp.engine_config import engine_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# CPUAttentionBackend.get_supported_kernel_block_sizes says so, in a type of vLLM's.
_BLOCK_MULTIPLE = 32


def _obstacle(vllm_config: VllmConfig) -> str | None:
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
        return f"vLLM's CPU kernel needs a --block-size that {_BLOCK_MULTIPLE} divides, not {block_size}"
    return None


def _drawback(vllm_config: VllmConfig) -> str | None:
    config = engine_config(vllm_config.model_config)
    if config.num_key_value_heads == config.num_attention_heads:
        return None
    # Measured, see docs/results.md: gathering fewer key heads costs torch little.
    return (
        f"{config.num_attention_heads} query heads share {config.num_key_value_heads} key heads, where vLLM's kernel "
        "is the slower of the two"
    )


def _make_pages(shape: PageShape) -> KVPages:
    from vllm_redvtp.attention.packed_pages import PackedKVCache

    return PackedKVCache(
        shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype
    )


def _make(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    from vllm_redvtp.attention.cpu_kernel import CpuAttention
    from vllm_redvtp.attention.packed_pages import PackedKVCache

    assert isinstance(pages, PackedKVCache)
    return CpuAttention(pages, heads, scale)


CPU = ServerBackend(
    "cpu", "response steps on vLLM's CPU kernel, full steps on torch", _obstacle, _drawback, _make_pages, _make
)
