"""What the next step of a sequence computes, scores and drops. Pure: nothing here changes a sequence.

docs/architecture.md (decoding modes) says which steps are full and which compute the response alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from redvtp.denoising.sequence import PruningProgress, Sequence
from redvtp.denoising.step_plan import StepPlan
from redvtp.params import BLOCK_CACHES
from redvtp.pruning.policy import PROMPT_ROWS


def plan_step(sequence: Sequence) -> StepPlan:
    """The next step."""
    policy = sequence.policy
    share = share_next(sequence)
    measures = policy is not None and policy.scorer.measures_attention and share is not None
    drops_inside = policy is not None and policy.layer is not None and share is not None
    exit_layer = policy.layer if policy is not None and drops_inside else withdraw_layer(sequence)
    total, prompt = sequence.total_length, sequence.prompt.length
    encodes = encodes_prompt(sequence)
    kind, first, end, candidate, computed = "full", 0, total, 0, total
    if sequence.denoising.cache == "prefix_lm":
        first, computed = prompt, total if encodes else total - prompt
        kind = "full" if computed == total else "response"
    else:
        rows = _canvas_rows(sequence, measures)
        if rows is not None and not (measures and _scores_before(sequence, rows[0])):
            # With shifted logits the token before the first one says what that is: it is computed again.
            first = prompt + rows[0] - int(sequence.shifted_logits)
            end = total if rows[1] is None else prompt + rows[1]
            kind, candidate, computed = "response", sequence.canvas.block_start, end - first
    return StepPlan(kind, first, end, candidate, computed, encodes, share, measures, exit_layer, drops_inside)


def encodes_prompt(sequence: Sequence) -> bool:
    """Whether the next step first computes the prompt, alone and for good."""
    return sequence.denoising.cache == "prefix_lm" and sequence.steps_done == 0


def share_next(sequence: Sequence) -> float | None:
    """The share of the visual tokens that is left after the next step. None where none are dropped."""
    policy, counted_from = sequence.policy, sequence.pruning.counted_from
    if policy is None or sequence.prompt.num_visual == 0 or counted_from is None:
        return None
    return policy.shares.get(sequence.steps_done - counted_from)


def withdraw_layer(sequence: Sequence) -> int | None:
    """The layer behind which no step sees visual tokens. None if all layers do."""
    policy = sequence.policy
    return policy.layer if policy is not None and policy.withdraw and sequence.prompt.num_visual else None


def score_rows(sequence: Sequence) -> str:
    """Rows whose attention counts where it is measured, see PruningParams."""
    return sequence.policy.rows if sequence.policy is not None else "masked"


def scored_rows(sequence: Sequence, first_candidate: int) -> Tensor:
    """Rows of prompt and canvas, [rows] int64, whose attention may count in a step.

    Of `masked` and `committed` it is known only after the step which of them do.
    """
    rows, canvas, prompt = score_rows(sequence), sequence.canvas, sequence.prompt
    if rows == "masked":
        # In a response step not those of finished blocks, where the model may have proposed the mask id.
        response = first_candidate + canvas.masked()[first_candidate:].nonzero()[:, 0]
    elif rows == "committed":
        response = canvas.masked_rows(first_candidate)
    else:
        response = torch.arange(0 if rows == "prompt" else canvas.gen_length)
    if rows not in PROMPT_ROWS:
        return prompt.length + response
    return torch.cat((prompt.text_rows(), prompt.length + response))


def rows_without_visual(sequence: Sequence) -> Tensor:
    """[total_length] bool, the rows of prompt, canvas and suffix that are no visual tokens.

    The last one of the prompt is always among them: with shifted logits it speaks about the canvas, and no prompt is
    empty without it.
    """
    mask = sequence.keep_mask(sequence.prompt.visual_rows[:0])
    mask[sequence.prompt.length - 1] = True
    return mask


def canvas_positions(sequence: Sequence, plan: StepPlan) -> int:
    """Canvas positions that a step computes."""
    prompt = sequence.prompt.length
    return min(plan.end_row, prompt + sequence.canvas.gen_length) - max(plan.first_row, prompt)


def is_whole_response(sequence: Sequence, plan: StepPlan) -> bool:
    return (
        plan.kind == "response" and plan.first_row <= sequence.prompt.length and plan.end_row == sequence.total_length
    )


def restored_rows(sequence: Sequence, plan: StepPlan) -> int:
    """How many of the first rows a step with this plan has from the pages of `PageHistory.prompt_forward`."""
    if sequence.pages.canvas_forward is not None:
        return sequence.pages.canvas_forward.first_row
    return plan.first_row if plan.end_row == sequence.total_length else sequence.total_length


def after_commit(sequence: Sequence) -> PruningProgress:
    """For policies that wait until enough of the canvas is decided: whether that is so now."""
    progress, policy = sequence.pruning, sequence.policy
    if progress.counted_from is not None or policy is None or policy.decided is None:
        return progress
    decided = sequence.canvas.gen_length - int(sequence.canvas.masked().sum())
    if decided < policy.decided * sequence.canvas.gen_length:
        return progress
    return replace(progress, counted_from=sequence.steps_done)


def _canvas_rows(sequence: Sequence, measures: bool) -> tuple[int, int | None] | None:
    """Canvas rows of a step that reads the others, and the prompt, from pages; None for a full step.

    Returns the first, and where they end (None is behind the suffix).
    """
    denoising, canvas = sequence.denoising, sequence.canvas
    if denoising.cache not in BLOCK_CACHES:
        return None
    interval, step = denoising.refresh_interval, canvas.step_in_block
    refreshes = (step % interval if interval else step) == 0
    if refreshes and (interval is not None or not sequence.pruning.dropped):
        return None
    if refreshes or sequence.pages.canvas_stale:
        return 0, None
    # Undecided rows of later blocks are computed where they are scored.
    later = denoising.cache == "prefix" or measures
    return canvas.block_start, None if later else canvas.block_end


def _scores_before(sequence: Sequence, row: int) -> bool:
    """Whether rows are scored that a step beginning with this canvas row would not compute."""
    rows = score_rows(sequence)
    return rows in PROMPT_ROWS or (rows == "response" and row > 0)
