"""What an attention backend is: `prepare` once for each packed forward, then `write`, `attend`, `score` in each layer.

    attend = backend.prepare(layout)
    for each layer:
        attend.write(layer, key, value)
        output = attend.attend(layer, query, key, value)
        attend.score(layer, query, key)

The model sees none of this. It is given one function for the attention of a layer, see `LayerAttention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from redvtp.attention.layout import Layout

# (layer, query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim], rotary positions applied)
# -> [rows, heads, head_dim]. What the model calls in every layer.
LayerAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PreparedAttention(Protocol):
    """Attention of one packed forward: bidirectional, each sequence to itself only.

    query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim], rotary positions applied.
    """

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the packed keys and values in the pages, as Layout.write_slots says."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, head_dim]. Pages hold this layer's keys by now."""

    def score(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Add this layer to each of Layout.scores that counts it."""


class AttentionBackend(Protocol):
    """One way to compute attention over the pages of one cache.

    name: what users call it.
    batch_invariant: whether a sequence's output is bit for bit the same whatever its neighbours in the batch are.
    """

    name: str
    batch_invariant: bool

    def prepare(self, layout: Layout) -> PreparedAttention:
        """What does not depend on the layer, worked out once."""


def layer_attention(prepared: PreparedAttention) -> LayerAttention:
    """The three calls of a layer as one function for the model."""

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prepared.write(layer, key, value)
        output = prepared.attend(layer, query, key, value)
        prepared.score(layer, query, key)
        return output

    return attention
