"""Compaction: survivors' keys and values in the pages equal a fresh cache written with the survivors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redvtp.kv.blocks import BlockPool, blocks_needed, padded_block_tables, slots_of, slots_of_tables
from redvtp.kv.compaction import compact, plan_compaction
from redvtp.kv.pages import PagedKVCache
from redvtp.kv.rotary import Rotary

HEADS, HEAD_DIM, LAYERS = 2, 8, 2


@settings(deadline=None)
@given(st.data())
def test_compacted_and_turned_keys_equal_keys_computed_afresh(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 4, 16]))
    tokens = data.draw(st.integers(1, 90))
    positions_change = data.draw(st.booleans())
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    needed = blocks_needed(tokens, block_size)
    table = torch.randperm(needed + 3, generator=generator)[:needed]
    rotary = Rotary(HEAD_DIM, 500000.0)
    keys = torch.randn(LAYERS, tokens, HEADS, HEAD_DIM, generator=generator)
    values = torch.randn(LAYERS, tokens, HEADS, HEAD_DIM, generator=generator)
    old = torch.arange(tokens)
    new = torch.arange(kept.numel()) if positions_change else old[kept]

    cache = PagedKVCache(LAYERS, needed + 3, block_size, HEADS, HEAD_DIM, torch.float32)
    for layer in range(LAYERS):
        slots = slots_of(table, 0, tokens, block_size)
        cache.write(layer, slots, rotary.rotate(keys[layer], old), values[layer])
    others = torch.ones((needed + 3) * block_size, dtype=torch.bool)
    others[slots_of(table, 0, tokens, block_size)] = False
    before = cache.keys[0].view(-1, HEADS, HEAD_DIM)[others].clone()

    compact(cache, plan_compaction(table, kept, old[kept], new, block_size), rotary)

    for layer in range(LAYERS):
        key, value = cache.read(layer, slots_of(table, 0, kept.numel(), block_size))
        torch.testing.assert_close(key, rotary.rotate(keys[layer][kept], new), atol=2e-6, rtol=2e-6)
        assert torch.equal(value, values[layer][kept])
    assert torch.equal(cache.keys[0].view(-1, HEADS, HEAD_DIM)[others], before), "other sequences' pages are untouched"


def test_original_positions_move_keys_without_changing_a_bit() -> None:
    cache = PagedKVCache(1, 4, 4, HEADS, HEAD_DIM, torch.bfloat16)
    key = torch.randn(16, HEADS, HEAD_DIM).bfloat16()
    table = torch.tensor([2, 0, 3, 1])
    cache.write(0, slots_of(table, 0, 16, 4), key, key)
    kept = torch.tensor([0, 3, 7, 15])
    compact(cache, plan_compaction(table, kept, kept, kept, 4), Rotary(HEAD_DIM, 1e4))
    moved, _ = cache.read(0, slots_of(table, 0, 4, 4))
    assert torch.equal(moved, key[kept])


@given(st.lists(st.integers(0, 6), max_size=30))
def test_the_pool_never_hands_out_a_block_twice(sizes: list[int]) -> None:
    pool = BlockPool(16)
    held: list[list[int]] = []
    for size in sizes:
        blocks = pool.allocate(size)
        if blocks is None:
            assert size > pool.num_free
            if held:
                pool.free(held.pop(0))
            continue
        held.append(blocks)
        taken = [block for blocks in held for block in blocks]
        assert len(set(taken)) == len(taken)
        assert pool.num_free + len(taken) == 16


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_blocks_needed(tokens: int, blocks: int) -> None:
    assert blocks_needed(tokens, 32) == blocks


def test_slots_of_a_batch_are_the_slots_of_each() -> None:
    tables, lengths = [[4, 1, 7], [3], [], [0, 9]], [11, 2, 0, 8]
    together = slots_of_tables(padded_block_tables(tables, torch.device("cpu")), 4)
    for table, length, slots in zip(tables, lengths, together, strict=True):
        assert slots[:length].tolist() == slots_of(torch.tensor(table, dtype=torch.int64), 0, length, 4).tolist()
