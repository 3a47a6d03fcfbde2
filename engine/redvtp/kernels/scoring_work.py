"""What is scored in a batch, cut into tiles: one program of a kernel works on one tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.device import on_device

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
