"""Writing the pages of a preempted sequence again, exactly as they were.

A response step reads keys and values that an earlier forward computed: from the canvas as it stood then, and in front
of visual tokens that may have been pruned since. `PageOrigin` remembers what went into that forward (embeddings, ids
and positions, a small part of what the pages take); `RewritingAttention` runs it again and puts the survivors where
they were, turned as they were. The dropped tokens need no pages for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from redvtp.attention.batch import Attention, Segment
from redvtp.kv.cache import KVPages
from redvtp.models.rotary import Rotary


@dataclass(slots=True)
class PageOrigin:
    """What the pages that response steps read were computed from.

    prompt_embeds: [prompt, hidden]. canvas_ids: [tokens] int64, canvas and suffix as the forward saw them, empty where
    the prompt was computed alone. positions: [prompt + tokens] int64. moves: the prunings since, in order: the rows
    that survived one, into those before it, and how far their positions moved, both int64.
    """

    prompt_embeds: Tensor
    canvas_ids: Tensor
    positions: Tensor
    moves: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Rows that must be computed to write the pages again."""
        return self.positions.numel()

    def moved(self, key: Tensor, value: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """The forward's keys and values [tokens, kv_heads, head_dim] as the prunings left them in the pages."""
        for rows, shift in self.moves:
            # One after another, as the pages were turned: rotations add up, their roundings do not.
            key, value = rotary.rotate(key.index_select(0, rows), shift), value.index_select(0, rows)
        return key, value


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
            keys, values = origin.moved(key[rows], value[rows], self._rotary)
            self._cache.write(layer, slots, keys[: slots.numel()], values[: slots.numel()])
        return self._attention(layer, query, key, value)
