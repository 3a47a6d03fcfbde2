"""Normalisation and rotary embedding of a layer: many small passes in torch, one each where a driver brings kernels.

`TORCH` is what the reference data was made with, bit for bit. Others round elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from redvtp.kv.rotary import apply_rotary

# Queries and keys, each [rows, heads, head_dim], turned to their positions; their storage may be used for it.
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Operations:
    """rms_norm: (hidden [rows, hidden], weight [hidden], eps) -> [rows, hidden].
    rotation: (cos, sin, each [rows, 1, head_dim] in the model's dtype) -> `Rotate` for these rows in every layer."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotation: Callable[[Tensor, Tensor], Rotate]


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32; the weight is applied after the cast back (reference: LLaDA)."""
    normed = functional.rms_norm(hidden.float(), (hidden.shape[-1],), None, eps)
    return normed.to(hidden.dtype) * weight


def _rotation(cos: Tensor, sin: Tensor) -> Rotate:
    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)

    return rotate


TORCH = Operations(_rms_norm, _rotation)
