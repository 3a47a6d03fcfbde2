"""The Triton kernel of `redvtp.kv.compaction`: rows move to the front of their pages, keys turn to new positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redvtp.device import on_device

# Rows that one program reads before it writes them.
TILE_ROWS = 32
_POINTEES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _move_rows_kernel(
    pages,
    sources,
    destinations,
    shift,
    ends,
    inverse_frequencies,
    slot_stride,
    head_stride,
    half,
    POINTEE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One program: one sequence, one head, the keys or the values of one layer.

    Tiles of rows in ascending order: no row moves back, so no later tile's source is written before it is read.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    base = tl.load(pages + part).to(tl.pointer_type(POINTEE)) + head * head_stride
    first = tl.load(ends + sequence)
    end = tl.load(ends + sequence + 1)
    r = tl.arange(0, TILE_R)
    d = tl.arange(0, TILE_D)
    frequency = tl.load(inverse_frequencies + d, mask=d < half, other=0.0)
    for start in range(first, end, TILE_R):
        row = start + r
        source = tl.load(sources + row, mask=row < end, other=0)
        destination = tl.load(destinations + row, mask=row < end, other=0)
        by = tl.load(shift + row, mask=row < end, other=0)
        moves = (row < end) & ((source != destination) | (by != 0))
        cells = moves[:, None] & (d[None, :] < half)
        read = base + source[:, None] * slot_stride + d[None, :]
        low = tl.load(read, mask=cells, other=0.0).to(tl.float32)
        high = tl.load(read + half, mask=cells, other=0.0).to(tl.float32)
        if part % 2 == 0:
            angle = by.to(tl.float32)[:, None] * frequency[None, :]
            cos = tl.cos(angle)
            sin = tl.sin(angle)
            turned = low * cos - high * sin
            high = high * cos + low * sin
            low = turned
        # All threads have read before one writes: within a tile, a row may go where another comes from.
        tl.debug_barrier()
        write = base + destination[:, None] * slot_stride + d[None, :]
        tl.store(write, low.to(POINTEE), mask=cells)
        tl.store(write + half, high.to(POINTEE), mask=cells)
        tl.debug_barrier()


def move_rows(
    keys: list[Tensor],
    values: list[Tensor],
    sources: Tensor,
    destinations: Tensor,
    shift: Tensor,
    ends: Tensor,
    inverse_frequencies: Tensor,
) -> None:
    """Move rows in the pages of some layers, see `redvtp.kv.compaction.compact`.

    keys, values: for each layer [blocks, block_size, kv_heads, head_dim], all alike.
    sources, destinations: [moved] int64 slots; ascending within a sequence, no destination behind its source.
    shift: [moved] int64, how far each key's position moves.
    ends: [sequences + 1] int32, where each sequence's rows start, and where the last one's end.
    inverse_frequencies: [head_dim / 2] float32.
    """
    like = keys[0]
    addresses = [pages.data_ptr() for layer in zip(keys, values, strict=True) for pages in layer]
    pages = on_device(addresses, torch.int64, like.device)
    half = like.shape[3] // 2
    _move_rows_kernel[(len(addresses), like.shape[2], ends.numel() - 1)](
        pages,
        sources,
        destinations,
        shift,
        ends,
        inverse_frequencies,
        like.stride(1),
        like.stride(2),
        half,
        POINTEE=_POINTEES[like.dtype],
        TILE_R=TILE_ROWS,
        TILE_D=int(triton.next_power_of_2(half)),
    )
