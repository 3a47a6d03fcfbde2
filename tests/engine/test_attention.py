"""The reference backend against attention written out, over any mix of full and response steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redvtp.attention import torch_paged
from redvtp.attention.interface import layer_attention
from redvtp.attention.layout import Layout, Span
from redvtp.attention.paged_batch import in_place, paged_batch
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.blocks import blocks_needed, padded_block_tables, slots_of_tables
from redvtp.kv.pages import PagedKVCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCKS = 4, 2, 8, 4, 64
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence: `length` tokens of which those from `first` on are computed, every `gap`-th one read at most."""

    length: int
    first: int
    gap: int
    table: list[int]


class Setup:
    """Pages full of random keys and values behind shuffled block tables."""

    def __init__(self, sizes: list[tuple[int, int, int]], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pages = PagedKVCache(1, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.float32)
        slots = torch.arange(BLOCKS * BLOCK_SIZE)
        self.pages.write(0, slots, self.random(slots.numel(), KV_HEADS), self.random(slots.numel(), KV_HEADS))
        free = torch.randperm(BLOCKS, generator=self.generator).tolist()
        self.parts = [
            Part(length, first, gap, [free.pop() for _ in range(blocks_needed(length, BLOCK_SIZE))])
            for length, first, gap in sizes
        ]
        rows = [part.length - part.first for part in self.parts]
        self.inputs = [tuple(self.random(count, heads) for heads in (HEADS, KV_HEADS, KV_HEADS)) for count in rows]

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=self.generator)

    def layout(self, members: list[int], scores: tuple[tuple[int, AttentionScores], ...] = ()) -> Layout:
        spans: list[Span] = []
        for part in (self.parts[index] for index in members):
            start, reads = spans[-1].end if spans else 0, part.first > 0
            seen = torch.arange(part.length)[:: part.gap] if reads and part.gap > 1 else None
            length = part.length if seen is None else seen.numel()
            spans.append(Span(start, start + part.length - part.first, length, reads, seen, part.length))
        tables = padded_block_tables([self.parts[index].table for index in members], torch.device("cpu"))
        slots = slots_of_tables(tables, BLOCK_SIZE).unbind(0)
        parts = [self.parts[index] for index in members]
        written = [own[part.first : part.length] for own, part in zip(slots, parts, strict=True)]
        return Layout(tuple(spans), tables, slots, BLOCK_SIZE, torch.cat(written), scores)

    def run(self, members: list[int], scores: tuple[tuple[int, AttentionScores], ...] = ()) -> list[Tensor]:
        """The outputs of these sequences in one batch."""
        layout = self.layout(members, scores)
        packed = [torch.cat(tensors) for tensors in zip(*(self.inputs[index] for index in members), strict=True)]
        output = layer_attention(TorchAttention(self.pages, SCALE).prepare(layout))(0, *packed)
        return list(output.split(layout.counts))

    def slow(self, index: int) -> tuple[Tensor, Tensor]:
        """Output [rows, heads, head_dim] and attention map [heads, rows, keys] of one sequence, after the writes."""
        part, (query, key, value) = self.parts[index], self.inputs[index]
        if part.first:
            layout = self.layout([index])
            key, value = self.pages.read(0, layout.kv_slots(0))
        key, value = (rows.repeat_interleave(HEADS // KV_HEADS, dim=1) for rows in (key, value))
        weights = (torch.einsum("qhd,khd->hqk", query, key) * SCALE).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value), weights


SIZES = st.lists(
    st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, 3))),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 99), st.sampled_from([1, 1 << 20]))
def test_every_sequence_attends_to_its_keys_and_to_no_others(
    sizes: list[tuple[int, int, int]], seed: int, gather_bytes: int
) -> None:
    setup = Setup(sizes, seed)
    usual, torch_paged.GATHER_BYTES = torch_paged.GATHER_BYTES, gather_bytes
    try:
        outputs = setup.run(list(range(len(sizes))))
    finally:
        torch_paged.GATHER_BYTES = usual
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output, setup.slow(index)[0], atol=1e-5, rtol=1e-5)


def test_neighbours_change_no_bit() -> None:
    setup = Setup([(20, 12, 1), (17, 0, 1), (19, 3, 1), (8, 7, 2)], 3)
    assert TorchAttention.batch_invariant
    together = setup.run([0, 1, 2, 3])
    for index, output in enumerate(together):
        assert torch.equal(setup.run([index])[0], output)


@pytest.mark.parametrize("first", [0, 11])
def test_a_sequence_can_be_scored_in_several_ways_at_once(first: int) -> None:
    setup = Setup([(9, 4, 1), (20, first, 1)], 5)
    rows, keys = torch.tensor([1, 5]), torch.tensor([0, 2, 7])
    by_row, averaged = (AttentionScores(rows, keys, HEADS, range(1), averaged=mean) for mean in (False, True))
    setup.run([0, 1], ((1, by_row), (1, averaged)))
    expected = setup.slow(1)[1].mean(0)[rows][:, keys]
    torch.testing.assert_close(by_row.by_row(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(averaged.by_row(), expected.mean(0, keepdim=True), atol=1e-6, rtol=1e-5)


def test_kernels_get_lengths_as_tensors() -> None:
    layout = Setup([(20, 12, 1), (17, 0, 1), (8, 7, 2)], 1).layout([0, 1, 2])
    assert in_place(layout) == [0, 1], "the third reads every second one of its slots"
    batch = paged_batch(layout, [0, 1])
    assert batch.rows is not None
    assert batch.rows.tolist() == list(range(25))
    assert batch.query_starts.tolist() == [0, 8, 25]
    assert batch.kv_lengths.tolist() == [20, 17]
    assert batch.block_table.tolist() == layout.block_tables[:2, : blocks_needed(20, BLOCK_SIZE)].tolist()
