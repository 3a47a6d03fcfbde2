"""Rotary position embedding in the rotate-half form, and turning keys that were rotated already.

Rotations add up: a key stored for position p, turned by p' - p, is the key of position p'. Compaction uses that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.device import to_device


class Rotary:
    """RoPE with angles in float32 (reference: LLaDA's rotary embedding).

    head_dim: size of a head, even. theta: base of the frequencies.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        if head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {head_dim}")
        # On the CPU even when the model around it is built on the meta device: no checkpoint fills this in later.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self._inverse_frequencies = 1.0 / theta**exponents

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """[head_dim / 2] float32: how far a channel pair turns from one position to the next."""
        if self._inverse_frequencies.device != device:
            self._inverse_frequencies = to_device(self._inverse_frequencies, device)
        return self._inverse_frequencies

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [tokens, 1, head_dim] float32, of positions [tokens] (negative ones turn back)."""
        half = positions.float()[:, None] * self.inverse_frequencies(positions.device)
        angles = torch.cat((half, half), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def rotate(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows [tokens, heads, head_dim] turned by positions [tokens]; float32 inside, the dtype of rows outside."""
        cos, sin = self.angles(positions)
        return apply_rotary(rows.float(), cos, sin).to(rows.dtype)


def apply_rotary(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rows [tokens, heads, head_dim]; cos, sin [tokens, 1, head_dim] of the same dtype."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cos + torch.cat((-second, first), dim=-1) * sin
