"""Pictures the model is trained on: what is where, and the drawing of it.

A scene is a grid of 16 x 16 cells on paper-like ground, nearly all of them empty. `SceneMaker` invents scenes, `render`
draws them. Every item (a box with a digit, a shape, a sign with a code, a line of a form) knows its cells, so that
questions (`training.tasks`) and what each visual token shows (`labels`) are read off the scene, never off the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.glyphs import CELL, Split, atlas
from training.vocab import COLORS, DIGITS, GLYPHS, LETTERS, NAMES, SHAPES

Kind = Literal["box", "shape", "sign", "field"]

# Cells per canvas: (columns, rows), whole tiles of 4 x 4 cells, so that no pixel is ever resampled but the base tile's.
CANVASES = ((16, 16), (20, 12), (12, 20), (16, 12), (12, 16), (20, 16), (16, 20))
ATTRIBUTES = ("color", "glyph", "shape", "name", "part")
# "part" of a cell: nothing, alone, or left, middle, right of a run of cells.
ALONE, LEFT, MIDDLE, RIGHT = 1, 2, 3, 4
CODE_LENGTH = 3
# Fewest and most digits of a form value.
VALUE_LENGTHS = (3, 3)

_RGB = np.array(
    [
        *([205, 45, 45], [50, 150, 60], [50, 80, 205], [230, 205, 50], [125, 50, 165]),
        *([240, 135, 30], [60, 200, 215], [245, 150, 190], [120, 75, 40]),
    ],
    dtype=np.float32,
)
# Digits and letters are drawn in white on these, in black on the others.
_DARK = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1], dtype=bool)


@dataclass(frozen=True, slots=True)
class Cell:
    """One drawn cell. Attributes are label numbers: 0 is none, i + 1 the i-th word of `training.vocab`."""

    row: int
    col: int
    color: int = 0
    glyph: int = 0
    shape: int = 0
    name: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """Something a question can be about. color, shape, name: label numbers; text: digit, code or value."""

    kind: Kind
    cells: tuple[Cell, ...]
    color: int = 0
    shape: int = 0
    name: int = 0
    text: str = ""

    @property
    def place(self) -> tuple[int, int]:
        return self.cells[0].row, self.cells[0].col


@dataclass(frozen=True, slots=True)
class Scene:
    """Items of each kind stand in reading order. seed: of the drawing (fonts, noise, writers)."""

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


def is_held_out(text: str) -> bool:
    """Whether a code or value is kept for evaluation: about one in eight of all strings."""
    number = 0
    for character in text:
        number = (number * 131 + ord(character)) % 1_000_003
    return number % 8 == 3


@dataclass
class SceneMaker:
    """Invents scenes. items: (fewest, most) boxes or shapes; lines: (fewest, most) form fields or signs.

    mixed: share of scenes with a second kind of thing on them.
    """

    split: Split
    items: tuple[int, int] = (3, 12)
    lines: tuple[int, int] = (2, 7)
    mixed: float = 0.3
    kinds: tuple[Kind, ...] = ("box", "shape", "sign", "field")
    weights: tuple[float, ...] = (0.3, 0.2, 0.2, 0.3)
    canvases: tuple[tuple[int, int], ...] = field(default=CANVASES)

    def make(self, seed: tuple[int, ...]) -> Scene:
        """The same seed gives the same scene."""
        rng = np.random.default_rng(seed)
        cols, rows = self.canvases[int(rng.integers(len(self.canvases)))]
        taken = np.zeros((rows, cols), dtype=bool)
        shares = np.array(self.weights) / sum(self.weights)
        first = self.kinds[int(rng.choice(len(self.kinds), p=shares))]
        kinds: list[Kind] = [first]
        if rng.random() < self.mixed:
            others: list[Kind] = [kind for kind in self.kinds if kind != first]
            if others:
                kinds.append(others[int(rng.integers(len(others)))])
        # Forms first: they need the most room.
        items: list[Item] = []
        for kind in sorted(kinds, key=lambda kind: kind != "field"):
            share = 1.0 if kind == first else 0.5
            items.extend(self._items(kind, share, taken, rng))
        items.sort(key=lambda item: item.place)
        return Scene(cols, rows, tuple(items), (*seed, 1), self.split)

    def _items(self, kind: Kind, share: float, taken: NDArray[np.bool_], rng: np.random.Generator) -> list[Item]:
        low, high = self.items if kind in ("box", "shape") else self.lines
        if kind == "sign":
            high = min(high, 6)
        count = max(1, round(int(rng.integers(low, high + 1)) * share))
        if kind == "field":
            return self._form(count, taken, rng)
        if kind == "sign":
            return self._signs(count, taken, rng)
        first = self._pairs(count, len(COLORS), 10 if kind == "box" else len(SHAPES), rng)
        items = []
        for color, other in first:
            place = _free_run(taken, 1, 1, rng)
            if place is None:
                break
            row, col = place
            if kind == "box":
                cell = Cell(row, col, color=color + 1, glyph=other + 1, part=ALONE)
                items.append(Item("box", (cell,), color=color + 1, text=DIGITS[other]))
            else:
                cell = Cell(row, col, color=color + 1, shape=other + 1, part=ALONE)
                items.append(Item("shape", (cell,), color=color + 1, shape=other + 1))
        return items

    def _pairs(self, count: int, first: int, second: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Different pairs, so that no two items look the same."""
        picked = rng.choice(first * second, size=count, replace=False)
        return [(int(number) // second, int(number) % second) for number in picked]

    def _signs(self, count: int, taken: NDArray[np.bool_], rng: np.random.Generator) -> list[Item]:
        items = []
        for color in rng.permutation(len(COLORS))[:count]:
            place = _free_run(taken, CODE_LENGTH, 1, rng)
            if place is None:
                break
            row, col = place
            code = self._string(LETTERS, CODE_LENGTH, rng)
            cells = tuple(
                Cell(row, col + i, color=int(color) + 1, glyph=GLYPHS.index(letter) + 1, part=_part(i, CODE_LENGTH))
                for i, letter in enumerate(code)
            )
            items.append(Item("sign", cells, color=int(color) + 1, text=code))
        return items

    def _form(self, count: int, taken: NDArray[np.bool_], rng: np.random.Generator) -> list[Item]:
        rows, cols = taken.shape
        spacing = int(rng.integers(1, max(1, min(3, rows // count)) + 1))
        gap = int(rng.integers(0, 3))
        top = int(rng.integers(0, rows - (count - 1) * spacing))
        # One length for all values of a form, so that an answer's place tells which line it belongs to.
        digits = int(rng.integers(VALUE_LENGTHS[0], VALUE_LENGTHS[1] + 1))
        width = 2 + gap + digits
        left = 2 * int(rng.integers(0, (cols - width) // 2 + 1))
        items = []
        for line, name in enumerate(rng.permutation(len(NAMES))[:count]):
            row = top + line * spacing
            value = self._string(DIGITS, digits, rng)
            cells = [Cell(row, left + half, name=int(name) + 1, part=LEFT if half == 0 else RIGHT) for half in (0, 1)]
            for i, digit in enumerate(value):
                cells.append(Cell(row, left + 2 + gap + i, glyph=GLYPHS.index(digit) + 1, part=_part(i, digits)))
            taken[row, left : left + width] = True
            items.append(Item("field", tuple(cells), name=int(name) + 1, text=value))
        return items

    def _string(self, alphabet: str, length: int, rng: np.random.Generator) -> str:
        """Of the split: the held-out strings in evaluation, the others in training."""
        while True:
            text = "".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), length))
            if is_held_out(text) == (self.split == "test"):
                return text


def _part(place: int, length: int) -> int:
    return LEFT if place == 0 else RIGHT if place == length - 1 else MIDDLE


def _free_run(taken: NDArray[np.bool_], length: int, margin: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """A free place for `length` cells in a row, marked as taken with `margin` cells at its sides; None if crowded."""
    rows, cols = taken.shape
    for _ in range(30):
        row, col = int(rng.integers(rows)), int(rng.integers(cols - length + 1))
        if not taken[row, col : col + length].any():
            taken[row, max(0, col - margin) : col + length + margin] = True
            return row, col
    return None


def dense_scene(seed: tuple[int, ...], split: Split, filled: float = 0.6) -> Scene:
    """A picture crowded with unrelated cells, for teaching the tower; its items answer no question."""
    rng = np.random.default_rng(seed)
    cols = rows = 16
    cells: list[Cell] = []
    for row in range(rows):
        col = 0
        while col < cols:
            kind = rng.random()
            if kind > filled:
                col += 1
                continue
            kind /= filled
            color = int(rng.integers(len(COLORS))) + 1
            if kind < 0.4:
                cells.append(Cell(row, col, color=color, glyph=int(rng.integers(10)) + 1, part=ALONE))
            elif kind < 0.52:
                cells.append(Cell(row, col, color=color, shape=int(rng.integers(len(SHAPES))) + 1, part=ALONE))
            elif kind < 0.74:
                glyph = int(rng.integers(10, len(GLYPHS))) + 1
                cells.append(Cell(row, col, color=color, glyph=glyph, part=LEFT + int(rng.integers(3))))
            elif kind < 0.86 or col % 2 or col + 1 >= cols:
                glyph = int(rng.integers(10)) + 1
                cells.append(Cell(row, col, glyph=glyph, part=LEFT + int(rng.integers(3))))
            else:
                name = int(rng.integers(len(NAMES))) + 1
                cells.append(Cell(row, col, name=name, part=LEFT))
                cells.append(Cell(row, col + 1, name=name, part=RIGHT))
                col += 1
            col += 1
    return Scene(cols, rows, (Item("box", tuple(cells)),), (*seed, 1), split)


def labels(scene: Scene) -> NDArray[np.int64]:
    """What each cell shows: [rows, cols, attributes] label numbers, in the order of ATTRIBUTES."""
    shown = np.zeros((scene.rows, scene.cols, len(ATTRIBUTES)), dtype=np.int64)
    for item in scene.items:
        for cell in item.cells:
            shown[cell.row, cell.col] = (cell.color, cell.glyph, cell.shape, cell.name, cell.part)
    return shown


_NOISE = np.random.default_rng(20_240_604).standard_normal((400, 400, 3)).astype(np.float32)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture: [height, width, 3] bytes."""
    rng = np.random.default_rng(scene.seed)
    masks = atlas(scene.split)
    height, width = scene.rows * CELL, scene.cols * CELL
    paper = rng.uniform(215, 250) + rng.uniform(-8, 8, 3)
    slope = rng.uniform(-10, 10, 2)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = paper.astype(np.float32)
    canvas += (slope[0] * np.linspace(-1, 1, height, dtype=np.float32))[:, None, None]
    canvas += (slope[1] * np.linspace(-1, 1, width, dtype=np.float32))[None, :, None]

    cells = [cell for item in scene.items for cell in item.cells]
    if cells:
        fill = np.zeros((len(cells), CELL, CELL, 1), dtype=np.float32)
        ink = np.zeros_like(fill)
        fill_rgb = np.zeros((len(cells), 1, 1, 3), dtype=np.float32)
        ink_rgb = np.zeros_like(fill_rgb)
        pen = rng.uniform(10, 70, 3).astype(np.float32)
        picks = rng.integers(0, 1 << 30, (len(cells), 3))
        tints = rng.uniform(-14, 14, (len(cells), 3)).astype(np.float32)
        word = 0
        for i, (cell, (pick, plate, _)) in enumerate(zip(cells, picks.tolist(), strict=True)):
            if cell.color:
                fill_rgb[i] = _RGB[cell.color - 1] + tints[i]
                ink_rgb[i] = 245 if _DARK[cell.color - 1] else 20
                if cell.shape:
                    fill[i, :, :, 0] = _pick(masks.shapes[cell.shape - 1], pick)
                elif cell.part == ALONE:
                    fill[i, :, :, 0] = _pick(masks.box, plate)
                    ink[i, :, :, 0] = _pick(masks.handwriting[cell.glyph - 1], pick)
                else:
                    fill[i, :, :, 0] = _pick(masks.sign, plate)[cell.part - LEFT]
                    ink[i, :, :, 0] = _pick(masks.printed[cell.glyph - 1], pick)
            elif cell.name:
                # Both halves of a word come from the same drawing of it.
                word = pick if cell.part == LEFT else word
                half = slice(0, CELL) if cell.part == LEFT else slice(CELL, None)
                ink[i, :, :, 0] = _pick(masks.names[cell.name - 1], word)[:, half]
                ink_rgb[i] = pen
            else:
                fill[i, :, :, 0] = _pick(masks.comb, plate)[cell.part - LEFT]
                ink[i, :, :, 0] = _pick(masks.printed[cell.glyph - 1], pick)
                fill_rgb[i] = 110
                ink_rgb[i] = pen
        by_cell = canvas.reshape(scene.rows, CELL, scene.cols, CELL, 3).transpose(0, 2, 1, 3, 4)
        where = (np.array([cell.row for cell in cells]), np.array([cell.col for cell in cells]))
        drawn = by_cell[where]
        drawn += fill * (fill_rgb - drawn)
        drawn += ink * (ink_rgb - drawn)
        by_cell[where] = drawn
    y, x = rng.integers(0, 400 - height + 1), rng.integers(0, 400 - width + 1)
    canvas += np.float32(rng.uniform(0, 6)) * _NOISE[y : y + height, x : x + width]
    picture: NDArray[np.uint8] = np.clip(canvas, 0, 255).astype(np.uint8)
    return picture


def _pick(variants: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    picked: NDArray[np.float32] = variants[number % len(variants)]
    return picked
