"""A forward in stages: the layers up to a cut run on all rows of a sequence, those behind it on the rows that go on.

Sequences of a batch may be cut behind different layers, or not at all. Each stage is one packed forward over a stretch
of layers, with segments, positions and slots of its own; where nothing is cut there is one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redvtp.attention.interface import Attention, Segment
from redvtp.models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Rest:
    """How a sequence goes on behind its cut.

    rows: [rows] int64, ascending, those of its own rows that go on. positions: [rows] int64, theirs from here on.
    write_slots, read_slots: see `Segment`. What a segment scores it has scored in the layers in front of its cut.
    """

    rows: Tensor
    positions: Tensor
    write_slots: Tensor | None
    read_slots: Tensor | None


@dataclass(frozen=True, slots=True)
class Passed:
    """What a forward put out.

    hidden: [rows, hidden], those that went through all layers. segments: whose rows they are. row_layers: for each
    segment the sum of its rows over the layers.
    """

    hidden: Tensor
    segments: list[Segment]
    row_layers: list[int]


# The rest of each of these sequences, asked for when the layer behind which they are cut has run.
Shorten = Callable[[list[int], list[Segment]], list[Rest]]


def run_in_stages(
    model: Transformer,
    hidden: Tensor,
    positions: Tensor,
    segments: list[Segment],
    attention: Callable[[list[Segment]], Attention],
    cuts: Mapping[int, int],
    shorten: Shorten,
) -> Passed:
    """hidden [tokens, hidden] through all layers.

    positions: [tokens] int64. attention: makes that of a stage, over its segments. cuts: {index of a segment: the layer
    behind which it is cut}. shorten: for indices of `cuts` and the segments of the stage that has ended.
    """
    row_layers = [0] * len(segments)
    first = 0
    for cut in sorted({*cuts.values(), len(model.layers) - 1}):
        stage = range(first, cut + 1)
        hidden = model(hidden, positions, attention(segments), stage)
        for index, segment in enumerate(segments):
            row_layers[index] += len(stage) * (segment.end - segment.start)
        leaving = [index for index, layer in cuts.items() if layer == cut]
        if leaving:
            rests = dict(zip(leaving, shorten(leaving, segments), strict=True))
            hidden, positions, segments = _shortened(hidden, positions, segments, rests)
        first = cut + 1
    return Passed(hidden, segments, row_layers)


def _shortened(
    hidden: Tensor, positions: Tensor, segments: list[Segment], rests: Mapping[int, Rest]
) -> tuple[Tensor, Tensor, list[Segment]]:
    """The packed tensors and their layout, without the rows that the sequences of `rests` leave behind."""
    rows: list[Tensor] = []
    places: list[Tensor] = []
    packed: list[Segment] = []
    end = 0
    for index, segment in enumerate(segments):
        rest = rests.get(index)
        start, end = end, end + (segment.end - segment.start if rest is None else rest.rows.numel())
        if rest is None:
            rows.append(torch.arange(segment.start, segment.end, device=hidden.device))
            places.append(positions[segment.start : segment.end])
            packed.append(replace(segment, start=start, end=end))
        else:
            rows.append(segment.start + rest.rows)
            places.append(rest.positions)
            packed.append(
                replace(segment, start=start, end=end, write_slots=rest.write_slots, read_slots=rest.read_slots)
            )
    return hidden.index_select(0, torch.cat(rows)), torch.cat(places), packed
