"""What a step did to a sequence: plain numbers, for drivers, metrics, traces and reports to clients."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PruningReport:
    """One pruning.

    step: the step after which it happened, or inside which where there is a layer; -1 is before the first step.
    layer: the layer behind which tokens were dropped inside the step.
    visual_before, visual_after: visual tokens before and after it.
    importance: one number for each visual token before it.
    kept: ascending indices into those.
    """

    step: int
    layer: int | None
    visual_before: int
    visual_after: int
    importance: list[float]
    kept: list[int]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one denoising step did to one sequence. Plain numbers, so that it travels between processes.

    step: its number, from 0.
    canvas_block: the canvas block it worked on.
    kind: `full` or `response`.
    tokens_computed: rows through the language model; a row that left half way counts for the layers it went through,
        and the sum is rounded up.
    canvas_computed: canvas positions among those of the step itself.
    kv_tokens, kv_blocks: held after the step.
    blocks_freed: KV blocks given back by a pruning in it.
    new_tokens: growth of the resolved prefix, a stop sequence included.
    canvas: ids after the step; empty unless the sequence reports its canvas.
    answer_length: canvas tokens before the first stop sequence so far; all of them without one.
    prompt_length: prompt tokens that are kept after the step.
    finished, finish_reason: whether the canvas is complete, and `stop` or `length`.
    next_tokens: rows that will enter the next step; it computes no more.
    resume_tokens: the same if the sequence is suspended before it.
    pruning: what was dropped.
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
