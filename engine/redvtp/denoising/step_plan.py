"""What the next step of a sequence computes, as `redvtp.denoising.planner` decides it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: `full` computes every kept token, `response` the canvas or a part of it.

    kind: "full" or "response".
    first_row, end_row: the rows of prompt, canvas and suffix that are computed; the others are read from pages.
    first_candidate: canvas rows from here on may be decided.
    tokens_computed: rows that enter the step, and those of a prompt that is computed alone before it.
    encodes_prompt: the prompt is computed alone first, once for all steps.
    share: share of the request's visual tokens that is left after the step. None where none are dropped.
    measures_attention: rows of the step are scored.
    exit_layer: the layer behind which visual tokens leave the step. None where all rows go through all layers.
    drops_inside: they are dropped for good there, and not only for this step.
    """

    kind: str
    first_row: int
    end_row: int
    first_candidate: int
    tokens_computed: int
    encodes_prompt: bool = False
    share: float | None = None
    measures_attention: bool = False
    exit_layer: int | None = None
    drops_inside: bool = False

    @property
    def rows(self) -> int:
        return self.end_row - self.first_row
