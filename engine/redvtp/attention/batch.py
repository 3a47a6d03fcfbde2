"""What attention must know about a packed batch: which rows belong to whom, and where each sequence's keys are.

Tokens of all sequences lie one after another, without padding. A sequence in a full step brings all its keys with it;
one in a response step brings the keys of its canvas and reads the rest from its pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from redvtp.pruning.scores import AttentionScores


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


class Attention(Protocol):
    """Attention of one step: bidirectional, each sequence to itself only.

    query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim], rotary positions applied.
    Returns [tokens, heads, head_dim].
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...
