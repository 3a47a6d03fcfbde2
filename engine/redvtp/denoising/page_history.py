"""What a sequence's pages were computed from, so that lost pages can be written again exactly as they were.

A response step reads keys and values that an earlier forward computed: from the canvas as it stood then, and in front
of visual tokens that may have been pruned since. `PageOrigin` remembers what went into that forward: embeddings, ids
and positions, a small part of what the pages take. The canvas may have been computed once more since, by a response
step on those pages: `CanvasOrigin`. After a pruning the next step computes the canvas anew, so no pruning happens
between the two forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from redvtp.device import to_device
from redvtp.kv.rotary import Rotary


@dataclass(frozen=True, slots=True)
class OriginExit:
    """Rows that left the forward behind a layer.

    layer: the last one that ran on all rows.
    rows: [rows] int64 on the CPU, those that went on.
    positions: [rows] int64 on the CPU, theirs behind the layer.
    in_place: behind the layer they have the slots they have in front of it; otherwise those of the first rows.
    """

    layer: int
    rows: Tensor
    positions: Tensor
    in_place: bool


@dataclass(frozen=True, slots=True)
class Move:
    """One pruning of pages.

    rows: [rows] int64 on the CPU, those that survived it, into the rows before it.
    shift: [rows] int64 on the CPU, how far their positions moved.
    layers: those whose pages it moved.
    """

    rows: Tensor
    shift: Tensor
    layers: range


@dataclass(frozen=True, slots=True)
class PageOrigin:
    """A forward over the whole sequence, or over the prompt alone, whose pages later steps read.

    prompt_embeds: [prompt, hidden].
    prompt_positions: [prompt] int64 on the CPU.
    ids: [tokens] int64 on the CPU, canvas and suffix as it saw them; empty where the prompt was computed alone.
    canvas_position: position of the first canvas token.
    exit: None where all rows went through all layers.
    moves: the prunings since, in order.
    """

    prompt_embeds: Tensor
    prompt_positions: Tensor
    ids: Tensor
    canvas_position: int
    exit: OriginExit | None = None
    moves: tuple[Move, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write the pages again."""
        return self.prompt_embeds.shape[0] + self.ids.numel()

    def moved(self, layer: int, key: Tensor, value: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [tokens, kv_heads, head_dim] as the prunings left them in the pages."""
        for move in self.moves:
            if layer in move.layers:
                rows, shift = (to_device(part, key.device) for part in (move.rows, move.shift))
                # Apply each rotation separately: their rounding does not add up.
                key, value = rotary.rotate(key.index_select(0, rows), shift), value.index_select(0, rows)
        return key, value

    def written(self, layer: int, slots: Tensor) -> Tensor:
        """Those of slots [rows], the first ones of a sequence, that a layer has written."""
        if self.exit is None or not self.exit.in_place or layer <= self.exit.layer:
            return slots
        rows = self.exit.rows[self.exit.rows < slots.numel()]
        return slots[to_device(rows, slots.device)]


@dataclass(frozen=True, slots=True)
class CanvasOrigin:
    """A response step over the whole canvas, which later ones read.

    first_row: the row it began with.
    prompt_embeds: [rows, hidden], those in front of the canvas that it computed too.
    prompt_positions: [rows] int64 on the CPU.
    ids: [tokens] int64 on the CPU, canvas and suffix as it saw them.
    canvas_position: position of the first canvas token.
    """

    first_row: int
    prompt_embeds: Tensor
    prompt_positions: Tensor
    ids: Tensor
    canvas_position: int

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write these pages again."""
        return self.prompt_embeds.shape[0] + self.ids.numel()


@dataclass(frozen=True, slots=True)
class PageHistory:
    """Where the pages that the next steps read come from.

    prompt_forward: the last forward over all rows, or over the prompt alone. None while no step reads pages.
    canvas_forward: the last response step over the whole canvas since.
    lost: the pages are gone (preemption) or not to be trusted (a step failed).
    canvas_stale: the canvas' pages are not to be read: visual tokens went since they were written, or the step that
        wrote them was scored, which takes another way through attention.
    """

    prompt_forward: PageOrigin | None = None
    canvas_forward: CanvasOrigin | None = None
    lost: bool = False
    canvas_stale: bool = False

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write all pages again."""
        return sum(origin.tokens for origin in (self.prompt_forward, self.canvas_forward) if origin is not None)

    def after_full(self, origin: PageOrigin) -> PageHistory:
        return replace(self, prompt_forward=origin, canvas_forward=None, canvas_stale=False)

    def after_whole_canvas(self, origin: CanvasOrigin) -> PageHistory:
        return replace(self, canvas_forward=origin, canvas_stale=False)

    def after_move(self, move: Move) -> PageHistory:
        assert self.prompt_forward is not None, "pages that are kept came from somewhere"
        origin = replace(self.prompt_forward, moves=(*self.prompt_forward.moves, move))
        return replace(self, prompt_forward=origin)

    def kept(self, prompt_forward: bool, canvas_forward: bool) -> PageHistory:
        """Without what no later step reads: it may hold the embeddings of tokens that were dropped."""
        return replace(
            self,
            prompt_forward=self.prompt_forward if prompt_forward else None,
            canvas_forward=self.canvas_forward if canvas_forward else None,
        )
