"""How many visual tokens stay, and which."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_to_keep(visual: int, keep_ratio: float) -> int:
    """max(1, int(visual * keep_ratio)), as the reference rounds it."""
    return max(1, int(visual * keep_ratio))


def most_important(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of importance [visual], ascending. Returns [count] int64."""
    return importance.topk(count).indices.sort().values


def evenly_spaced(visual: int, count: int) -> Tensor:
    """`count` of `visual` indices, the middles of as many equal stretches. Returns [count] int64, ascending."""
    return (2 * torch.arange(count) + 1) * visual // (2 * count)
