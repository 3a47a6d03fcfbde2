"""Lost pages written again, exactly as they were.

The forward that `PageHistory` remembers is run once more; the rows that survived the prunings since are put where they
were, keys rotated as they were. Dropped tokens need no pages for it. The canvas' later forward, if there was one, is
then simply taken again.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from redvtp.attention.interface import LayerAttention, PreparedAttention, layer_attention
from redvtp.attention.layout import Layout
from redvtp.denoising.context import Context, LayerExit, SequenceStep
from redvtp.denoising.forward import run_forward
from redvtp.denoising.layer_exit import again, origin_exit
from redvtp.denoising.packing import Part, pack
from redvtp.denoising.page_history import CanvasOrigin, PageOrigin
from redvtp.denoising.planner import is_whole_response, restored_rows
from redvtp.denoising.sequence import Sequence
from redvtp.kv.pages import KVPages
from redvtp.kv.rotary import Rotary
from redvtp.params import BLOCK_CACHES


def restore_pages(context: Context, steps: list[SequenceStep]) -> None:
    """Write again what the steps of suspended sequences read from pages."""
    lost = [step for step in steps if step.sequence.pages.lost]
    _restore_prompts(context, [step for step in lost if step.sequence.pages.prompt_forward is not None])
    _restore_canvases(context, [step for step in lost if step.sequence.pages.canvas_forward is not None])
    for step in lost:
        step.sequence.pages = replace(step.sequence.pages, lost=False)


def note_pages(step: SequenceStep) -> None:
    """Remember what the forward of a step has written, if later ones read it. To be called before the commit."""
    sequence, plan = step.sequence, step.plan
    if sequence.denoising.cache not in BLOCK_CACHES:
        return
    if plan.kind == "full":
        sequence.pages = sequence.pages.after_full(origin_of(sequence, step.exit))
        return
    prompt = sequence.prompt
    if is_whole_response(sequence, plan):
        sequence.pages = sequence.pages.after_whole_canvas(
            CanvasOrigin(
                plan.first_row,
                prompt.embeds[plan.first_row :],
                prompt.positions[plan.first_row :],
                sequence.response_ids().clone(),
                prompt.canvas_position,
            )
        )
    if plan.measures_attention:
        # Scored attention takes another way, on which the last bits may differ from those of a step taken again.
        sequence.pages = replace(sequence.pages, canvas_stale=True)


def origin_of(sequence: Sequence, exit_: LayerExit | None = None, prompt_alone: bool = False) -> PageOrigin:
    """What a forward over all rows, or over the prompt alone, computes pages from."""
    ids, prompt = sequence.response_ids().clone(), sequence.prompt
    ids = ids[:0] if prompt_alone else ids
    return PageOrigin(prompt.embeds, prompt.positions, ids, prompt.canvas_position, origin_exit(exit_))


def _restore_prompts(context: Context, steps: list[SequenceStep]) -> None:
    if not steps:
        return
    origins = [origin for step in steps if (origin := step.sequence.pages.prompt_forward) is not None]
    parts = [
        Part(
            origin.prompt_embeds,
            origin.prompt_positions,
            origin.ids,
            origin.canvas_position,
            step.sequence.block_table,
            first_row=0,
            kv_length=origin.tokens,
            reads_pages=False,
            writes_pages=False,
        )
        for step, origin in zip(steps, origins, strict=True)
    ]
    packed = pack(parts, context.model, context.pages.block_size)
    slots = [own[: restored_rows(step.sequence, step.plan)] for own, step in zip(packed.slots, steps, strict=True)]
    rotary = context.model.language_model.rotary

    def attention(layout: Layout) -> LayerAttention:
        prepared = context.attention.prepare(layout)
        return layer_attention(_Restoring(prepared, layout, origins, slots, context.pages, rotary))

    exits = {index: origin.exit for index, origin in enumerate(origins) if origin.exit is not None}
    output = run_forward(
        context.model.language_model,
        packed,
        attention,
        {index: exit_.layer for index, exit_ in exits.items()},
        lambda indices: [again(exits[index]) for index in indices],
    )
    for step, row_layers in zip(steps, output.row_layers, strict=True):
        step.row_layers += row_layers


def _restore_canvases(context: Context, steps: list[SequenceStep]) -> None:
    """Take the response steps again that wrote the canvas since; the prompts' pages are there."""
    if not steps:
        return
    parts = []
    for step in steps:
        origin, sequence = step.sequence.pages.canvas_forward, step.sequence
        assert origin is not None
        parts.append(
            Part(
                origin.prompt_embeds,
                origin.prompt_positions,
                origin.ids,
                origin.canvas_position,
                sequence.block_table,
                first_row=origin.first_row,
                kv_length=sequence.total_length,
                reads_pages=True,
            )
        )
    packed = pack(parts, context.model, context.pages.block_size)
    # No exits: a sequence with a layer exit has no CanvasOrigin.
    output = run_forward(context.model.language_model, packed, context.attend)
    for step, row_layers in zip(steps, output.row_layers, strict=True):
        step.row_layers += row_layers


class _Restoring:
    """`PreparedAttention` of a forward that only restores pages.

    prepared: the backend over the same layout, which writes nothing by itself.
    origins: what each sequence's pages were computed from.
    slots: for each sequence [rows] int64, where its surviving rows go, from the first one on.
    """

    def __init__(
        self,
        prepared: PreparedAttention,
        layout: Layout,
        origins: list[PageOrigin],
        slots: list[Tensor],
        pages: KVPages,
        rotary: Rotary,
    ) -> None:
        self._prepared = prepared
        self._parts = list(zip(layout.spans, origins, slots, strict=True))
        self._pages = pages
        self._rotary = rotary

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        for span, origin, slots in self._parts:
            rows = slice(span.start, span.end)
            keys, values = origin.moved(layer, key[rows], value[rows], self._rotary)
            own = origin.written(layer, slots)
            self._pages.write(layer, own, keys[: own.numel()], values[: own.numel()])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._prepared.attend(layer, query, key, value)

    def score(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Nothing is scored again."""
