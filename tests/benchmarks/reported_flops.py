"""Floating-point operations of one request, worked out from the reports of its steps.

Only matrix products count (a multiply and an add are two), as in torch's counter. That both agree shows that steps
report what they computed. The choice of visual tokens by their features (`attention-free`) is left out: it is small
beside a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from redvtp.families.config import DvlmConfig
from redvtp.local import Generation
from redvtp.reports import StepReport
from redvtp.vision.path import TiledVision

# Policies that choose without looking at attention.
UNSCORED = frozenset({"none", "random", "uniform", "attention-free", "external"})


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of the language model.

    tokens: computed, mean over the layers. attended: query-key pairs, summed over the layers; scored: those of scored
    rows. candidates: rows that get logits.
    """

    tokens: float
    attended: float
    scored: float
    candidates: int


def reported_flops(config: DvlmConfig, generation: Generation, mask_id: int, tiles: int) -> int:
    """Everything from pixels to the last token. tiles: of all images together."""
    steps = forwards(config, generation, mask_id)
    return vision_flops(config, tiles) + round(sum(forward_flops(config, forward) for forward in steps))


def forwards(config: DvlmConfig, generation: Generation, mask_id: int) -> Iterator[Forward]:
    """The forwards of a request without a draft: one a step, and one more for a prompt that is encoded alone."""
    denoising, layers = generation.request.denoising, config.num_hidden_layers
    first = generation.steps[0]
    response = first.kv_tokens - first.prompt_length
    held, visual = generation.prompt_tokens + response, generation.visual_tokens
    canvas = [mask_id] * denoising.gen_length
    # The share of the layers that no visual token reaches: found where all tokens are computed, true of every step.
    withdrawn = 0.0
    for step in generation.steps:
        pruning, rows = step.pruning, step.tokens_computed
        dropped = 0 if pruning is None else pruning.visual_before - pruning.visual_after
        if pruning is not None and pruning.step < step.step:
            # Before the forward.
            held, visual, dropped = held - dropped, visual - dropped, 0
        if denoising.cache == "prefix_lm" and step is first:
            prompt, rows = rows - response, response
            withdrawn = _share(held - response - prompt, visual)
            decided = int(config.family.sampler.shifted_logits)
            # The prompt's last row says what the first canvas token is.
            canvas[:decided] = [-1] * decided
            yield Forward(prompt, layers * _pairs(held - response, None, visual, withdrawn), 0, decided)
        queries = None if step.kind == "full" and denoising.cache != "prefix_lm" else rows
        if pruning is not None and pruning.layer is not None:
            pairs = _pairs(held, queries, dropped, (layers - pruning.layer - 1) / layers)
        else:
            withdrawn = _share(held - rows, visual) if queries is None else withdrawn
            pairs = _pairs(held, queries, visual, withdrawn)
        candidates = _candidates(step, canvas, denoising.resolved_block_length, mask_id)
        scored = _scored_layers(generation, step, layers) * canvas.count(mask_id) * held
        yield Forward(rows, layers * pairs, scored, candidates)
        canvas, held, visual = step.canvas, step.kv_tokens, visual - dropped


def _candidates(step: StepReport, canvas: list[int], block_length: int, mask_id: int) -> int:
    """Undecided positions of the canvas block that the step worked on."""
    start = step.canvas_block * block_length
    return canvas[start : start + block_length].count(mask_id)


def _share(missing: int, leaving: int) -> float:
    """Of the layers, the share that `leaving` tokens do not reach, if `missing` rows are missing in the mean."""
    return missing / leaving if leaving else 0.0


def _pairs(held: int, rows: int | None, leaving: int, behind: float) -> float:
    """Query-key pairs, mean over the layers: `rows` query rows, or None for as many as keys, over `held` keys; in the
    share `behind` of the layers without the `leaving` ones."""
    left = held - leaving
    front, back = held * (held if rows is None else rows), left * (left if rows is None else rows)
    return (1 - behind) * front + behind * back


def _scored_layers(generation: Generation, step: StepReport, layers: int) -> int:
    """Layers whose attention was scored. It is taken for that of the undecided rows: what others would cost is small
    beside the forward, as is how many layers were scored inside a step."""
    pruning = step.pruning
    if pruning is None or pruning.step < step.step or generation.request.pruning.preset in UNSCORED:
        return 0
    return layers if pruning.layer is None else 1


def forward_flops(config: DvlmConfig, forward: Forward) -> float:
    """One forward of the language model, with its scoring and its logits."""
    hidden = config.hidden_size
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = 2 * hidden * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    layers = config.num_hidden_layers * forward.tokens * projections
    attention = (4 * forward.attended + 2 * forward.scored) * width
    return layers + attention + 2 * forward.candidates * hidden * config.vocab_size


def vision_flops(config: DvlmConfig, tiles: int) -> int:
    """Tower (the layers that are run) and projector."""
    vision = config.vision
    assert isinstance(vision, TiledVision)
    tower, width = vision.tower, vision.tower.hidden_size
    patches = tower.side**2
    embedding = 2 * 3 * tower.patch_size**2 * width
    layer = 2 * (4 * width * width + 2 * width * tower.intermediate_size) + 4 * patches * width
    layers = tower.kept_layers(vision.select_layer)
    projector = 2 * (width * config.hidden_size + config.hidden_size**2)
    return tiles * patches * (embedding + layers * layer + projector)
