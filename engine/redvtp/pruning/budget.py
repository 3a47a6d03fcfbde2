"""How many visual tokens stay, and which."""

from __future__ import annotations

from torch import Tensor


def tokens_to_keep(visual: int, keep_ratio: float) -> int:
    """max(1, int(visual * keep_ratio)), as the reference rounds it."""
    return max(1, int(visual * keep_ratio))


def most_important(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of importance [visual], ascending. Returns [count] int64."""
    return importance.topk(count).indices.sort().values
