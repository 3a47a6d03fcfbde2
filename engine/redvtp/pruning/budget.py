"""How many visual tokens stay, and two ways to pick them.

Shares are of the tokens a request came with, so several prunings end where a single one would. With the scope `image`
each image has a budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_to_keep(visual: int, keep_ratio: float) -> int:
    """max(1, int(visual * keep_ratio)), as the reference rounds it."""
    return max(1, int(visual * keep_ratio))


def total_to_keep(images: Sequence[int], share: float, scope: str) -> int:
    """Visual tokens of a request that are left of those of its images, by share. scope: see PruningParams."""
    if not images:
        return 0
    return tokens_to_keep(sum(images), share) if scope == "all" else sum(tokens_to_keep(each, share) for each in images)


def most_important(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of importance [visual], ascending. Returns [count] int64."""
    return importance.topk(count).indices.sort().values


def evenly_spaced(visual: int, count: int) -> Tensor:
    """`count` of `visual` indices, the middles of as many equal stretches. Returns [count] int64, ascending."""
    return (2 * torch.arange(count) + 1) * visual // (2 * count)


def smallest_holding(importance: Tensor, mass: float) -> int:
    """How many of the highest of importance [visual], none of it negative, it takes to hold the share `mass` of its sum
    (ZipVL, arXiv 2410.08584, the rule for one layer's important tokens)."""
    held = importance.double().sort(descending=True).values.cumsum(0)
    return min(importance.numel(), int((held < mass * held[-1]).sum()) + 1)
