"""The verbs of a denoising step one by one, for tests that look in between."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from redvtp.denoising.commit import logit_rows
from redvtp.denoising.context import SequenceStep
from redvtp.denoising.forward import ForwardOutput
from redvtp.denoising.prompts import encode_prompts
from redvtp.denoising.sequence import Sequence
from redvtp.local import LocalEngine


@torch.inference_mode()
def encode_prompt(local: LocalEngine, sequence: Sequence) -> SequenceStep:
    """The next step, its prompt encoded alone if that is due."""
    (step,) = local.runner.begin([sequence])
    encode_prompts(local.runner.context, [step])
    return step


def forward(local: LocalEngine, sequence: Sequence) -> tuple[SequenceStep, ForwardOutput]:
    """The forward of the next step; nothing is committed."""
    (step,) = local.runner.begin([sequence])
    return step, local.runner.forward([step])


def response_hidden(local: LocalEngine, sequence: Sequence, canvas_rows: Tensor) -> Tensor:
    """[rows, hidden], what the next step's forward says about canvas rows [rows]."""
    step, output = forward(local, sequence)
    return output.hidden[logit_rows(step, output.spans[0], canvas_rows)]


def set_embeds(sequence: Sequence, embeds: Tensor) -> None:
    """Other prompt embeddings, [prompt, hidden]."""
    sequence.prompt = replace(sequence.prompt, embeds=embeds)
