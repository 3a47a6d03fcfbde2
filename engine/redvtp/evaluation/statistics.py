"""Shares of right answers, and differences of shares over the same questions, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Share:
    """correct of total, with Wilson's interval [low, high]; all shares in [0, 1]."""

    correct: int
    total: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two shares of right answers over the same questions.

    gained: right only now.
    lost: right only before.
    difference: of the shares, in [-1, 1], with its interval [low, high].
    p_value: McNemar's exact test.
    """

    pairs: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float


def share(correct: int, total: int) -> Share:
    """Raises ValueError for no questions: they have no share."""
    if total < 1:
        raise ValueError("a share of no questions")
    interval = binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(correct, total, correct / total, float(interval.low), float(interval.high))


def paired_difference(now: Sequence[bool], before: Sequence[bool]) -> PairedDifference:
    """The share of `now` minus that of `before`; both hold one entry for each question, in the same order.

    The interval is Newcombe's (Statistics in Medicine 17, 1998, method 10): Wilson's intervals of both shares, joined
    by their correlation. Unlike a bootstrap it claims no certainty where few questions all agree.
    """
    both = sum(a and b for a, b in zip(now, before, strict=True))
    gained = sum(a and not b for a, b in zip(now, before, strict=True))
    lost = sum(b and not a for a, b in zip(now, before, strict=True))
    total = len(now)
    neither = total - both - gained - lost
    first, second = share(both + gained, total), share(both + lost, total)
    phi = _correlation(both, gained, lost, neither)
    difference = first.share - second.share
    down, up = _joined(first, second, phi), _joined(second, first, phi)
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    # max, min: if nothing differs, rounding could put the difference outside its interval by the last bit.
    low, high = max(-1.0, min(difference - down, difference)), min(1.0, max(difference + up, difference))
    return PairedDifference(total, gained, lost, difference, low, high, float(p_value))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Phi of the fourfold table, with Newcombe's continuity correction."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - (both + gained + lost + neither) / 2, 0.0)
    return product / sqrt(margins)


def _joined(minuend: Share, subtrahend: Share, phi: float) -> float:
    """How far the difference may lie below its estimate: the minuend at its low end, the subtrahend at its high end."""
    down, up = minuend.share - minuend.low, subtrahend.high - subtrahend.share
    return sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))
