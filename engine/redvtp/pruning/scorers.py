"""Where the importance of visual tokens comes from: one row of SCORERS for each source.

A scorer says what it looks at, turns that into one number for each visual token, and picks the tokens that stay when a
number of them is given. Policies refer to scorers by name (`redvtp.presets`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from redvtp.noise import IMPORTANCE, Draws, uniform
from redvtp.pruning.budget import evenly_spaced, most_important
from redvtp.pruning.importance import feature_importance


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a scorer may look at, for one sequence.

    count: visual tokens that are left.
    features: [visual, hidden], the visual tokens as the language model gets them. None where the scorer did not ask.
    attention: [visual] float32 on the CPU, mean attention of the rows that count. None where nothing was measured.
    given: the request's scores, one for each visual token it came with.
    draws: what is random for the request now.
    """

    count: int
    features: Tensor | None = None
    attention: Tensor | None = None
    given: tuple[float, ...] = ()
    draws: Draws | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """One source of importance.

    score: Evidence -> [visual] float32 on the CPU.
    measures_attention: the forward sums up attention for it; steps that would not compute the scored rows become full.
    looks_at_features: Evidence.features is filled in, and every rank takes the first rank's scores.
    needs_request_scores: the request brings one number for each visual token.
    choose: (importance [visual], how many stay) -> [kept] int64, ascending.
    """

    score: Callable[[Evidence], Tensor]
    measures_attention: bool = False
    looks_at_features: bool = False
    needs_request_scores: bool = False
    choose: Callable[[Tensor, int], Tensor] = most_important


def _attention(evidence: Evidence) -> Tensor:
    assert evidence.attention is not None, "the step measures attention for this scorer"
    return evidence.attention


def _features(evidence: Evidence) -> Tensor:
    assert evidence.features is not None
    return feature_importance(evidence.features)


def _given(evidence: Evidence) -> Tensor:
    return torch.tensor(evidence.given)


def _random(evidence: Evidence) -> Tensor:
    assert evidence.draws is not None
    return uniform(evidence.draws.keys(IMPORTANCE, torch.arange(evidence.count)), 1)[:, 0].float()


def _equal(evidence: Evidence) -> Tensor:
    return torch.ones(evidence.count)


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        # RedVTP and the FastV family: what the response looks at.
        "attention": Scorer(_attention, measures_attention=True),
        # What each token adds to what all of them say, before any layer has run.
        "features": Scorer(_features, looks_at_features=True),
        # One number for each token, sent with the request.
        "given": Scorer(_given, needs_request_scores=True),
        # Controls: they look at nothing.
        "random": Scorer(_random),
        "uniform": Scorer(_equal, choose=lambda importance, count: evenly_spaced(importance.numel(), count)),
    }
)
