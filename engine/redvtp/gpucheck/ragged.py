"""Ragged batches over pages full of rubbish, for checks of attention backends and kernels.

Everything that belongs to no sequence's keys is no number (NaN): what a kernel reads there shows in its output, and
what it writes there shows in the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend, layer_attention
from redvtp.attention.layout import Layout, Span
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.blocks import blocks_needed, padded_block_tables, slots_of_tables
from redvtp.kv.pages import PagedKVCache

LAYERS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence: of its `length` tokens, those from `first` on are computed; every `gap`-th one is read."""

    length: int
    first: int
    gap: int = 1


# Full steps and response steps; one key; the last block full, almost full, just begun; longer than a tile.
PARTS = (Part(130, 121), Part(33, 0), Part(1, 0), Part(64, 32), Part(70, 3), Part(49, 48))


@dataclass(frozen=True, slots=True)
class Result:
    """output: [layers, rows, heads, head_dim]; pages: keys and values of all layers; scores: of each score, by row."""

    output: Tensor
    pages: list[Tensor]
    scores: list[Tensor]


class Ragged:
    """A batch behind shuffled block tables. The numbers are the same on every device."""

    def __init__(
        self, shape: Shape, parts: Sequence[Part] = PARTS, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.shape = shape
        self.parts = parts
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        needed = [blocks_needed(part.length, shape.block_size) for part in parts]
        self.blocks = sum(needed) + 3
        free = torch.randperm(self.blocks, generator=self._generator).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        self._stored = [[self._random(part.length, shape.kv_heads) for part in parts] for _ in range(2 * LAYERS)]
        rows = sum(part.length - part.first for part in parts)
        self.query = self._random(rows, shape.heads)
        self.key, self.value = self._random(rows, shape.kv_heads), self._random(rows, shape.kv_heads)

    def pages(self) -> PagedKVCache:
        """Fresh pages: the keys and values of the parts, rubbish elsewhere."""
        size, heads, width = self.shape.block_size, self.shape.kv_heads, self.shape.head_dim
        pages = PagedKVCache(LAYERS, self.blocks, size, heads, width, self.shape.dtype, self.device)
        for layer in range(LAYERS):
            pages.keys[layer].fill_(float("nan"))
            pages.values[layer].fill_(float("nan"))
            stored = zip(self.slots(), self._stored[2 * layer], self._stored[2 * layer + 1], self.parts, strict=True)
            for slots, key, value, part in stored:
                pages.write(layer, slots[: part.length], key, value)
        return pages

    def slots(self) -> tuple[Tensor, ...]:
        tables = padded_block_tables(self.tables, self.device)
        return slots_of_tables(tables, self.shape.block_size).unbind(0)

    def rows(self, index: int) -> slice:
        """The packed rows of a part."""
        start = sum(part.length - part.first for part in self.parts[:index])
        return slice(start, start + self.parts[index].length - self.parts[index].first)

    def layout(self, scores: tuple[tuple[int, AttentionScores], ...] = ()) -> Layout:
        spans = []
        for index, part in enumerate(self.parts):
            rows = self.rows(index)
            seen = torch.arange(part.length, device=self.device)[:: part.gap] if part.gap > 1 else None
            length = part.length if seen is None else seen.numel()
            spans.append(Span(rows.start, rows.stop, length, part.first > 0, seen, part.length))
        tables = padded_block_tables(self.tables, self.device)
        written = [own[part.first : part.length] for own, part in zip(self.slots(), self.parts, strict=True)]
        return Layout(tuple(spans), tables, self.slots(), self.shape.block_size, torch.cat(written), scores)

    def layout_alone(self, index: int) -> Layout:
        """One part without its neighbours."""
        whole = self.layout()
        span, rows = whole.spans[index], self.rows(index)
        alone = Span(0, span.rows, span.kv_length, span.reads_pages, span.kv_rows, span.write_end)
        table, slots = whole.block_tables[index : index + 1], (whole.slots[index],)
        assert whole.write_slots is not None
        return Layout((alone,), table, slots, whole.block_size, whole.write_slots[rows])

    def scores(self) -> tuple[tuple[int, AttentionScores], ...]:
        """Of a few rows and of all, by row and averaged, in both layers and in the second only."""
        found = []
        for index, part in enumerate(self.parts):
            rows = torch.arange(part.length - part.first, device=self.device)
            visual = torch.arange(0, part.length, 2, device=self.device)
            layers = range(LAYERS) if index % 2 else range(1, LAYERS)
            found.append((index, AttentionScores(rows, visual, self.shape.heads, layers, averaged=index % 3 == 0)))
        last = torch.tensor([self.parts[0].length - self.parts[0].first - 1], device=self.device)
        fifth = torch.tensor([5], device=self.device)
        found.append((0, AttentionScores(last, fifth, self.shape.heads, range(LAYERS))))
        return tuple(found)

    def run(self, backend: AttentionBackend, pages: PagedKVCache, *, scored: bool = False) -> Result:
        """Both layers of one forward."""
        scores = self.scores() if scored else ()
        attend = layer_attention(backend.prepare(self.layout(scores)))
        outputs = [attend(layer, self.query, self.key, self.value) for layer in range(LAYERS)]
        return Result(torch.stack(outputs), [*pages.keys, *pages.values], [sums.by_row() for _, sums in scores])

    def alone(self, backend: AttentionBackend, index: int) -> Tensor:
        """[layers, rows, heads, head_dim] of one part. The backend's pages hold the parts."""
        attend = layer_attention(backend.prepare(self.layout_alone(index)))
        own = [rows[self.rows(index)] for rows in (self.query, self.key, self.value)]
        return torch.stack([attend(layer, *own) for layer in range(LAYERS)])

    def expected(self, *, scored: bool = False) -> Result:
        pages = self.pages()
        return self.run(TorchAttention(pages, self.shape.scale), pages, scored=scored)

    def behind_the_last_keys(self) -> Tensor:
        """[slots] int64 that a kernel may clear: the rest of each sequence's last block."""
        size = self.shape.block_size
        ends = [len(table) * size for table in self.tables]
        found = zip(self.slots(), self.parts, ends, strict=True)
        return torch.cat([own[part.length : end] for own, part, end in found])

    def _random(self, tokens: int, heads: int) -> Tensor:
        drawn = torch.randn(tokens, heads, self.shape.head_dim, generator=self._generator)
        return drawn.to(self.shape.dtype).to(self.device)
