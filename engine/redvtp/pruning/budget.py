"""How many visual tokens stay, and which.

Shares are always of the tokens a request came with, so that several prunings end where a single one would. With the
scope `image` every image is a request of its own in this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from redvtp.pruning.policy import Policy


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


def survivors(policy: Policy, share: float, importance: Tensor, image_of: Tensor, images: Sequence[int]) -> Tensor:
    """Which of the visual tokens that are left stay in a pruning.

    share: of the tokens there were at first. importance: [visual] float32. image_of: [visual] int64, the image each is
    of. images: how many each image had at first.
    Returns [kept] int64, ascending.
    """
    if policy.scope == "all":
        return _of_one(policy, share, importance, sum(images))
    kept = []
    for image, total in enumerate(images):
        own = (image_of == image).nonzero()[:, 0]
        kept.append(own[_of_one(policy, share, importance[own], total)])
    return torch.cat(kept)


def _of_one(policy: Policy, share: float, importance: Tensor, total: int) -> Tensor:
    if policy.mass is None:
        count = tokens_to_keep(total, share)
    else:
        least, most = tokens_to_keep(total, policy.min_share), tokens_to_keep(total, policy.max_share)
        count = max(least, min(most, smallest_holding(importance, policy.mass)))
    count = min(count, importance.numel())
    return evenly_spaced(importance.numel(), count) if policy.source == "uniform" else most_important(importance, count)
