"""Invents samples: one maker for each family of pictures, on canvases that they fill about half.

`make(family, level, seed, split)` is a pure function: the same arguments give the same sample. Levels 0 to 2 go from
few things to as many as the model is evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from training.glyphs import Split
from training.scenes import SceneMaker, is_held_out
from training.v2.vocab import COLORS, DIGITS, GLYPHS, LETTERS, SHAPES, WORDS
from training.v2.world import ALONE, CORNERS, LEFT, MIDDLE, RIGHT, Cell, Family, Item, Kind, Sample, Scene

# Cells per canvas: (columns, rows), whole tiles of 4 x 4 cells, so that no pixel is ever resampled but the base tile's.
CANVASES = ((8, 8), (12, 4), (16, 4), (12, 8), (8, 12), (16, 8), (12, 12), (8, 16), (16, 12), (12, 16), (16, 16))
# Fewest and most things at each level.
OBJECTS = ((2, 5), (5, 10), (10, 18))
LINES = ((2, 4), (4, 7), (6, 12))
TABLE_ROWS = ((2, 3), (2, 4), (3, 6))
TABLE_COLUMNS = ((2, 2), (2, 3), (3, 4))
PAGE_WORDS = ((4, 10), (10, 24), (30, 48))
SIGNS = ((2, 4), (3, 6), (6, 9))
SPARSE = ((2, 4), (2, 6), (2, 6))
FIELD_DIGITS, PAIR_DIGITS, ENTRY_DIGITS, CODE_LENGTH = 3, 2, 2, 3

Seed = tuple[int, ...]


def make(family: Family, level: int, seed: Seed, split: Split) -> Sample:
    rng = np.random.default_rng((*seed, 11))
    return _MAKERS[family](level, seed, split, rng)


def _between(ranges: Sequence[tuple[int, int]], level: int, rng: np.random.Generator) -> int:
    low, high = ranges[level]
    return int(rng.integers(low, high + 1))


def _canvas(
    content: int, fits: Callable[[int, int], bool], rng: np.random.Generator, largest: int = 288
) -> tuple[int, int]:
    """One of the three canvases among those that fit on which `content` cells are nearest to half of the tokens."""
    sizes = {(cols, rows): 16 + rows * (cols + 1) for cols, rows in CANVASES if fits(cols, rows)}
    ranked = sorted(sizes, key=lambda size: abs(content / sizes[size] - 0.5))
    ranked = [size for size in ranked if sizes[size] <= largest] or ranked
    return ranked[int(rng.integers(min(3, len(ranked))))]


def _string(alphabet: str, length: int, split: Split, rng: np.random.Generator) -> str:
    """Of the split: the held-out strings in evaluation, the others in training. Too short ones are never held out."""
    while True:
        text = "".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), length))
        if length < 3 or is_held_out(text) == (split == "test"):
            return text


def _scene(size: tuple[int, int], items: list[Item], seed: Seed, split: Split) -> Scene:
    return Scene(*size, tuple(sorted(items, key=lambda item: item.at)), (*seed, 1), split)


# --- One picture ---------------------------------------------------------------------------------------------------


def _large(kind: Kind, row: int, col: int, color: int, other: int) -> Item:
    """A box or a shape of 2 x 2 cells."""
    cells = tuple(
        Cell(
            row + i // 2,
            col + i % 2,
            color=color + 1,
            glyph=other + 1 if kind == "box" else 0,
            shape=other + 1 if kind == "shape" else 0,
            part=CORNERS[i],
        )
        for i in range(4)
    )
    if kind == "box":
        return Item("box", cells, color=color + 1, text=DIGITS[other])
    return Item("shape", cells, color=color + 1, shape=other + 1)


def _objects(count: int, size: tuple[int, int], mixed: float, rng: np.random.Generator) -> list[Item]:
    """Large boxes, shapes or both, no two alike."""
    cols, rows = size[0] // 2, size[1] // 2
    boxes = count if rng.random() < 0.5 else 0
    if rng.random() < mixed:
        boxes = int(rng.integers(1, count)) if count > 1 else boxes
    kinds: list[Kind] = ["box" if number < boxes else "shape" for number in range(count)]
    looks: dict[Kind, Iterator[int]] = {
        "box": iter(rng.permutation(len(COLORS) * 10).tolist()),
        "shape": iter(rng.permutation(len(COLORS) * len(SHAPES)).tolist()),
    }
    items = []
    for place, kind in zip(rng.permutation(cols * rows)[:count].tolist(), kinds, strict=True):
        color, other = divmod(next(looks[kind]), 10 if kind == "box" else len(SHAPES))
        items.append(_large(kind, place // cols * 2, place % cols * 2, color, other))
    return items


def _make_objects(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    count = _between(OBJECTS, level, rng)
    size = _canvas(4 * count, lambda cols, rows: cols * rows // 4 >= count and rows > 4, rng, largest=224)
    return Sample("objects", (_scene(size, _objects(count, size, 0.4, rng), seed, split),))


def _field(row: int, col: int, gap: int, name: int, value: str) -> Item:
    cells = [Cell(row, col + half, name=name + 1, part=LEFT if half == 0 else RIGHT) for half in (0, 1)]
    return Item("field", (*cells, *_number(row, col + 2 + gap, value)), name=name + 1, text=value)


def _number(row: int, col: int, value: str) -> tuple[Cell, ...]:
    last = len(value) - 1
    parts = [LEFT if i == 0 else RIGHT if i == last else MIDDLE for i in range(len(value))]
    return tuple(
        Cell(row, col + i, glyph=GLYPHS.index(digit) + 1, part=part)
        for i, (digit, part) in enumerate(zip(value, parts, strict=True))
    )


def _make_form(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Lines below each other, in one column or two."""
    count = _between(LINES, level, rng)
    columns = 2 if count > 4 and rng.random() < 0.4 else 1
    deep = -(-count // columns)
    gap = int(rng.integers(0, 2))
    # Names begin on an even column, so that both their cells are in one tile.
    pitch = 2 + gap + FIELD_DIGITS + 1 - gap % 2 if columns == 2 else 2 + gap + FIELD_DIGITS
    pitch += pitch % 2
    size = _canvas(5 * count, lambda cols, rows: cols >= pitch * columns and rows >= deep, rng, largest=224)
    spacing = 2 if 2 * deep <= size[1] and rng.random() < 0.5 else 1
    top = int(rng.integers(0, size[1] - (deep - 1) * spacing))
    left = 2 * int(rng.integers(0, (size[0] - pitch * columns) // 2 + 1))
    items = []
    for number, name in enumerate(rng.permutation(len(WORDS))[:count].tolist()):
        row, col = top + number // columns * spacing, left + number % columns * pitch
        items.append(_field(row, col, gap, name, _string(DIGITS, FIELD_DIGITS, split, rng)))
    return Sample("form", (_scene(size, items, seed, split),))


def _word(kind: Kind, row: int, col: int, name: int, line: int = 0, place: int = 0) -> Item:
    cells = (Cell(row, col, name=name + 1, part=LEFT), Cell(row, col + 1, name=name + 1, part=RIGHT))
    return Item(kind, cells, name=name + 1, line=line, place=place)


def _make_table(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """A row of column names, then a name and one number for each column in every row."""
    rows, columns = _between(TABLE_ROWS, level, rng), _between(TABLE_COLUMNS, level, rng)
    content = 2 * columns + rows * (2 + ENTRY_DIGITS * columns)
    width, height = 2 + 2 * columns, rows + 1
    size = _canvas(content, lambda wide, high: wide >= width and high >= height, rng, largest=224)
    spacing = 2 if 2 * height - 1 <= size[1] and rng.random() < 0.5 else 1
    top = int(rng.integers(0, size[1] - (height - 1) * spacing))
    left = 2 * int(rng.integers(0, (size[0] - width) // 2 + 1))
    names = rng.permutation(len(WORDS))[: rows + columns].tolist()
    heads, sides = names[:columns], names[columns:]
    items = [_word("head", top, left + 2 + 2 * place, name, 0, place) for place, name in enumerate(heads)]
    for line, side in enumerate(sides):
        row = top + (line + 1) * spacing
        items.append(_word("side", row, left, side, line))
        for place, head in enumerate(heads):
            value = _string(DIGITS, ENTRY_DIGITS, split, rng)
            cells = _number(row, left + 2 + 2 * place, value)
            items.append(Item("entry", cells, name=side + 1, column=head + 1, text=value, line=line, place=place))
    return Sample("table", (_scene(size, items, seed, split),))


def _make_page(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Lines of words, none of them twice."""
    count = _between(PAGE_WORDS, level, rng)
    per_line = int(rng.integers(2, 5)) if level == 0 else int(rng.integers(4, 8))
    lines = -(-count // per_line)
    fits = [size for size in CANVASES if size[0] >= 2 * per_line and size[1] >= lines]
    while not fits:
        per_line += 1
        lines = -(-count // per_line)
        fits = [size for size in CANVASES if size[0] >= 2 * per_line and size[1] >= lines]
    size = _canvas(2 * count, lambda cols, rows: (cols, rows) in fits, rng, largest=224)
    spacing = 2 if 2 * lines <= size[1] and rng.random() < 0.3 else 1
    top = int(rng.integers(0, size[1] - (lines - 1) * spacing))
    left = 2 * int(rng.integers(0, (size[0] - 2 * per_line) // 2 + 1))
    items = []
    for number, name in enumerate(rng.permutation(len(WORDS))[:count].tolist()):
        line, place = divmod(number, per_line)
        items.append(_word("word", top + line * spacing, left + 2 * place, name, line, place))
    return Sample("page", (_scene(size, items, seed, split),))


def _make_signs(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Codes on plates of different colors, a cell or more apart."""
    count = _between(SIGNS, level, rng)
    size = _canvas(3 * count, lambda cols, rows: cols // 4 * rows >= count, rng, largest=152)
    per_row = size[0] // 4
    items = []
    places = rng.permutation(per_row * size[1])[:count].tolist()
    for place, color in zip(places, rng.permutation(len(COLORS))[:count].tolist(), strict=True):
        row, col = place // per_row, place % per_row * 4 + int(rng.integers(0, 2))
        code = _string(LETTERS, CODE_LENGTH, split, rng)
        cells = tuple(
            Cell(row, col + i, color=color + 1, glyph=GLYPHS.index(letter) + 1, part=LEFT + i)
            for i, letter in enumerate(code)
        )
        items.append(Item("sign", cells, color=color + 1, text=code))
    return Sample("signs", (_scene(size, items, seed, split),))


def _make_sparse(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """A picture of version 1: few small things on a large canvas, handwritten digits."""
    old = SceneMaker(split, items=SPARSE[level], lines=SPARSE[level]).make((*seed, 3))
    items = [
        Item(
            item.kind,
            tuple(Cell(c.row, c.col, c.color, c.glyph, c.shape, c.name, c.part) for c in item.cells),
            color=item.color,
            shape=item.shape,
            name=item.name,
            text=item.text,
        )
        for item in old.items
    ]
    return Sample("sparse", (Scene(old.cols, old.rows, tuple(items), old.seed, split),))


# --- Several pictures ----------------------------------------------------------------------------------------------

TILE = (4, 4)


def _make_pair(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Two pictures of one tile each: objects, forms of two-digit values, or pages of two words a line."""
    kind = int(rng.integers(3))
    scenes: list[Scene] = []
    for number in range(2):
        here = (*seed, number)
        lines = int(rng.integers(2, 4 if level == 0 else 5))
        if kind == 0:
            items = _objects(lines, TILE, 0.5, rng)
        elif kind == 1:
            top = int(rng.integers(0, 5 - lines))
            names = rng.permutation(len(WORDS))[:lines].tolist()
            if scenes and rng.random() < 0.6:
                # The same fields with other values: only the place in the sequence tells them apart.
                names = [item.name - 1 for item in scenes[0].of("field")]
                top = int(rng.integers(0, 5 - len(names)))
            values = [_string(DIGITS, PAIR_DIGITS, split, rng) for _ in names]
            items = [
                _field(top + i, 0, 0, name, value) for i, (name, value) in enumerate(zip(names, values, strict=True))
            ]
        else:
            words = rng.permutation(len(WORDS))[: 2 * lines].tolist()
            items = [_word("word", i // 2, i % 2 * 2, word, i // 2, i % 2) for i, word in enumerate(words)]
        scenes.append(_scene(TILE, items, here, split))
    return Sample("pair", tuple(scenes))


def _make_clip(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Frames of one tile each: a box that moves past shapes that stand still, or a box that changes."""
    if rng.random() < 0.5:
        return _moving(seed, split, rng)
    return _changing(level, seed, split, rng)


def _moving(seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Four frames; one box with a digit goes one cell a frame, along a row or a column."""
    direction, track = int(rng.integers(4)), int(rng.integers(4))
    color, digit = int(rng.integers(len(COLORS))), int(rng.integers(10))
    cells = [(row, col) for row in range(4) for col in range(4)]
    free = [(row, col) for row, col in cells if (row if direction < 2 else col) != track]
    looks = rng.permutation(len(COLORS) * len(SHAPES)).tolist()
    still = []
    for place, look in zip(rng.permutation(len(free))[: int(rng.integers(1, 5))].tolist(), looks, strict=False):
        row, col = free[place]
        cell = Cell(row, col, color=look // len(SHAPES) + 1, shape=look % len(SHAPES) + 1, part=ALONE)
        still.append(Item("shape", (cell,), color=cell.color, shape=cell.shape))
    scenes = []
    for frame in range(4):
        along = frame if direction in (1, 3) else 3 - frame
        row, col = (track, along) if direction < 2 else (along, track)
        cell = Cell(row, col, color=color + 1, glyph=digit + 1, part=ALONE)
        box = Item("box", (cell,), color=color + 1, text=DIGITS[digit])
        # The same seed in each frame: one camera, one writer.
        scenes.append(_scene(TILE, [box, *still], seed, split))
    return Sample("clip", tuple(scenes), motion=direction)


def _changing(level: int, seed: Seed, split: Split, rng: np.random.Generator) -> Sample:
    """Three to eight frames; a large box shows another color and another digit in each."""
    frames = int(rng.integers(3, (5, 7, 9)[level]))
    row, col = int(rng.integers(0, 2)) * 2, int(rng.integers(0, 2)) * 2
    colors = rng.permutation(len(COLORS))[:frames].tolist()
    scenes = [_scene(TILE, [_large("box", row, col, color, int(rng.integers(10)))], seed, split) for color in colors]
    return Sample("clip", tuple(scenes))


_MAKERS: dict[Family, Callable[[int, Seed, Split, np.random.Generator], Sample]] = {
    "sparse": _make_sparse,
    "objects": _make_objects,
    "form": _make_form,
    "table": _make_table,
    "page": _make_page,
    "signs": _make_signs,
    "pair": _make_pair,
    "clip": _make_clip,
}


def crowded(seed: Seed, split: Split, filled: float = 0.6) -> Scene:
    """A picture full of unrelated things, for teaching the tower; its items answer no question."""
    rng = np.random.default_rng((*seed, 12))
    cols = rows = 16
    items: list[Item] = []

    def cell(row: int, col: int, **shown: int) -> None:
        items.append(Item("box", (Cell(row, col, **shown),)))

    for place in range(cols * rows // 4):
        row, col = place // (cols // 2) * 2, place % (cols // 2) * 2
        if rng.random() < 0.22:
            kind: Kind = "box" if rng.random() < 0.5 else "shape"
            items.append(_large(kind, row, col, int(rng.integers(9)), int(rng.integers(10 if kind == "box" else 6))))
            continue
        for down in range(2):
            if rng.random() < 0.3:
                items.append(_word("word", row + down, col, int(rng.integers(len(WORDS)))))
                continue
            for right in range(2):
                kind_of = rng.random() / filled
                where, color = (row + down, col + right), int(rng.integers(len(COLORS))) + 1
                part = LEFT + int(rng.integers(3))
                if kind_of < 0.4:
                    cell(*where, color=color, glyph=int(rng.integers(10)) + 1, part=ALONE)
                elif kind_of < 0.52:
                    cell(*where, color=color, shape=int(rng.integers(len(SHAPES))) + 1, part=ALONE)
                elif kind_of < 0.75:
                    cell(*where, color=color, glyph=int(rng.integers(10, len(GLYPHS))) + 1, part=part)
                elif kind_of < 1:
                    cell(*where, glyph=int(rng.integers(10)) + 1, part=part)
    return _scene((cols, rows), items, seed, split)
