"""Remasking rules: how sure the model is of a proposal. The surest are committed, the others stay masked.

A new rule is a function and a row of RULES here, and its name in `redvtp.params.REMASKINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

# Keeps the logarithm of a probability that underflowed finite (LaViDa's number).
_TINY = 1e-10

# (probabilities [rows, vocab] float64, proposed tokens [rows]) -> confidence [rows] float64.
Rule = Callable[[Tensor, Tensor], Tensor]


def probability_of_proposal(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The proposal's probability (reference: LLaDA's `low_confidence`)."""
    return probabilities.gather(-1, tokens[:, None])[:, 0]


def negative_entropy(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The negative entropy of the whole row (reference: LaViDa)."""
    return (probabilities + _TINY).log_().mul_(probabilities).sum(-1)


def margin(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The distance between the two most probable tokens (reference: LaViDa)."""
    best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return best - second


# None draws the confidence at random, without a look at the logits.
RULES: Mapping[str, Rule | None] = MappingProxyType(
    {
        "low_confidence": probability_of_proposal,
        "entropy": negative_entropy,
        "margin": margin,
        "random": None,
    }
)


def rule_of(name: str) -> Rule | None:
    """The rule of that name. Raises ValueError for a name that is not in RULES."""
    if name not in RULES:
        raise ValueError(f"remasking must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]
