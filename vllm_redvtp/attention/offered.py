"""vLLM's kernels for an engine without a server, under the entry point group `redvtp.attention`.

`python -m redvtp.gpucheck` tries them on a card where vLLM is installed. A server has `ServerBackend`s.
"""

from __future__ import annotations

import torch

from redvtp.attention.offered import OfferedKernel
from vllm_redvtp.attention.flash import FLASH, flash_obstacle
from vllm_redvtp.attention.triton import TRITON, triton_obstacle


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    return _not_a_card(device) or flash_obstacle(dtype, head_dim, block_size)


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    return _not_a_card(device) or triton_obstacle(block_size)


def _not_a_card(device: torch.device) -> str | None:
    """Asked first: vLLM takes seconds to import."""
    return None if device.type == "cuda" else f"vLLM's kernel is for graphics cards, not for {device.type}"


flash = OfferedKernel(_flash_obstacle, FLASH.make)
triton = OfferedKernel(_triton_obstacle, TRITON.make)
