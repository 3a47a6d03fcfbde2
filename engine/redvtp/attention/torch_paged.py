"""The reference backend: pages are gathered for torch's scaled dot product attention. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from redvtp.attention.layout import Layout
from redvtp.kv.pages import KVPages

# Bytes of keys gathered in one operation: small sequences share it, a long one is gathered alone.
GATHER_BYTES = 32 << 20


class TorchAttention:
    """`AttentionBackend` over pages of any layout."""

    name = "torch"
    # Each sequence has a product for itself.
    batch_invariant = True

    def __init__(self, pages: KVPages, scale: float) -> None:
        self._pages = pages
        self._scale = scale

    def prepare(self, layout: Layout) -> TorchPrepared:
        return TorchPrepared(self._pages, layout, self._scale)


class TorchPrepared:
    """`PreparedAttention` of one forward.

    only: sequences to attend to and to score; the output has no rows of others. All of them when None.
    """

    def __init__(self, pages: KVPages, layout: Layout, scale: float, only: Sequence[int] | None = None) -> None:
        self._pages = pages
        self._layout = layout
        self._scale = scale
        self._members = list(range(len(layout.spans))) if only is None else list(only)
        reading = [index for index in self._members if layout.spans[index].reads_pages]
        self._groups = list(self._grouped(reading))
        self._scores = [(index, sums) for index, sums in layout.scores if index in self._members]
        self._scored = {index for index, _ in self._scores}
        # Keys of the present layer that were gathered for a scored sequence.
        self._keys: dict[int, Tensor] = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self._layout.write_slots is not None:
            self._pages.write(layer, self._layout.write_slots, key, value)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One product for each sequence, on views of the packed rows as [1, heads, rows, head_dim]."""
        counts = self._layout.counts
        queries, keys, values = (_heads_first(rows).split(counts, dim=2) for rows in (query, key, value))
        outputs: dict[int, Tensor] = {}
        for index in self._members:
            if not self._layout.spans[index].reads_pages:
                outputs[index] = self._product(queries[index], keys[index], values[index])
        for members, lengths, slots in self._groups:
            read = [_heads_first(rows).split(lengths, dim=2) for rows in self._pages.read(layer, slots)]
            for index, own_key, own_value in zip(members, *read, strict=True):
                outputs[index] = self._product(queries[index], own_key, own_value)
                if index in self._scored:
                    self._keys[index] = own_key[0].transpose(0, 1)
        if len(self._members) == 1:
            return outputs[self._members[0]][0].transpose(0, 1)
        return torch.cat([outputs[index] for index in self._members], dim=2)[0].transpose(0, 1)

    def score(self, layer: int, query: Tensor, key: Tensor) -> None:
        for index, sums in self._scores:
            rows = slice(self._layout.spans[index].start, self._layout.spans[index].end)
            sums.accumulate(layer, query[rows], self._keys.get(index, key[rows]), self._scale)
        self._keys.clear()

    def _product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, scale=self._scale, enable_gqa=grouped)

    def _grouped(self, reading: list[int]) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Sequences whose keys are gathered together: who they are, how many keys each has, and all their slots."""
        pages = self._pages.keys[0]
        at_once = GATHER_BYTES * self._pages.num_blocks * self._pages.block_size // max(1, pages.nbytes)
        members: list[int] = []
        lengths: list[int] = []
        for index in reading:
            length = self._layout.spans[index].kv_length
            if members and sum(lengths) + length > at_once:
                yield members, lengths, self._slots(members)
                members, lengths = [], []
            members.append(index)
            lengths.append(length)
        if members:
            yield members, lengths, self._slots(members)

    def _slots(self, members: list[int]) -> Tensor:
        return torch.cat([self._layout.kv_slots(index) for index in members])


def _heads_first(rows: Tensor) -> Tensor:
    """[rows, heads, head_dim] -> a view [1, heads, rows, head_dim]."""
    return rows.transpose(0, 1)[None]
