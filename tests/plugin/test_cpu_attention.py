"""vLLM's CPU attention kernel and its pages, against the engine's torch backend and row-major pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import cpu_only
from redvtp.attention.interface import AttentionBackend, LayerAttention, layer_attention
from redvtp.attention.layout import Layout, Span
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.blocks import blocks_needed, padded_block_tables, slots_of, slots_of_tables
from redvtp.kv.compaction import compact, plan_compaction
from redvtp.kv.pages import KVPages, PagedKVCache
from redvtp.kv.rotary import Rotary
from vllm_redvtp.attention.cpu_kernel import CpuAttention, CpuPrepared
from vllm_redvtp.attention.packed_pages import PackedKVCache

pytestmark = cpu_only

# Of the outputs, which are means of values around 1.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
# Query heads, key heads, head_dim, block_size.
SHAPES = [(4, 4, 32, 32), (4, 2, 64, 32), (6, 2, 32, 64), (2, 2, 128, 128)]


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence before it has a place in a batch. first, end: tokens it computes; holes: tokens that are not read.
    read: tokens that are, if not all."""

    length: int
    first: int
    end: int
    table: Tensor
    holes: int = 0
    read: int | None = None

    @property
    def rows(self) -> int:
        return self.end - self.first

    def span(self, start: int) -> Span:
        length = self.length if self.read is None else self.read
        rows = torch.arange(self.holes, length) if self.holes else None
        reads = self.rows < self.length
        return Span(start, start + self.rows, length - self.holes * reads, reads, rows if reads else None, self.end)


class Setup:
    """The same random keys and values in both kinds of pages, behind random block tables."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
        self.heads, self.kv_heads, self.head_dim, self.block_size = shape
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.packed = PackedKVCache(1, 40, self.block_size, self.kv_heads, self.head_dim, dtype)
        self.plain = PagedKVCache(1, 40, self.block_size, self.kv_heads, self.head_dim, dtype)
        everything = torch.arange(40 * self.block_size)
        key, value = self.random(everything.numel(), self.kv_heads), self.random(everything.numel(), self.kv_heads)
        for cache in (self.packed, self.plain):
            cache.write(0, everything, key, value)
        self._free = torch.randperm(40, generator=self.generator).tolist()

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, self.head_dim, generator=self.generator).to(self.dtype)

    def part(self, length: int, first: int, holes: int = 0, behind: int = 0) -> Part:
        """behind: tokens that are read and come after those that are computed."""
        table = torch.tensor([self._free.pop() for _ in range(blocks_needed(length, self.block_size))])
        return Part(length, first, length - behind, table, holes)

    def inputs(self, parts: list[Part]) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (self.random(rows, self.heads), self.random(rows, self.kv_heads), self.random(rows, self.kv_heads))
            for rows in (part.rows for part in parts)
        ]

    def layout(self, parts: list[Part], scores: tuple[tuple[int, AttentionScores], ...] = ()) -> Layout:
        spans: list[Span] = []
        for part in parts:
            spans.append(part.span(spans[-1].end if spans else 0))
        tables = padded_block_tables([part.table.tolist() for part in parts], torch.device("cpu"))
        slots = slots_of_tables(tables, self.block_size).unbind(0)
        written = torch.cat([own[part.first : part.end] for own, part in zip(slots, parts, strict=True)])
        return Layout(tuple(spans), tables, slots, self.block_size, written, scores)

    def prepared(self, layout: Layout) -> CpuPrepared:
        return CpuAttention(self.packed, self.heads, self.head_dim**-0.5).prepare(layout)

    def kernel(self, parts: list[Part]) -> LayerAttention:
        return self._over(CpuAttention(self.packed, self.heads, self.head_dim**-0.5), parts)

    def reference(self, parts: list[Part]) -> LayerAttention:
        return self._over(TorchAttention(self.plain, self.head_dim**-0.5), parts)

    def _over(self, backend: AttentionBackend, parts: list[Part]) -> LayerAttention:
        return layer_attention(backend.prepare(self.layout(parts)))


def _packed(inputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.cat(tensors) for tensors in zip(*inputs, strict=True))
    return query, key, value


def _both_pages_hold_the_same(setup: Setup) -> None:
    everything = torch.arange(40 * setup.block_size)
    for ours, theirs in zip(setup.packed.read(0, everything), setup.plain.read(0, everything), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(TOLERANCE)),
    sizes=st.lists(
        st.tuples(st.integers(1, 150), st.floats(0, 1), st.integers(0, 9), st.sampled_from([0, 0, 0.3, 0.9])),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_kernel_equals_the_reference_over_any_mix_of_steps(
    shape: tuple[int, int, int, int], dtype: torch.dtype, sizes: list[tuple[int, float, int, float]], seed: int
) -> None:
    """Full steps, response steps of any length, in the middle too, and, as nobody's prefix, some of a sequence's
    slots."""
    setup = Setup(shape, dtype, seed)
    parts = [
        setup.part(
            length,
            first := int(share * (length - 1)),
            holes if first > holes > 6 else 0,
            int(behind * (length - first)),
        )
        for length, share, holes, behind in sizes
    ]
    inputs = _packed(setup.inputs(parts))
    found, expected = setup.kernel(parts)(0, *inputs), setup.reference(parts)(0, *inputs)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)


def test_response_steps_run_on_the_kernel_and_the_rest_on_torch() -> None:
    setup = Setup(SHAPES[0], torch.float32, 0)
    parts = [
        setup.part(70, 0),
        setup.part(100, 90),
        setup.part(64, 40, holes=5),
        setup.part(33, 32),
        setup.part(90, 50, behind=17),
    ]
    assert [parts[work.index].rows for work in setup.prepared(setup.layout(parts)).calls] == [10, 1, 23]


def test_keys_behind_those_that_are_read_stay() -> None:
    """Nobody reads so today; the slots that are cleared for the kernel must then not be somebody's."""
    setup = Setup(SHAPES[0], torch.float32, 6)
    part = setup.part(90, 60)
    parts, inputs = [replace(part, read=70)], _packed(setup.inputs([part]))
    found, expected = setup.kernel(parts)(0, *inputs), setup.reference(parts)(0, *inputs)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[torch.float32], rtol=0)
    _both_pages_hold_the_same(setup)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_segments_output_does_not_depend_on_its_neighbours(shape: tuple[int, int, int, int], threads: int) -> None:
    """Bit for bit: the kernel's own division of a batch among threads would show in the last ones."""
    torch.set_num_threads(threads)
    try:
        setup = Setup(shape, torch.float32, 5)
        parts = [setup.part(300, 268), setup.part(77, 0), setup.part(280, 267), setup.part(40, 7), setup.part(310, 246)]
        inputs = setup.inputs(parts)
        together = setup.kernel(parts)(0, *_packed(inputs))
        for part, own, found in zip(parts, inputs, together.split([part.rows for part in parts]), strict=True):
            assert torch.equal(setup.kernel([part])(0, *own), found)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rubbish", [float("inf"), float("nan")])
