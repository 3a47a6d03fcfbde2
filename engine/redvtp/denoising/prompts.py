"""Prompts that never see their canvas (`prefix_lm`, reference: LaViDa): computed alone, once."""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.denoising.commit import candidate_logits
from redvtp.denoising.context import Context, LayerExit, SequenceStep
from redvtp.denoising.forward import Continuation, run_forward
from redvtp.denoising.layer_exit import hidden_visual
from redvtp.denoising.packing import Part, pack
from redvtp.denoising.planner import plan_step, withdraw_layer
from redvtp.denoising.restore import origin_of
from redvtp.denoising.sequence import Sequence
from redvtp.device import on_device

# It has no rows behind the prompt.
_NO_IDS = torch.zeros(0, dtype=torch.int64)


def encode_prompts(context: Context, steps: list[SequenceStep]) -> None:
    """Write the keys and values of prompts that are computed alone.

    With shifted logits the prompt's last token also says what the first canvas token is; it is decided here, and what
    the step computes is planned again.
    """
    steps = [step for step in steps if step.plan.encodes_prompt]
    if not steps:
        return
    packed = pack([_part(step.sequence) for step in steps], context.model, context.pages.block_size)
    exits: dict[int, LayerExit] = {}
    for index, sequence in enumerate(step.sequence for step in steps):
        layer = withdraw_layer(sequence)
        if layer is not None:
            length = sequence.prompt.length
            exits[index] = LayerExit(layer, hidden_visual(sequence, 0, length, packed.slots[index][:length]))
        sequence.pages = sequence.pages.after_full(origin_of(sequence, exits.get(index), prompt_alone=True))

    def leave(indices: list[int]) -> list[Continuation]:
        return [exits[index].continuation for index in indices]

    layers = {index: exit_.layer for index, exit_ in exits.items()}
    output = run_forward(context.model.language_model, packed, context.attend, layers, leave)
    for step, row_layers in zip(steps, output.row_layers, strict=True):
        step.row_layers += row_layers
    if context.model.config.family.sampler.shifted_logits:
        last = on_device([span.end - 1 for span in output.spans], torch.int64, context.device)
        _decide_first(context, [step.sequence for step in steps], output.hidden.index_select(0, last))
    for step in steps:
        # The first token may have completed a canvas block.
        step.plan, step.canvas_block = plan_step(step.sequence), step.sequence.canvas.block


def _decide_first(context: Context, sequences: list[Sequence], hidden: Tensor) -> None:
    """hidden: [sequences, hidden], of the prompts' last tokens."""
    best = candidate_logits(context, hidden)[:, : context.special.vocab].argmax(-1)
    for sequence, token in zip(sequences, context.ranks.broadcast_from_rank0(best).tolist(), strict=True):
        sequence.canvas.decide(0, token)


def _part(sequence: Sequence) -> Part:
    prompt = sequence.prompt
    return Part(
        prompt.embeds,
        prompt.positions,
        _NO_IDS,
        prompt.canvas_position,
        sequence.block_table,
        first_row=0,
        kv_length=prompt.length,
        reads_pages=False,
    )
