"""Drawing of scenes: the atlas of version 1 with more words, and items of 2 x 2 cells at twice the size."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from training.glyphs import CELL, Masks, atlas, word_masks
from training.v2.vocab import NAMES, WORDS
from training.v2.world import ALONE, CORNERS, LEFT, Cell, Scene

_RGB = np.array(
    [
        *([205, 45, 45], [50, 150, 60], [50, 80, 205], [230, 205, 50], [125, 50, 165]),
        *([240, 135, 30], [60, 200, 215], [245, 150, 190], [120, 75, 40]),
    ],
    dtype=np.float32,
)
# Digits and letters are drawn in white on these, in black on the others.
_DARK = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1], dtype=bool)
_LIGHT_INK, _DARK_INK, _COMB_GREY = 245, 20, 110
_NOISE = np.random.default_rng(20_240_604).standard_normal((400, 400, 3)).astype(np.float32)


@cache
def _words() -> tuple[Masks, ...]:
    """[n, 16, 32] per word of WORDS; version 1's names look as they did there."""
    rng = np.random.default_rng(20_240_611)
    return (*atlas("train").names, *(word_masks(word, rng) for word in WORDS[len(NAMES) :]))


def _doubled(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """[16, 16] -> [32, 32], bilinear."""
    for axis in (0, 1):
        mask = np.repeat(mask, 2, axis=axis)
        padded = np.concatenate((mask.take([0], axis), mask, mask.take([-1], axis)), axis)
        count = mask.shape[axis]
        before, after = padded.take(range(count), axis), padded.take(range(2, count + 2), axis)
        mask = (0.5 * mask + 0.25 * (before + after)).astype(np.float32)
    return mask


def _pick(variants: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    picked: NDArray[np.float32] = variants[number % len(variants)]
    return picked


class _Stamps:
    """What is put on each cell of a picture: a fill and an ink, each a mask and a color."""

    def __init__(self, cells: list[Cell], scene: Scene, rng: np.random.Generator) -> None:
        count = len(cells)
        self.fill = np.zeros((count, CELL, CELL, 1), dtype=np.float32)
        self.ink = np.zeros_like(self.fill)
        self.fill_rgb = np.zeros((count, 1, 1, 3), dtype=np.float32)
        self.ink_rgb = np.zeros_like(self.fill_rgb)
        self.masks = atlas(scene.split)
        self.pen = rng.uniform(10, 70, 3).astype(np.float32)
        picks = rng.integers(0, 1 << 30, (count, 2)).tolist()
        tints = rng.uniform(-14, 14, (count, 3)).astype(np.float32)
        for i, cell in enumerate(cells):
            # The cells of a large item and the halves of a word come from one drawing.
            first = i - CORNERS.index(cell.part) if cell.part in CORNERS else i
            first = i - (cell.part - LEFT) // 2 if cell.name else first
            self._stamp(i, cell, picks[first][0], picks[first][1], tints[first])

    def _stamp(self, i: int, cell: Cell, pick: int, plate: int, tint: NDArray[np.float32]) -> None:
        masks = self.masks
        if cell.color:
            self.fill_rgb[i] = _RGB[cell.color - 1] + tint
            self.ink_rgb[i] = _LIGHT_INK if _DARK[cell.color - 1] else _DARK_INK
            if cell.part in CORNERS:
                self._corner(i, cell, pick, plate)
            elif cell.shape:
                self.fill[i, :, :, 0] = _pick(masks.shapes[cell.shape - 1], pick)
            elif cell.part == ALONE:
                self.fill[i, :, :, 0] = _pick(masks.box, plate)
                self.ink[i, :, :, 0] = _pick(masks.handwriting[cell.glyph - 1], pick)
            else:
                self.fill[i, :, :, 0] = _pick(masks.sign, plate)[cell.part - LEFT]
                self.ink[i, :, :, 0] = _pick(masks.printed[cell.glyph - 1], pick)
        elif cell.name:
            half = slice(0, CELL) if cell.part == LEFT else slice(CELL, None)
            self.ink[i, :, :, 0] = _pick(_words()[cell.name - 1], pick)[:, half]
            self.ink_rgb[i] = self.pen
        else:
            self.fill[i, :, :, 0] = _pick(masks.comb, plate)[cell.part - LEFT]
            self.ink[i, :, :, 0] = _pick(masks.printed[cell.glyph - 1], pick)
            self.fill_rgb[i] = _COMB_GREY
            self.ink_rgb[i] = self.pen

    def _corner(self, i: int, cell: Cell, pick: int, plate: int) -> None:
        """A quarter of an item of 2 x 2 cells; its digit is printed."""
        corner = CORNERS.index(cell.part)
        rows = slice(0, CELL) if corner < 2 else slice(CELL, None)
        cols = slice(CELL, None) if corner % 2 else slice(0, CELL)
        if cell.shape:
            self.fill[i, :, :, 0] = _doubled(_pick(self.masks.shapes[cell.shape - 1], pick))[rows, cols]
            return
        self.fill[i, :, :, 0] = _doubled(_pick(self.masks.box, plate))[rows, cols]
        self.ink[i, :, :, 0] = _doubled(_pick(self.masks.printed[cell.glyph - 1], pick))[rows, cols]


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture: [height, width, 3] bytes."""
    rng = np.random.default_rng(scene.seed)
    height, width = scene.rows * CELL, scene.cols * CELL
    paper = rng.uniform(215, 250) + rng.uniform(-8, 8, 3)
    slope = rng.uniform(-10, 10, 2)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = paper.astype(np.float32)
    canvas += (slope[0] * np.linspace(-1, 1, height, dtype=np.float32))[:, None, None]
    canvas += (slope[1] * np.linspace(-1, 1, width, dtype=np.float32))[None, :, None]
    cells = [cell for item in scene.items for cell in item.cells]
    if cells:
        stamps = _Stamps(cells, scene, rng)
        by_cell = canvas.reshape(scene.rows, CELL, scene.cols, CELL, 3).transpose(0, 2, 1, 3, 4)
        where = (np.array([cell.row for cell in cells]), np.array([cell.col for cell in cells]))
        drawn = by_cell[where]
        drawn += stamps.fill * (stamps.fill_rgb - drawn)
        drawn += stamps.ink * (stamps.ink_rgb - drawn)
        by_cell[where] = drawn
    y, x = rng.integers(0, 400 - height + 1), rng.integers(0, 400 - width + 1)
    canvas += np.float32(rng.uniform(0, 6)) * _NOISE[y : y + height, x : x + width]
    picture: NDArray[np.uint8] = np.clip(canvas, 0, 255).astype(np.uint8)
    return picture
