"""Floating-point operations of one request, counted from shapes alone.

Only matrix products count (a multiply and an add are two), as in torch's own counter, against which a test checks
these numbers. The ratio of two settings' counts is the speed-up that pruning or caching could reach if nothing but
arithmetic took time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from redvtp.denoising.schedule import canvas_blocks, schedule_of, transfer_table
from redvtp.models.config import DvlmConfig
from redvtp.params import DenoisingParams, PruningParams
from redvtp.pruning.budget import tokens_to_keep


@dataclass(frozen=True, slots=True)
class StepShape:
    """tokens: computed. kv_tokens: attended to. candidates: rows that get logits. scored_rows: for the pruning."""

    tokens: int
    kv_tokens: int
    candidates: int
    scored_rows: int


def step_shapes(denoising: DenoisingParams, pruning: PruningParams, prompt: int, visual: int) -> Iterator[StepShape]:
    """The forwards of a request that runs to the end of its canvas, without a suffix: one a step, and one more for a
    prompt that is encoded alone."""
    gen_length = denoising.gen_length
    block_length, steps = denoising.resolved_block_length, denoising.resolved_steps
    prunes = pruning.preset == "redvtp" and visual > 0
    prefix_lm = denoising.cache == "prefix_lm"
    if prefix_lm:
        yield StepShape(prompt, prompt, 0, 0)
    first = True
    blocks = canvas_blocks(gen_length, block_length)
    schedule = schedule_of(denoising.schedule, denoising.schedule_shift)
    for (start, end), table in zip(blocks, transfer_table(gen_length, block_length, steps, schedule), strict=True):
        masked = end - start
        for index, commits in enumerate(table):
            total = prompt + gen_length
            scored = gen_length if first and prunes else 0
            if prefix_lm:
                tokens = gen_length
            elif denoising.cache == "none" or index % denoising.refresh_interval == 0:
                tokens = total
            else:
                tokens = gen_length - start
            yield StepShape(tokens, total, masked, scored)
            if first and prunes and gen_length > commits:
                prompt -= visual - tokens_to_keep(visual, pruning.keep_ratio)
            first = False
            masked -= commits


def request_flops(
    config: DvlmConfig, denoising: DenoisingParams, pruning: PruningParams, prompt: int, visual: int, tiles: int
) -> int:
    """Everything from pixels to the last token. prompt: all its tokens. tiles: of all images together."""
    steps = step_shapes(denoising, pruning, prompt, visual)
    return vision_flops(config, tiles) + sum(step_flops(config, step) for step in steps)


def step_flops(config: DvlmConfig, step: StepShape) -> int:
    """One forward of the language model, with its scoring and its logits."""
    hidden = config.hidden_size
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = 2 * hidden * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    attention = 4 * step.tokens * step.kv_tokens * width
    scoring = 2 * step.scored_rows * step.kv_tokens * width
    layers = config.num_hidden_layers * (step.tokens * projections + attention + scoring)
    return layers + 2 * step.candidates * hidden * config.vocab_size


def vision_flops(config: DvlmConfig, tiles: int) -> int:
    """Tower (the layers that are run) and projector."""
    tower, width = config.tower, config.tower.hidden_size
    patches = tower.side**2
    embedding = 2 * 3 * tower.patch_size**2 * width
    layer = 2 * (4 * width * width + 2 * width * tower.intermediate_size) + 4 * patches * width
    layers = tower.kept_layers(config.mm_vision_select_layer)
    projector = 2 * (config.mm_hidden_size * config.hidden_size + config.hidden_size**2)
    return tiles * patches * (embedding + layers * layer + projector)
