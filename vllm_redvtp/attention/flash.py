"""The backend `flash`: vLLM's FlashAttention, for float16 and bfloat16 on NVIDIA's cards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend
from redvtp.attention.paged import PagedAttention
from redvtp.attention.paged_batch import PagedBatch
from redvtp.kv.pages import KVPages
from vllm_redvtp.attention.reference import row_major_pages
from vllm_redvtp.attention.server_backend import ServerBackend
from vllm_redvtp.engine_config import engine_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
_BLOCK_MULTIPLE = 16


class FlashKernel:
    """`redvtp.attention.paged.PagedKernel`.

    attend: vLLM's flash_attn_varlen_func. version: of FlashAttention.
    """

    # One split: how the card divides the keys of a batch does not show.
    batch_invariant = True
    reads_unused = True

    def __init__(self, scale: float, attend: Callable[..., Any], version: int) -> None:
        self._scale = scale
        self._attend = attend
        self._version = version

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        output, lse = self._attend(
            q=query,
            k=keys,
            v=values,
            max_seqlen_q=batch.longest_query,
            cu_seqlens_q=batch.query_starts,
            max_seqlen_k=batch.longest_kv,
            seqused_k=batch.kv_lengths,
            block_table=batch.block_table,
            softmax_scale=self._scale,
            causal=False,
            num_splits=1,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        return output, lse


def _obstacle(vllm_config: VllmConfig) -> str | None:
    head_dim, block_size = engine_config(vllm_config.model_config).head_dim, vllm_config.cache_config.block_size
    return flash_obstacle(vllm_config.model_config.dtype, head_dim, block_size)


def flash_obstacle(dtype: Any, head_dim: int, block_size: int) -> str | None:
    """Why it cannot serve on this machine; None where it can."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return f"FlashAttention is for NVIDIA's cards, not for {current_platform.device_name}"
    return unsupported(dtype, head_dim, block_size) or _not_built(head_dim)


def unsupported(dtype: Any, head_dim: int, block_size: int) -> str | None:
    """What FlashAttention does not compute on any card; None where it can."""
    if dtype not in _DTYPES:
        return f"FlashAttention knows no {dtype}, only float16 and bfloat16"
    if head_dim > _LARGEST_HEAD or head_dim % _HEAD_MULTIPLE:
        return f"FlashAttention knows no head_dim {head_dim}, only multiples of {_HEAD_MULTIPLE} up to {_LARGEST_HEAD}"
    if block_size % _BLOCK_MULTIPLE:
        return f"FlashAttention needs a --block-size that {_BLOCK_MULTIPLE} divides, not {block_size}"
    return None


def _not_built(head_dim: int) -> str | None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_dim)
    return "this build of vLLM has no FlashAttention for this card" if version is None else None


def _nothing(vllm_config: VllmConfig) -> None:
    return None


def _make(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    attend = fa_utils.flash_attn_varlen_func  # type: ignore[attr-defined]  # bound on CUDA only
    version = get_flash_attn_version(head_size=pages.keys[0].shape[-1])
    assert version is not None
    return PagedAttention(pages, scale, FlashKernel(scale, attend, version))


FLASH = ServerBackend("flash", "vLLM's FlashAttention on pages in place", _obstacle, _nothing, row_major_pages, _make)
