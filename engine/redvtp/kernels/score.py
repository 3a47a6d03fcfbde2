"""Attention of scored rows to visual tokens for a whole batch, over row-major pages that are read in place.

    work = scoring_work(parts, device)                          once for each packed forward
    lse = log_sum_exp(work, query, keys, scale)                 where the attention kernel gives none
    score_sums(work.of(counted), query, keys, lse, sums, scale) in each layer

A softmax needs its normaliser only: with the log-sum-exp of a row, its attention to a token is
exp(query . key * scale - lse). So nothing of the size rows x tokens is ever stored, and only visual keys are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.device import on_device
from redvtp.kernels.choice import runs_kernels

# Rows and columns of a tile. Constants: the order of additions, and with it the bits, must not depend on the batch.
TILE_ROWS = 32
TILE_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """What is scored of one sequence.

    rows: [rows] int64, packed rows.
    slots: [visual] int64, the slots of its visual tokens.
    table: [blocks] int64. kv_length: its keys, the first ones of those blocks.
    averaged: the rows' attention is summed up over them.
    weight: of a row's attention in one head and layer.
    """

    rows: Tensor
    slots: Tensor
    table: Tensor
    kv_length: int
    averaged: bool
    weight: float

    @property
    def sum_rows(self) -> int:
        """Rows of sums: one for each row; for each tile of rows where they are averaged, since programs that added to
        the same cell would do so in any order."""
        count = self.rows.numel()
        return -(-count // TILE_ROWS) if self.averaged else count

    @property
    def cells(self) -> int:
        return self.sum_rows * self.slots.numel()


@dataclass(frozen=True, slots=True)
class ScoringWork:
    """The parts of a batch as the kernels take them.

    rows: [scored] int64, packed rows of all parts one after another.
    slots: [visual tokens of all parts] int64.
    tables: [parts, blocks] int64, padded with 0.
    row_tiles: [row tiles, 4] int32: first of `rows`, how many, part, kv_length.
    tiles: [tiles, 7] int32: first of `rows`, how many, first of `slots`, how many, first cell of the sums, cells in a
        row of them, whether rows are summed up.
    weights: [tiles] float32.
    ends: for each part, the tile behind its last one.
    """

    parts: tuple[ScoredPart, ...]
    rows: Tensor
    slots: Tensor
    tables: Tensor
    row_tiles: Tensor
    tiles: Tensor
    weights: Tensor
    ends: tuple[int, ...]

    @property
    def cells(self) -> int:
        return sum(part.cells for part in self.parts)

    def tiles_of(self, counted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`tiles` and `weights` of some parts."""
        if len(counted) == len(self.parts):
            return self.tiles, self.weights
        ranges = [slice(self.ends[index - 1] if index else 0, self.ends[index]) for index in counted]
        return torch.cat([self.tiles[own] for own in ranges]), torch.cat([self.weights[own] for own in ranges])


def scoring_work(parts: Sequence[ScoredPart]) -> ScoringWork:
    """parts: at least one."""
    device = parts[0].rows.device
    row_tiles: list[list[int]] = []
    tiles: list[list[int]] = []
    weights: list[float] = []
    ends: list[int] = []
    row = slot = cell = 0
    for index, part in enumerate(parts):
        rows, visual = part.rows.numel(), part.slots.numel()
        for number, first in enumerate(range(0, rows, TILE_ROWS)):
            count = min(TILE_ROWS, rows - first)
            row_tiles.append([row + first, count, index, part.kv_length])
            sums = cell + (number if part.averaged else first) * visual
            for column in range(0, visual, TILE_COLUMNS):
                width = min(TILE_COLUMNS, visual - column)
                tiles.append([row + first, count, slot + column, width, sums + column, visual, int(part.averaged)])
        weights += [part.weight] * (len(tiles) - len(weights))
        ends.append(len(tiles))
        row, slot, cell = row + rows, slot + visual, cell + part.cells
    return ScoringWork(
        tuple(parts),
        torch.cat([part.rows for part in parts]),
        torch.cat([part.slots for part in parts]),
        torch.nn.utils.rnn.pad_sequence([part.table for part in parts], batch_first=True),
        on_device(row_tiles, torch.int32, device),
        on_device(tiles, torch.int32, device),
        on_device(weights, torch.float32, device),
        tuple(ends),
    )


def log_sum_exp(work: ScoringWork, query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[scored, heads] float32, of each scored row's logits over all keys of its sequence.

    query: [rows, heads, head_dim], packed. keys: [blocks, block_size, kv_heads, head_dim], one layer's pages.
    """
    if runs_kernels(query):
        from redvtp.kernels import triton_score

        return triton_score.log_sum_exp(query, keys, work.rows, work.tables, work.row_tiles, scale)
    return log_sum_exp_in_torch(work, query, keys, scale)


def score_sums(
    work: ScoringWork, counted: Sequence[int], query: Tensor, keys: Tensor, lse: Tensor, sums: Tensor, scale: float
) -> None:
    """Add one layer's attention, summed over heads and weighted, for the parts `counted`.

    query, keys: see `log_sum_exp`.
    lse: [scored, heads] float32.
    sums: [work.cells] float32; each part has [sum_rows, visual] of it.
    """
    if runs_kernels(query):
        from redvtp.kernels import triton_score

        tiles, weights = work.tiles_of(counted)
        triton_score.score_sums(query, keys, work.rows, work.slots, lse, tiles, weights, sums, scale)
    else:
        score_sums_in_torch(work, counted, query, keys, lse, sums, scale)


def log_sum_exp_in_torch(work: ScoringWork, query: Tensor, keys: Tensor, scale: float) -> Tensor:
    block_size = keys.shape[1]
    found = []
    for part in work.parts:
        blocks = part.table[: -(-part.kv_length // block_size)]
        own = keys[blocks].flatten(0, 1)[: part.kv_length]
        found.append(_logits(query[part.rows], own, scale).logsumexp(-1).T)
    return torch.cat(found)


def score_sums_in_torch(
    work: ScoringWork, counted: Sequence[int], query: Tensor, keys: Tensor, lse: Tensor, sums: Tensor, scale: float
) -> None:
    normalisers = lse.split([part.rows.numel() for part in work.parts])
    cells = sums.split([part.cells for part in work.parts])
    for index in counted:
        part = work.parts[index]
        logits = _logits(query[part.rows], keys.flatten(0, 1)[part.slots], scale)
        seen = (logits - normalisers[index].T[:, :, None]).exp_().sum(0) * part.weight
        own = cells[index].view(part.sum_rows, -1)
        if part.averaged:
            seen = torch.stack([tile.sum(0) for tile in seen.split(TILE_ROWS)])
        own += seen


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[heads, rows, keys] float32. query: [rows, heads, head_dim]; key: [keys, kv_heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().permute(1, 2, 0).repeat_interleave(group, 0)
    return query.float().transpose(0, 1) @ keys * scale
