"""One picture as the model gets it: patches tile by tile, and its visual tokens in the order of LLaDA-V's merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.glyphs import CELL
from training.model import HINTS
from training.scenes import Item, Kind, Scene
from training.tasks import KEY, VALUE
from training.vocab import COLORS, GLYPHS

SIDE = 4
PATCHES = SIDE * SIDE
# "No label": torch's cross entropy leaves such rows out.
IGNORE = -100


def normalised(patches: Tensor) -> Tensor:
    """Bytes to [-1, 1], as the engine's tiling does."""
    return patches.float() * (2 / 255) - 1


def picture_patches(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[tiles, 16, 768]: the squashed whole picture first, then its tiles row by row; channels, rows, columns."""
    tile = SIDE * CELL
    base = np.asarray(Image.fromarray(picture).resize((tile, tile), Image.Resampling.BICUBIC))
    return np.concatenate([_cut(base), _cut(picture)]).reshape(-1, PATCHES, 3 * CELL * CELL)


def _cut(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tile = SIDE * CELL
    rows, cols = picture.shape[0] // tile, picture.shape[1] // tile
    parts = picture.reshape(rows, SIDE, CELL, cols, SIDE, CELL, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return parts.reshape(rows * cols, PATCHES, 3 * CELL * CELL)


def by_tile(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """[rows, cols, ...] per cell to [tiles, 16, ...]."""
    rows, cols = cells.shape[0] // SIDE, cells.shape[1] // SIDE
    parts = cells.reshape(rows, SIDE, cols, SIDE, *cells.shape[2:]).swapaxes(1, 2)
    return parts.reshape(rows * cols, PATCHES, *cells.shape[2:])


@dataclass
class VisualTokens:
    """A picture's visual tokens in reading order.

    source: [visual], within the picture's own patches (newline: -1). hints: [visual, hints], IGNORE where none. shown:
    [visual], part of an item. tile: [visual], which tile it is of (newline: -1).
    """

    source: NDArray[np.int64]
    hints: NDArray[np.int64]
    shown: NDArray[np.bool_]
    tile: NDArray[np.int64]


def _key_and_value(item: Item | None) -> tuple[int, int]:
    """An item's color or name, and its first character or shape, as answers to the hints of the item before it."""
    if item is None:
        return 0, 0
    key = len(COLORS) + item.name if item.name else item.color
    return key, len(GLYPHS) + item.shape if item.shape else 1 + GLYPHS.index(item.text[0])


def _hints(scene: Scene) -> NDArray[np.int64]:
    """[rows, cols, hints] of the cells."""
    hints = np.full((scene.rows, scene.cols, len(HINTS)), IGNORE)
    kinds: tuple[Kind, ...] = ("box", "shape", "sign", "field")
    for kind in kinds:
        items = scene.of(kind)
        for number, item in enumerate(items):
            following = _key_and_value(items[number + 1] if number + 1 < len(items) else None)
            for place, cell in enumerate(item.cells):
                owner = item.name - 1 if kind == "field" and not cell.name else IGNORE
                hints[cell.row, cell.col, :4] = (min(number, HINTS["rank"] - 1), owner, *following)
                if kind in ("sign", "field"):
                    # Two cells of a form line are its name.
                    hints[cell.row, cell.col, 6] = KEY if cell.name else VALUE + place - 2 * (kind == "field")
    return hints


def visual_tokens(scene: Scene) -> VisualTokens:
    """The layout LLaDA-V's merge gives a picture of whole tiles."""
    rows, cols = scene.rows, scene.cols
    row, col = np.mgrid[0:rows, 0:cols]
    tile = 1 + row // SIDE * (cols // SIDE) + col // SIDE
    source = tile * PATCHES + row % SIDE * SIDE + col % SIDE

    def with_line_ends(grid: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        closed = np.concatenate((grid, np.full((rows, 1, *grid.shape[2:]), end)), axis=1)
        return closed.reshape(-1, *grid.shape[2:])

    hints = np.concatenate((np.full((PATCHES, len(HINTS)), IGNORE), with_line_ends(_hints(scene), IGNORE)))
    return VisualTokens(
        np.concatenate((np.arange(PATCHES), with_line_ends(source, -1))),
        hints,
        (hints != IGNORE).any(1),
        np.concatenate((np.zeros(PATCHES, dtype=np.int64), with_line_ends(tile, -1))),
    )