def test_what_a_former_owner_left_in_a_block_is_not_seen(rubbish: float) -> None:
    setup = Setup(SHAPES[0], torch.float32, 3)
    part = setup.part(70, 50)
    inputs = _packed(setup.inputs([part]))
    expected = setup.kernel([part])(0, *inputs)
    behind = slots_of(part.table, 70, 96, setup.block_size)
    left = torch.full((26, setup.kv_heads, setup.head_dim), rubbish)
    setup.packed.write(0, behind, left, left)
    assert torch.equal(setup.kernel([part])(0, *inputs), expected)


def test_scored_segments_are_scored_alike() -> None:
    setup = Setup(SHAPES[1], torch.float32, 9)
    parts = [setup.part(90, 60), setup.part(50, 40)]
    inputs = _packed(setup.inputs(parts))
    scored = []
    scale = setup.head_dim**-0.5
    backends: list[AttentionBackend] = [
        CpuAttention(setup.packed, setup.heads, scale),
        TorchAttention(setup.plain, scale),
    ]
    for backend in backends:
        scores = AttentionScores(torch.arange(4, 30), torch.arange(20), setup.heads, range(1))
        layer_attention(backend.prepare(setup.layout(parts, ((0, scores),))))(0, *inputs)
        scored.append(scores.by_row())
    assert torch.equal(*scored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    setup = Setup(shape, dtype, 1)
    _both_pages_hold_the_same(setup)
    slots = torch.randperm(40 * setup.block_size, generator=setup.generator)[:77]
    key, value = setup.random(77, setup.kv_heads), setup.random(77, setup.kv_heads)
    for cache in (setup.packed, setup.plain):
        cache.write(0, slots, key, value)
        cache.write(0, slots[:0], key[:0], value[:0])
    _both_pages_hold_the_same(setup)


@settings(max_examples=30)
@given(data=st.data())
def test_compaction_moves_packed_pages_like_any_others(data: st.DataObject) -> None:
    """Bit for bit, of the sequence and of all others; so it equals a fresh write as theirs does (test_compaction)."""
    setup = Setup(
        data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(list(TOLERANCE))), data.draw(st.integers(0, 99))
    )
    length = data.draw(st.integers(1, 300))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))
    positions = torch.arange(kept.numel()) if data.draw(st.booleans()) else kept
    plan = plan_compaction(setup.part(length, 0).table, kept, kept, positions, setup.block_size)
    caches: list[KVPages] = [setup.packed, setup.plain]
    for cache in caches:
        compact(cache, plan, Rotary(setup.head_dim, 1e4))
    _both_pages_hold_the_same(setup)


def test_compacted_pages_equal_freshly_written_ones() -> None:
    setup = Setup(SHAPES[1], torch.float32, 4)
    part = setup.part(200, 0)
    kept = torch.arange(0, 200, 3)
    survivors = setup.packed.read(0, slots_of(part.table, 0, 200, setup.block_size))
    fresh = PackedKVCache(1, 40, setup.block_size, setup.kv_heads, setup.head_dim, torch.float32)
    slots = slots_of(part.table, 0, kept.numel(), setup.block_size)
    fresh.write(0, slots, survivors[0][kept], survivors[1][kept])
    compact(setup.packed, plan_compaction(part.table, kept, kept, kept, setup.block_size), Rotary(64, 1e4))
    whole = part.table[: kept.numel() // setup.block_size]
    assert torch.equal(setup.packed.keys[0][whole], fresh.keys[0][whole])
    assert torch.equal(setup.packed.values[0][whole], fresh.values[0][whole])
