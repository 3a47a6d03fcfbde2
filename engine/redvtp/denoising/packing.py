"""Sequences to one packed forward: rows, positions and layout. The one place that packs.

A `Part` is what one sequence brings: rows of its prompt, ids behind them, and where their keys and values are. Steps,
prompts that are computed alone and lost pages that are written again differ in their parts only.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redvtp.attention.layout import Layout, Span
from redvtp.attention.scores import AttentionScores
from redvtp.device import to_device
from redvtp.kv.blocks import padded_block_tables, slots_of_tables
from redvtp.models.dvlm import Dvlm


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's rows in a packed forward.

    prompt_embeds: [prompt rows, hidden]; None without any.
    prompt_positions: [prompt rows] int64 on the CPU; None without any.
    ids: [ids] int64 on the CPU, of the canvas and suffix rows behind them.
    ids_position: position of the first of those.
    block_table: the sequence's blocks.
    first_row: the row of the sequence that the first of these is.
    kv_length: keys they attend to, from the sequence's first row on.
    reads_pages: the other keys come from pages. False where these rows are all.
    writes_pages: their keys and values go to the sequence's slots.
    scores: filled while the layers run.
    """

    prompt_embeds: Tensor | None
    prompt_positions: Tensor | None
    ids: Tensor
    ids_position: int
    block_table: list[int]
    first_row: int
    kv_length: int
    reads_pages: bool
    writes_pages: bool = True
    scores: AttentionScores | None = None

    @property
    def rows(self) -> int:
        return (0 if self.prompt_embeds is None else self.prompt_embeds.shape[0]) + self.ids.numel()


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed forward before its first layer.

    hidden: [rows, hidden], input embeddings.
    positions: [rows] int64 on the CPU.
    layout: see there.
    slots: for each sequence [blocks * block_size] int64, where its tokens are in the pages.
    """

    hidden: Tensor
    positions: Tensor
    layout: Layout
    slots: tuple[Tensor, ...]


def pack(parts: Many[Part], model: Dvlm, block_size: int) -> Packed:
    """parts: at least one. Either all of them write pages or none does."""
    device = model.device
    ids = to_device(torch.cat([part.ids for part in parts]), device)
    embedded = model.embed(ids).split([part.ids.numel() for part in parts])
    counting = torch.arange(max(part.ids_position + part.ids.numel() for part in parts))
    rows: list[Tensor] = []
    positions: list[Tensor] = []
    for part, response in zip(parts, embedded, strict=True):
        if part.prompt_embeds is not None and part.prompt_positions is not None:
            rows.append(part.prompt_embeds)
            positions.append(part.prompt_positions)
        rows.append(response)
        positions.append(counting[part.ids_position : part.ids_position + part.ids.numel()])
    tables = padded_block_tables([part.block_table for part in parts], device)
    slots = slots_of_tables(tables, block_size).unbind(0)
    return Packed(torch.cat(rows), torch.cat(positions), _layout(parts, tables, slots, block_size), slots)


def _layout(parts: Many[Part], tables: Tensor, slots: tuple[Tensor, ...], block_size: int) -> Layout:
    ends = list(accumulate(part.rows for part in parts))
    spans = tuple(
        Span(end - part.rows, end, part.kv_length, part.reads_pages, write_end=part.first_row + part.rows)
        for part, end in zip(parts, ends, strict=True)
    )
    writes = {part.writes_pages for part in parts}
    if len(writes) != 1:
        raise ValueError("either all sequences of a forward write pages or none does")
    written = [own[part.first_row : part.first_row + part.rows] for part, own in zip(parts, slots, strict=True)]
    scores = tuple((index, part.scores) for index, part in enumerate(parts) if part.scores is not None)
    return Layout(spans, tables, slots, block_size, torch.cat(written) if writes.pop() else None, scores)
