"""Writing the pages of a preempted sequence again, exactly as they were.

A response step reads keys and values that an earlier forward computed: from the canvas as it stood then, and in front
of visual tokens that may have been pruned since, or inside it. `PageOrigin` remembers what went into that forward
(embeddings, ids and positions, a small part of what the pages take); `RewritingAttention` runs it again and puts the
survivors where they were, turned as they were. The dropped tokens need no pages for it.

The canvas may have been computed once more since then, by a response step on those pages. `CanvasOrigin` remembers that
one, and it is simply taken again: every pruning makes the canvas be computed anew, so there is none in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from redvtp.attention.interface import Attention, Segment
from redvtp.kv.pages import KVPages
from redvtp.kv.rotary import Rotary


@dataclass(frozen=True, slots=True)
class OriginCut:
    """Rows that left the forward half way.

    layer: the last one that ran on all rows. rows, positions: [rows] int64, those that went on, and where. in_place:
    behind the layer they have the slots they have in front of it; otherwise those of the first rows.
    """

    layer: int
    rows: Tensor
    positions: Tensor
    in_place: bool


@dataclass(frozen=True, slots=True)
class Move:
    """One pruning of pages. rows: [rows] int64, those that survived it, into the rows before it. shift: [rows] int64,
    how far their positions moved. layers: those whose pages it moved."""

    rows: Tensor
    shift: Tensor
    layers: range


@dataclass(slots=True)
class PageOrigin:
    """What the pages that response steps read were computed from.

    prompt_embeds: [prompt, hidden]. canvas_ids: [tokens] int64, canvas and suffix as the forward saw them, empty where
    the prompt was computed alone. positions: [prompt + tokens] int64. cut: None where all rows went through all layers.
    moves: the prunings since, in order.
    """

    prompt_embeds: Tensor
    canvas_ids: Tensor
    positions: Tensor
    cut: OriginCut | None = None
    moves: list[Move] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write the pages again."""
        return self.positions.numel()

    def moved(self, layer: int, key: Tensor, value: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [tokens, kv_heads, head_dim] as the prunings left them in the pages."""
        for move in self.moves:
            if layer in move.layers:
                # One after another, as the pages were turned: rotations add up, their roundings do not.
                key, value = rotary.rotate(key.index_select(0, move.rows), move.shift), value.index_select(0, move.rows)
        return key, value

    def slots_at(self, layer: int, slots: Tensor) -> Tensor:
        """Those of slots [rows], the first ones of a sequence, that a layer has written."""
        if self.cut is None or not self.cut.in_place or layer <= self.cut.layer:
            return slots
        return slots[self.cut.rows[self.cut.rows < slots.numel()]]


@dataclass(frozen=True, slots=True)
class CanvasOrigin:
    """A response step over the whole canvas, which later ones read.

    first: the row it began with. prompt_embeds: [rows, hidden], those in front of the canvas that it computed too.
    canvas_ids: [tokens] int64, canvas and suffix as it saw them. positions: [rows + tokens] int64.
    """

    first: int
    prompt_embeds: Tensor
    canvas_ids: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write these pages again."""
        return self.positions.numel()


class RewritingAttention:
    """`Attention` of a forward that only restores pages.

    attention: the backend, over `segments`, which themselves write nothing. origins, slots: for each segment where its
    rows come from, and [rows] int64 where those that survived go, from the first one on.
    """

    def __init__(
        self,
        attention: Attention,
        segments: list[Segment],
        origins: list[PageOrigin],
        slots: list[Tensor],
        cache: KVPages,
        rotary: Rotary,
    ) -> None:
        self._attention = attention
        self._parts = list(zip(segments, origins, slots, strict=True))
        self._cache = cache
        self._rotary = rotary

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for segment, origin, slots in self._parts:
            rows = slice(segment.start, segment.end)
            keys, values = origin.moved(layer, key[rows], value[rows], self._rotary)
            own = origin.slots_at(layer, slots)
            self._cache.write(layer, own, keys[: own.numel()], values[: own.numel()])
        return self._attention(layer, query, key, value)
