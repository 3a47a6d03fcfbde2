"""The row-wise operations of a layer as vLLM's fused kernels: each reads and writes its rows once.

Used on CUDA and ROCm. vLLM's CPU build has operations of the same names, on which they are tested; there the engine's
stay, so that tokens are those of the reference. The activation is torch's everywhere: vLLM's kernel takes gate and up
projections side by side in one tensor, and ours are two.

On a GPU the normalisation adds up in an order that depends on the number of rows in the batch, so neighbours can change
its last bits, as they do in matrix products there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from redvtp.models.operations import TORCH, Operations, Rotate

_ROTATE_HALF = True


def chosen_operations() -> Operations:
    """Those for the platform that vLLM runs on."""
    from vllm.platforms import current_platform

    return FUSED if current_platform.is_cuda_alike() else TORCH


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = torch.empty_like(hidden)
    ops.rms_norm(normed, hidden, weight, eps)
    return normed


def _rotation(cos: Tensor, sin: Tensor) -> Rotate:
    # The kernel looks positions up in a table. Here it is a table of this forward's rows, so nothing limits positions.
    rows, half = cos.shape[0], cos.shape[2] // 2
    table = torch.cat((cos[:, 0, :half], sin[:, 0, :half]), dim=-1)
    places = torch.arange(rows, device=cos.device)

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        # In place, over heads side by side: the CPU kernel knows no other layout.
        ops.rotary_embedding(places, query.view(rows, -1), key.view(rows, -1), query.shape[2], table, _ROTATE_HALF)
        return query, key

    return rotate


FUSED = Operations(_rms_norm, _rotation)
