"""One pass of the model over a packed batch, in stages where rows leave on the way.

The layers up to an exit run on all rows of a sequence, those behind it on the rows that go on. Sequences of a batch may
have exits behind different layers, or none. Each stage is one packed forward over a stretch of layers, with
its layout; without exits there is one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.attention.interface import LayerAttention
from redvtp.attention.layout import Layout, Span
from redvtp.denoising.packing import Packed
from redvtp.device import to_device
from redvtp.models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a sequence goes on behind its exit layer.

    rows: [rows] int64 on the CPU, ascending, those of its packed rows that go on.
    positions: [rows] int64 on the CPU, theirs from here on.
    write_slots: [rows] int64 on the device, where their keys and values go. None where the forward writes no pages.
    kv_length, reads_pages, kv_rows: see `Span`.
    """

    rows: Tensor
    positions: Tensor
    write_slots: Tensor | None
    kv_length: int
    reads_pages: bool
    kv_rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a forward put out.

    hidden: [rows, hidden], the rows that went through all layers, before the final norm.
    spans: whose rows they are.
    row_layers: for each sequence the number of its rows, summed over the layers.
    """

    hidden: Tensor
    spans: tuple[Span, ...]
    row_layers: list[int]


# Called when a layer has run behind which sequences leave: their indices -> how each goes on.
Leave = Callable[[list[int]], list[Continuation]]


def run_forward(
    model: Transformer,
    packed: Packed,
    attention: Callable[[Layout], LayerAttention],
    exits: Mapping[int, int] | None = None,
    leave: Leave | None = None,
) -> ForwardOutput:
    """A packed batch through all layers.

    attention: makes the attention of a stage from its layout.
    exits: {index of a sequence: the layer behind which rows of it leave}.
    """
    hidden, positions, layout = packed.hidden, packed.positions, packed.layout
    exits = exits or {}
    row_layers = [0] * len(layout.spans)
    first = 0
    for last in sorted({*exits.values(), len(model.layers) - 1}):
        stage = range(first, last + 1)
        hidden = model(hidden, to_device(positions, hidden.device), attention(layout), stage)
        for index, span in enumerate(layout.spans):
            row_layers[index] += len(stage) * span.rows
        leaving = [index for index, layer in exits.items() if layer == last]
        if leaving:
            assert leave is not None
            continuations = dict(zip(leaving, leave(leaving), strict=True))
            hidden, positions, layout = _without_leaving(hidden, positions, layout, continuations)
        first = last + 1
    return ForwardOutput(hidden, layout.spans, row_layers)


def _without_leaving(
    hidden: Tensor, positions: Tensor, layout: Layout, continuations: Mapping[int, Continuation]
) -> tuple[Tensor, Tensor, Layout]:
    """The packed tensors and their layout without the rows that leave."""
    rows: list[Tensor] = []
    places: list[Tensor] = []
    written: list[Tensor | None] = []
    spans: list[Span] = []
    for index, span in enumerate(layout.spans):
        going = continuations.get(index)
        start = spans[-1].end if spans else 0
        own = slice(span.start, span.end)
        if going is None:
            rows.append(torch.arange(span.start, span.end))
            places.append(positions[own])
            written.append(None if layout.write_slots is None else layout.write_slots[own])
            kept = Span(start, start + span.rows, span.kv_length, span.reads_pages, span.kv_rows, span.write_end)
        else:
            rows.append(span.start + going.rows)
            places.append(going.positions)
            written.append(going.write_slots)
            end = start + going.rows.numel()
            kept = Span(start, end, going.kv_length, going.reads_pages, going.kv_rows, going.kv_length)
        spans.append(kept)
    slots = [part for part in written if part is not None]
    shorter = Layout(
        tuple(spans),
        layout.block_tables,
        layout.slots,
        layout.block_size,
        torch.cat(slots) if slots else None,
        # A sequence that left has been scored in the layers in front of its exit.
        tuple(entry for entry in layout.scores if entry[0] not in continuations),
    )
    kept_rows = to_device(torch.cat(rows), hidden.device)
    return hidden.index_select(0, kept_rows), torch.cat(places), shorter
