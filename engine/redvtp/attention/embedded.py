"""Which attention the embedded engine runs on. A server's choice is `vllm_redvtp.attention.choice`.

attention = embedded_attention("auto", pages, scale)
"""

from __future__ import annotations

import torch

from redvtp.attention import xformers_paged
from redvtp.attention.interface import AttentionBackend
from redvtp.attention.paged import PagedAttention
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.pages import KVPages
from redvtp.values import did_you_mean

AUTO, TORCH, XFORMERS = "auto", "torch", "xformers"
NAMES = (AUTO, TORCH, XFORMERS)


# Tokens in a block where nothing is said. xformers wants a multiple of 64; smaller blocks waste less of a cache.
_CUDA_BLOCK_SIZE, _BLOCK_SIZE = xformers_paged.BLOCK_MULTIPLE, 32


def preferred_block_size(device: torch.device) -> int:
    return _CUDA_BLOCK_SIZE if device.type == "cuda" else _BLOCK_SIZE


def check_attention(name: str) -> None:
    """Raises ValueError for a name that there is not."""
    if name not in NAMES:
        raise ValueError(f"attention must be one of {', '.join(NAMES)}, got {name!r}{did_you_mean(name, NAMES)}")


def embedded_attention(name: str, pages: KVPages, scale: float) -> AttentionBackend:
    """xformers where it can serve, else torch, for `auto`. Raises ValueError where what was named cannot serve."""
    check_attention(name)
    one = pages.keys[0]
    obstacle = xformers_paged.obstacle(one.device, one.dtype, one.shape[-1], pages.block_size)
    if name == XFORMERS and obstacle is not None:
        raise ValueError(f"attention {name!r} cannot be used: {obstacle}; use 'auto' or 'torch'")
    if name == TORCH or obstacle is not None:
        return TorchAttention(pages, scale)
    return PagedAttention(pages, scale, xformers_paged.XformersKernel(scale))
