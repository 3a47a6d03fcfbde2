"""How many proposals a step commits where the model's confidence decides and not a schedule.

`threshold` is the factor rule of Fast-dLLM (arXiv 2505.22618), `min_confidence` the plain one of other engines. Both
commit at least one proposal in each step, so that a canvas takes as many steps as it needs and never more than it has
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from redvtp.canvas.proposals import select
from redvtp.params import DenoisingParams

# (confidences, the highest first; whether nothing else in view is undecided) -> how many of the first are accepted.
Acceptance = Callable[[list[float], bool], int]


def factor_rule(confidence: list[float], nothing_else: bool, factor: float) -> int:
    """The first always, and rank j (from 0) as long as it is at least 1 - factor / (j + 2) and none before it failed.

    As in the reference, when only the very last of all undecided positions in view fails it is accepted too: the last
    two of a canvas always go together.
    """
    accepted = 1
    while accepted < len(confidence) and confidence[accepted] >= 1 - factor / (accepted + 2):
        accepted += 1
    if nothing_else and accepted == len(confidence) - 1:
        accepted += 1
    return accepted


def confidence_rule(confidence: list[float], nothing_else: bool, least: float) -> int:
    """All that are at least `least`, and the first in any case."""
    return max(1, sum(sure >= least for sure in confidence))


def acceptance_of(denoising: DenoisingParams) -> Acceptance | None:
    """The rule a request asks for; None where its schedule decides."""
    if denoising.threshold is not None:
        return partial(factor_rule, factor=denoising.threshold)
    if denoising.min_confidence is not None:
        return partial(confidence_rule, least=denoising.min_confidence)
    return None


def accepted(tokens: Tensor, confidence: Tensor, nothing_else: bool, rule: Acceptance, mask_id: int) -> Tensor:
    """The proposals to commit: [accepted] int64, indices into tokens [rows] and confidence [rows], rows >= 1.

    A step that accepts nothing but the mask id would decide nothing, and so would every step after it (the reference
    goes on for ever). The most confident proposal that is a token is then accepted as well.
    """
    count = rule(confidence.sort(descending=True).values.tolist(), nothing_else)
    chosen = select(confidence, count)
    real = (tokens != mask_id).nonzero()[:, 0]
    if real.numel() and bool((tokens[chosen] == mask_id).all()):
        chosen = torch.cat((chosen, real[confidence[real].argmax()][None]))
    return chosen
