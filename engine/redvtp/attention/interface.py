"""What attention must know about a packed batch: which rows belong to whom, and where each sequence's keys are.

Tokens of all sequences lie one after another, without padding. A sequence in a full step brings all its keys with it;
one in a response step brings the keys of its canvas and reads the rest from its pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from redvtp.attention.scores import AttentionScores


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence of a packed batch.

    start, end: its rows in the packed tensors.
    write_slots: [end - start] int64, where its new keys and values go; None when the backend shall not write them.
    read_slots: [kv_tokens] int64, where all its keys and values are after the write; None when its own rows are all of
    them.
    scores: filled by attention in the layers it names, when this step scores visual tokens.
    """

    start: int
    end: int
    write_slots: Tensor | None
    read_slots: Tensor | None = None
    scores: AttentionScores | None = None


def written_slots(segments: list[Segment]) -> Tensor | None:
    """[tokens] int64, where the packed keys and values of a forward go; None when it writes no pages. Raises ValueError
    when some segments do and some do not."""
    slots = [segment.write_slots for segment in segments if segment.write_slots is not None]
    if slots and len(slots) != len(segments):
        raise ValueError("either all segments of a forward write pages or none does")
    return torch.cat(slots) if slots else None


class Attention(Protocol):
    """Attention of one step: bidirectional, each sequence to itself only.

    query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim], rotary positions applied.
    Returns [tokens, heads, head_dim].
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


# A backend over its pages: the segments and the scale of one forward, or of some of its layers, to their attention.
MakeAttention = Callable[[list[Segment], float], Attention]
