"""The backend `triton`: vLLM's unified attention, for every type on every card that Triton knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend
from redvtp.attention.paged import PagedAttention
from redvtp.attention.paged_batch import PagedBatch
from redvtp.kv.pages import KVPages
from vllm_redvtp.attention.reference import row_major_pages
from vllm_redvtp.attention.server_backend import ServerBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_BLOCK_MULTIPLE = 16
_WHOLE_WINDOW = (-1, -1)
_NO_SOFTCAP = 0.0


class TritonKernel:
    """`redvtp.attention.paged.PagedKernel`."""

    # A program walks all keys of one sequence, in tiles whose size depends on the head size and the type only.
    batch_invariant = True
    # It loads nothing behind the last key.
    reads_unused = False

    def __init__(self, scale: float) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        self._scale = scale
        self._attend = unified_attention

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        output = torch.empty_like(query)
        self._attend(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=batch.query_starts,
            max_seqlen_q=batch.longest_query,
            seqused_k=batch.kv_lengths,
            max_seqlen_k=batch.longest_kv,
            softmax_scale=self._scale,
            causal=False,
            window_size=_WHOLE_WINDOW,
            block_table=batch.block_table,
            softcap=_NO_SOFTCAP,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return output, None


def _obstacle(vllm_config: VllmConfig) -> str | None:
    return triton_obstacle(vllm_config.cache_config.block_size)


def triton_obstacle(block_size: int) -> str | None:
    """Why it cannot serve on this machine; None where it can."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cuda_alike():
        return f"Triton's kernels are for graphics cards, not for {current_platform.device_name}"
    if not HAS_TRITON:
        return "Triton is not installed, or finds no driver for this card"
    if block_size % _BLOCK_MULTIPLE:
        return f"Triton's kernel needs a --block-size that {_BLOCK_MULTIPLE} divides, not {block_size}"
    return None


def _nothing(vllm_config: VllmConfig) -> None:
    return None


def _make(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    return PagedAttention(pages, scale, TritonKernel(scale))


TRITON = ServerBackend("triton", "vLLM's Triton kernel on pages in place", _obstacle, _nothing, row_major_pages, _make)
