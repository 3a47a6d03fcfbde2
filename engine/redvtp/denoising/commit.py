"""Logits of the undecided rows, proposals, and the tokens that a step commits."""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.attention.layout import Span
from redvtp.canvas.proposals import CONFIDENCE_DTYPE, Choice, keep_best, propose_in_parts, suppress
from redvtp.denoising.context import Context, SequenceStep
from redvtp.denoising.forward import ForwardOutput
from redvtp.denoising.planner import score_rows
from redvtp.device import to_device


def commit(context: Context, steps: list[SequenceStep], output: ForwardOutput) -> None:
    """Propose for every candidate of the batch at once and commit what each sequence chooses."""
    candidates = [step.sequence.canvas.masked_rows(step.plan.first_candidate) for step in steps]
    counts = [rows.numel() for rows in candidates]
    packed = [logit_rows(step, span, own) for step, span, own in zip(steps, output.spans, candidates, strict=True)]
    rows = to_device(torch.cat(packed), context.device)
    sequences = [step.sequence for step in steps]
    choices = [
        Choice(seq.denoising.temperature, seq.denoising.remasking, seq.draws(step.number))
        for seq, step in zip(sequences, steps, strict=True)
    ]
    proposals = propose_in_parts(
        lambda part: candidate_logits(context, output.hidden.index_select(0, rows[part])),
        _vocabulary(context),
        context.special.vocab,
        choices,
        candidates,
    )
    # One tensor (ids are exact in float64), so that the host waits for the device once. Sent to the ranks from the
    # device: some collectives know no other memory.
    both = torch.stack((proposals.tokens.to(CONFIDENCE_DTYPE), proposals.confidence))
    tokens, confidence = context.ranks.broadcast_from_rank0(both).cpu()
    split = zip(tokens.to(torch.int64).split(counts), confidence.split(counts), strict=True)
    for step, own, (proposed, sure) in zip(steps, candidates, split, strict=True):
        chosen = step.sequence.canvas.choose(proposed, sure, step.plan.first_candidate)
        _commit_one(context, step, own[chosen], proposed[chosen])


def candidate_logits(context: Context, hidden: Tensor) -> Tensor:
    """Float32 logits [rows, vocab] of hidden rows [rows, hidden]; ids that are never chosen are at -inf."""
    logits = context.model.language_model.logits(hidden, _vocabulary(context))
    return keep_best(suppress(logits, context.special.suppressed), context.model.config.family.sampler.top_k)


def logit_rows(step: SequenceStep, span: Span, canvas_rows: Tensor) -> Tensor:
    """The packed rows whose logits are about `canvas_rows` ([rows] int64, at or behind the plan's first candidate)."""
    sequence = step.sequence
    # Counted from the end: rows of the prompt may have left on the way.
    first = span.end - (step.plan.end_row - sequence.prompt.length)
    if not sequence.shifted_logits:
        return canvas_rows + first
    # Row 0 has no predecessor in a canvas that is computed without the prompt; use the row itself.
    return (canvas_rows + (first - 1)).clamp(min=span.start)


def _vocabulary(context: Context) -> int:
    """Width of the logits: all rows of the head where those beyond the tokenizer count in every probability."""
    config = context.model.config
    return config.vocab_size if config.family.sampler.counts_surplus_rows else context.special.vocab


def _commit_one(context: Context, step: SequenceStep, rows: Tensor, tokens: Tensor) -> None:
    """Commit `tokens` at canvas positions `rows`, and note which rows' attention counts from now on."""
    canvas = step.sequence.canvas
    if step.plan.share is None and step.scores is None:
        canvas.commit(rows, tokens)
        return
    before = canvas.masked()
    canvas.commit(rows, tokens)
    # A committed row is decided even if the model proposed the mask id for it; some families see that otherwise.
    proposed_masks_count = context.model.config.family.sampler.scores_proposed_masks
    after = canvas.masked() if proposed_masks_count else before.index_fill(0, rows, False)
    step.undecided = bool(after.any())
    if step.scores is not None:
        committed = score_rows(step.sequence) == "committed"
        step.counting = torch.zeros_like(before).index_fill(0, rows, True) if committed else after
