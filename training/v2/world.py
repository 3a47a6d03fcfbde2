"""What a picture shows: cells, items and scenes, and samples of one or several pictures.

A scene is a grid of 16 x 16 pixel cells, each the patch of one visual token. Questions (`questions`), drawing (`draw`)
and what each visual token shows (`labels`) are all read off the scene, never off pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.glyphs import CELL, Split

# box: a digit on a color. shape. sign: a code on a color. field: a form line. head, side, entry: a table's column name,
# row name and number. word: of a page.
Kind = Literal["box", "shape", "sign", "field", "head", "side", "entry", "word"]
# What a sample was made as, which decides what is asked about it.
Family = Literal["sparse", "objects", "form", "table", "page", "signs", "pair", "clip"]

ATTRIBUTES = ("color", "glyph", "shape", "name", "part")
# "part" of a cell: nothing, alone, of a run of cells, corner of an item of 2 x 2 cells, of the squashed whole picture.
ALONE, LEFT, MIDDLE, RIGHT = 1, 2, 3, 4
CORNERS = (5, 6, 7, 8)
BASE = 9
PARTS = 9


@dataclass(frozen=True, slots=True)
class Cell:
    """One drawn cell. Attributes are label numbers: 0 is none, i + 1 the i-th word of `training.v2.vocab`."""

    row: int
    col: int
    color: int = 0
    glyph: int = 0
    shape: int = 0
    name: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """Something a question can be about. color, shape, name, column: label numbers; text: digit, code or number.

    name: of a form line, of a table's row, or the word itself. column: name of an entry's column. line: the row of a
    table or the line of a page, from 0; place: the number within it.
    """

    kind: Kind
    cells: tuple[Cell, ...]
    color: int = 0
    shape: int = 0
    name: int = 0
    column: int = 0
    text: str = ""
    line: int = 0
    place: int = 0

    @property
    def at(self) -> tuple[int, int]:
        return self.cells[0].row, self.cells[0].col


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture. Items of each kind stand in reading order. seed: of the drawing (fonts, noise, writers)."""

    cols: int
    rows: int
    items: tuple[Item, ...]
    seed: tuple[int, ...]
    split: Split

    def of(self, kind: Kind) -> list[Item]:
        return [item for item in self.items if item.kind == kind]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.cols * CELL, self.rows * CELL

    @property
    def visual(self) -> int:
        """Visual tokens when it is served alone: the squashed picture's 16, its cells, one newline a row."""
        return 16 + self.rows * (self.cols + 1)

    @property
    def content(self) -> int:
        """Visual tokens that carry a part of an item."""
        return sum(len(item.cells) for item in self.items)


@dataclass(frozen=True, slots=True)
class Sample:
    """The pictures of one request. Several are served as one tile of 4 x 4 cells each, without newline tokens.

    motion: where the moving box of a clip goes, an index of DIRECTIONS, or -1.
    """

    family: Family
    scenes: tuple[Scene, ...]
    motion: int = -1


def labels(scene: Scene) -> NDArray[np.int64]:
    """What each cell shows: [rows, cols, attributes] label numbers, in the order of ATTRIBUTES."""
    shown = np.zeros((scene.rows, scene.cols, len(ATTRIBUTES)), dtype=np.int64)
    for item in scene.items:
        for cell in item.cells:
            shown[cell.row, cell.col] = (cell.color, cell.glyph, cell.shape, cell.name, cell.part)
    return shown


def base_labels(scene: Scene) -> NDArray[np.int64]:
    """[16, attributes] of the squashed picture, 4 x 4: the commonest color below each token, nothing readable."""
    colors = labels(scene)[..., 0]
    base = np.zeros((4, 4, len(ATTRIBUTES)), dtype=np.int64)
    height, width = scene.rows // 4, scene.cols // 4
    blocks = colors.reshape(4, height, 4, width).transpose(0, 2, 1, 3).reshape(4, 4, height * width)
    for row in range(4):
        for col in range(4):
            counts = np.bincount(blocks[row, col], minlength=10)[1:]
            if counts.any():
                base[row, col, 0] = 1 + int(counts.argmax())
    base[..., 4] = BASE
    return base.reshape(16, len(ATTRIBUTES))
