"""What a step says it did to a sequence: plain numbers, for drivers, metrics, traces and those who ask for a report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PruningReport:
    """One pruning. step: after which, or inside which where there is a layer; -1 is before the first. importance: one
    number for each visual token before it; kept: ascending indices into those."""

    step: int
    layer: int | None
    visual_before: int
    visual_after: int
    importance: list[float]
    kept: list[int]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one denoising step did to one sequence. Plain numbers, so that it travels between processes.

    new_tokens: growth of the resolved prefix, a stop sequence included. canvas: ids after the step. answer_length: the
    canvas tokens before the first stop sequence so far, all of them without one. prompt_length: kept prompt tokens
    after the step. kv_tokens, kv_blocks: held after the step. tokens_computed: rows through the language model; one
    that left half way counts for the layers it went through, the sum is rounded up. canvas_computed: canvas positions
    among those of the step itself. next_tokens: rows that will enter
    the next step, it computes no more; resume_tokens: the same if the sequence is suspended before it.
    """

    request_id: str
    step: int
    canvas_block: int
    kind: str
    tokens_computed: int
    canvas_computed: int
    kv_tokens: int
    kv_blocks: int
    blocks_freed: int
    new_tokens: list[int]
    canvas: list[int]
    answer_length: int
    prompt_length: int
    finished: bool
    finish_reason: str | None
    next_tokens: int
    resume_tokens: int
    pruning: PruningReport | None = field(default=None)
