"""Sequences of a packed forward as paged kernels take them: all of them in one call that reads their pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redvtp.attention.layout import Layout
from redvtp.device import on_device


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences whose keys are the first tokens of their pages.

    sequences: their places in the layout.
    rows: [rows] int64, their packed rows; None where those are all.
    query_starts: [sequences + 1] int32, where each one's rows start among these, and where the last one's end.
    kv_lengths: [sequences] int32, the keys of each.
    block_table: [sequences, blocks] int32, padded with 0.
    query_counts, kv_counts: the same numbers on the host.
    block_size: tokens in a block.
    """

    sequences: tuple[int, ...]
    rows: Tensor | None
    query_starts: Tensor
    kv_lengths: Tensor
    block_table: Tensor
    query_counts: tuple[int, ...]
    kv_counts: tuple[int, ...]
    block_size: int

    @property
    def longest_query(self) -> int:
        return max(self.query_counts)

    @property
    def longest_kv(self) -> int:
        return max(self.kv_counts)


def in_place(layout: Layout) -> list[int]:
    """Sequences that a paged kernel can read where they are.

    Each has its keys in its first slots by the time of the attention, those of its own rows among them, without gaps.
    Not a forward that restores pages (it writes none itself), nor a sequence with hidden visual tokens.
    """
    if layout.write_slots is None:
        return []
    return [
        index
        for index, span in enumerate(layout.spans)
        if span.kv_rows is None and span.kv_length > 0 and span.write_end <= span.kv_length
    ]


def paged_batch(layout: Layout, sequences: Sequence[int]) -> PagedBatch:
    """sequences: some of `in_place`, at least one, ascending."""
    device = layout.block_tables.device
    spans = [layout.spans[index] for index in sequences]
    lengths = [span.kv_length for span in spans]
    blocks = -(-max(lengths) // layout.block_size)
    whole = len(spans) == len(layout.spans)
    tables = layout.block_tables[:, :blocks]
    if not whole:
        tables = tables[on_device(list(sequences), torch.int64, device)]
    return PagedBatch(
        tuple(sequences),
        None if whole else rows_of(layout, sequences),
        on_device([0, *accumulate(span.rows for span in spans)], torch.int32, device),
        on_device(lengths, torch.int32, device),
        tables.to(torch.int32).contiguous(),
        tuple(span.rows for span in spans),
        tuple(lengths),
        layout.block_size,
    )


def rows_of(layout: Layout, sequences: Sequence[int]) -> Tensor:
    """[rows] int64, the packed rows of some sequences."""
    device = layout.block_tables.device
    spans = [layout.spans[index] for index in sequences]
    return torch.cat([torch.arange(span.start, span.end, device=device) for span in spans])


def unused_slots(layout: Layout, sequences: Sequence[int]) -> Tensor:
    """[slots] int64, those of their last blocks behind their last keys."""
    size = layout.block_size
    found = [torch.zeros(0, dtype=torch.int64, device=layout.block_tables.device)]
    for index in sequences:
        length = layout.spans[index].kv_length
        found.append(layout.slots[index][length : -(-length // size) * size])
    return torch.cat(found)
