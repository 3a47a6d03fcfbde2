"""What tensor-parallel ranks have in common: sums, decisions and failures.

Each rank computes some of the attention heads and holds their part of the KV cache. The engine runs without any of this
on one rank, so the defaults do nothing; the driver of several ranks hands in the collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _unchanged(numbers: Tensor) -> Tensor:
    return numbers


def _of_this_rank(failed: bool) -> bool:
    return failed


@dataclass(frozen=True, slots=True)
class Ranks:
    """Collectives: every rank calls each of them the same number of times, in the same order.

    sum_scores: the sum of a tensor over all ranks.
    broadcast_from_rank0: rank 0's tensor, on every rank. For all numbers that decide something: ranks compute them
        alike, but not to the last bit, and ranks that keep different tokens diverge permanently.
    any_failed: whether the step failed on any rank, given whether it did on this one. Raises where the ranks cannot
        go on together.
    """

    sum_scores: Callable[[Tensor], Tensor] = _unchanged
    broadcast_from_rank0: Callable[[Tensor], Tensor] = _unchanged
    any_failed: Callable[[bool], bool] = _of_this_rank


# One rank.
ALONE = Ranks()
