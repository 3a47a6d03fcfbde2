"""What the scheduler counts of a step's report."""

from __future__ import annotations

import pytest

from redvtp.reports import PruningReport, StepReport
from vllm_redvtp.scheduling.metrics import DenoisingTally


def _report(before: int, after: int) -> StepReport:
    pruning = PruningReport(
        step=0, layer=None, visual_before=before, visual_after=after, importance=[], kept=list(range(after))
    )
    return StepReport(
        request_id="a",
        step=0,
        canvas_block=0,
        kind="full",
        tokens_computed=10,
        canvas_computed=4,
        kv_tokens=10,
        kv_blocks=1,
        blocks_freed=0,
        new_tokens=[7, 8],
        canvas=[],
        answer_length=4,
        prompt_length=6,
        finished=False,
        finish_reason=None,
        next_tokens=10,
        resume_tokens=10,
        pruning=pruning,
    )


@pytest.mark.parametrize(("before", "after", "prunings"), [(6, 3, 1), (6, 6, 0)])
def test_only_what_drops_tokens_counts_as_a_pruning(before: int, after: int, prunings: int) -> None:
    """Keep_ratio 1 counted, although nothing went."""
    tally = DenoisingTally()
    tally.step(_report(before, after))
    counts = tally.take()
    assert counts is not None
    assert counts["prunings"] == prunings
    assert counts["resolved_tokens"] == 2
    assert tally.take() is None
