"""Triton kernels of `redvtp.kernels.score`: the log-sum-exp of scored rows, and the sums of their attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redvtp.kernels.scoring_work import TILE_COLUMNS, TILE_ROWS


@triton.jit
def _log_sum_exp_kernel(
    query, keys, rows, tables, tiles, out, scale, heads, group, head_dim, block_size, query_row_stride,
    query_head_stride, key_slot_stride, key_head_stride, table_stride, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of one sequence, one head, all keys of the sequence."""
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    first_row = tl.load(tile)
    row_count = tl.load(tile + 1)
    sequence = tl.load(tile + 2)
    kv_length = tl.load(tile + 3)
    r = tl.arange(0, TILE_R)
    c = tl.arange(0, TILE_C)
    d = tl.arange(0, TILE_D)
    in_rows = r < row_count
    row = tl.load(rows + first_row + r, mask=in_rows, other=0)
    q = tl.load(
        query + row[:, None] * query_row_stride + head * query_head_stride + d[None, :],
        mask=in_rows[:, None] & (d[None, :] < head_dim),
        other=0.0,
    )
    highest = tl.full([TILE_R], float("-inf"), tl.float32)
    total = tl.zeros([TILE_R], tl.float32)
    for start in range(0, kv_length, TILE_C):
        token = start + c
        in_keys = token < kv_length
        block = tl.load(tables + sequence * table_stride + token // block_size, mask=in_keys, other=0)
        slot = block.to(tl.int64) * block_size + token % block_size
        k = tl.load(
            keys + slot[None, :] * key_slot_stride + (head // group) * key_head_stride + d[:, None],
            mask=in_keys[None, :] & (d[:, None] < head_dim),
            other=0.0,
        )
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(in_keys[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
    tl.store(out + (first_row + r) * heads + head, highest + tl.log(total), mask=in_rows)


@triton.jit
def _score_sums_kernel(
    query, keys, rows, slots, lse, tiles, weights, sums, scale, heads, group, head_dim, query_row_stride,
    query_head_stride, key_slot_stride, key_head_stride, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and visual tokens of one sequence, all heads."""
    tile = tiles + tl.program_id(0) * 7
    first_row = tl.load(tile)
    row_count = tl.load(tile + 1)
    first_slot = tl.load(tile + 2)
    slot_count = tl.load(tile + 3)
    first_sum = tl.load(tile + 4)
    sum_stride = tl.load(tile + 5)
    averaged = tl.load(tile + 6)
    weight = tl.load(weights + tl.program_id(0))
    r = tl.arange(0, TILE_R)
    c = tl.arange(0, TILE_C)
    d = tl.arange(0, TILE_D)
    in_rows = r < row_count
    in_slots = c < slot_count
    row = tl.load(rows + first_row + r, mask=in_rows, other=0)
    slot = tl.load(slots + first_slot + c, mask=in_slots, other=0)
    seen = tl.zeros([TILE_R, TILE_C], tl.float32)
    for head in range(heads):
        q = tl.load(
            query + row[:, None] * query_row_stride + head * query_head_stride + d[None, :],
            mask=in_rows[:, None] & (d[None, :] < head_dim),
            other=0.0,
        )
        k = tl.load(
            keys + slot[None, :] * key_slot_stride + (head // group) * key_head_stride + d[:, None],
            mask=in_slots[None, :] & (d[:, None] < head_dim),
            other=0.0,
        )
        # exp(-inf): a row behind the tile's last one adds nothing.
        normaliser = tl.load(lse + (first_row + r) * heads + head, mask=in_rows, other=float("inf"))
        seen += tl.exp(tl.dot(q, k, input_precision="ieee") * scale - normaliser[:, None])
    seen *= weight
    if averaged != 0:
        cell = sums + first_sum + c
        tl.store(cell, tl.load(cell, mask=in_slots, other=0.0) + tl.sum(seen, 0), mask=in_slots)
    else:
        cells = sums + first_sum + r[:, None] * sum_stride + c[None, :]
        own = in_rows[:, None] & in_slots[None, :]
        tl.store(cells, tl.load(cells, mask=own, other=0.0) + seen, mask=own)


def log_sum_exp(query: Tensor, keys: Tensor, rows: Tensor, tables: Tensor, tiles: Tensor, scale: float) -> Tensor:
    """See `redvtp.kernels.score.log_sum_exp`."""
    heads, head_dim, block_size = query.shape[1], query.shape[2], keys.shape[1]
    out = torch.empty(rows.numel(), heads, dtype=torch.float32, device=query.device)
    _log_sum_exp_kernel[(tiles.shape[0], heads)](
        query,
        keys,
        rows,
        tables,
        tiles,
        out,
        scale,
        heads,
        heads // keys.shape[2],
        head_dim,
        block_size,
        query.stride(0),
        query.stride(1),
        keys.stride(1),
        keys.stride(2),
        tables.stride(0),
        TILE_R=TILE_ROWS,
        TILE_C=TILE_COLUMNS,
        TILE_D=_padded(head_dim),
    )
    return out


def score_sums(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    slots: Tensor,
    lse: Tensor,
    tiles: Tensor,
    weights: Tensor,
    sums: Tensor,
    scale: float,
) -> None:
    """See `redvtp.kernels.score.score_sums`."""
    heads, head_dim = query.shape[1], query.shape[2]
    _score_sums_kernel[(tiles.shape[0],)](
        query,
        keys,
        rows,
        slots,
        lse,
        tiles,
        weights,
        sums,
        scale,
        heads,
        heads // keys.shape[2],
        head_dim,
        query.stride(0),
        query.stride(1),
        keys.stride(1),
        keys.stride(2),
        TILE_R=TILE_ROWS,
        TILE_C=TILE_COLUMNS,
        TILE_D=_padded(head_dim),
    )


def _padded(head_dim: int) -> int:
    """Tensor-core products need a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(head_dim)))
