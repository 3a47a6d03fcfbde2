"""Which requests take a step in an engine step: a pure rule over what their steps cost.

The request that stepped longest ago comes first, and the first one always steps. So in each engine step the one that
has waited longest goes, except when the head of the queue went first: no request waits longer than there are running
requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class StepCost(Protocol):
    """What a turn depends on.

    next_tokens: rows that the next step computes.
    later_tokens: rows that each step computes once the first is done.
    last_step: number of the engine step in which the request last took a step.
    """

    @property
    def next_tokens(self) -> int: ...

    @property
    def later_tokens(self) -> int: ...

    @property
    def last_step(self) -> int: ...


def fits(cost: StepCost, rows: int, budget: int) -> bool:
    """Whether a step fits beside `rows` that are scheduled already.

    One request always steps: its full step may be larger than a budget that the user has set.
    """
    return rows == 0 or rows + cost.next_tokens <= budget


def continuing(running: Mapping[str, StepCost], scheduled: Mapping[str, int], budget: int) -> dict[str, int]:
    """Running requests that take a step, in order, with the rows of their steps. scheduled: those of other steps."""
    turns: dict[str, int] = {}
    rows = sum(scheduled.values())
    for request_id, cost in sorted(running.items(), key=lambda item: item[1].last_step):
        if request_id not in scheduled and fits(cost, rows, budget):
            turns[request_id] = cost.next_tokens
            rows += cost.next_tokens
    return turns


def head_goes_first(head: StepCost, running: Iterable[StepCost], budget: int) -> bool:
    """Whether the head of the queue takes its first step before the running requests take theirs.

    First steps are long, response steps short. A long prompt whose later steps have room beside the running ones would
    otherwise wait until most of them have ended. To be called only when every running request took a step in the last
    engine step, see the module.
    """
    rows = sum(cost.next_tokens for cost in running)
    return rows + head.later_tokens <= budget < rows + head.next_tokens
