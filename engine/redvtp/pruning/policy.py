"""One request's pruning policy: a scorer, a budget, a moment, positions and a scope, nothing left open.

`survivors` applies its budget to the importance of the visual tokens that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.pruning.budget import smallest_holding, tokens_to_keep, total_to_keep
from redvtp.pruning.scorers import Scorer

# Rows that a response step reads from pages instead of computing them.
PROMPT_ROWS = ("prompt", "prompt_response")


@dataclass(frozen=True, slots=True)
class Policy:
    """One request's pruning.

    scorer: where importance comes from.
    rows: rows whose attention counts, see PruningParams.score_rows.
    layers: half-open range of the layers whose attention counts.
    before: share of the visual tokens that the first forward already runs on. None: all of them.
    moments: (denoising step, share of the request's visual tokens that stays after it), ascending; empty where nothing
        is dropped after or inside a step.
    decided: with confidence rules the number of steps is not known in advance; steps in `moments` are then counted from
        the first one that begins with this share of the canvas decided. None counts from step 0.
    layer: tokens are dropped inside those steps, behind this layer. None drops after the step.
    withdraw: behind `layer` visual tokens take no part in any step; their pages stay for the layers in front of it.
    mass: instead of a share, the smallest set with this share of the importance, within min_share and max_share.
    scope, positions: see PruningParams.
    request_scores: scores that came with the request, where the scorer needs them.
    """

    scorer: Scorer
    rows: str
    layers: tuple[int, int]
    before: float | None
    moments: tuple[tuple[int, float], ...]
    layer: int | None
    withdraw: bool
    mass: float | None
    min_share: float
    max_share: float
    scope: str
    positions: str
    request_scores: tuple[float, ...] = ()
    decided: float | None = None

    @property
    def shares(self) -> dict[int, float]:
        """{denoising step: share that stays after it}."""
        return dict(self.moments)

    def visual_at_first(self, groups: Sequence[int]) -> int:
        """Visual tokens that the first forward runs on. groups: those of each image of the request."""
        return sum(groups) if self.before is None else total_to_keep(groups, self.before, self.scope)


def survivors(policy: Policy, share: float, importance: Tensor, group_of: Tensor, groups: Sequence[int]) -> Tensor:
    """The visual tokens that stay in a pruning.

    share: of the tokens there were at first.
    importance: [visual] float32, of the tokens that are left.
    group_of: [visual] int64, the image each belongs to.
    groups: visual tokens of each image at first.
    Returns [kept] int64, ascending.
    """
    if policy.scope == "all":
        return _of_group(policy, share, importance, sum(groups))
    kept = []
    for group, total in enumerate(groups):
        members = (group_of == group).nonzero()[:, 0]
        kept.append(members[_of_group(policy, share, importance[members], total)])
    return torch.cat(kept)


def _of_group(policy: Policy, share: float, importance: Tensor, total: int) -> Tensor:
    if policy.mass is None:
        count = tokens_to_keep(total, share)
    else:
        least, most = tokens_to_keep(total, policy.min_share), tokens_to_keep(total, policy.max_share)
        count = max(least, min(most, smallest_holding(importance, policy.mass)))
    return policy.scorer.choose(importance, min(count, importance.numel()))
