"""A sample as the model gets it: patches, its visual tokens in the order of LLaDA-V's merge, and hints for each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.pictures import IGNORE, PATCHES, SIDE, by_tile, normalised, picture_patches
from training.v2.draw import render
from training.v2.questions import KEY, VALUE
from training.v2.vocab import COLORS, GLYPHS, SHAPES, WORDS
from training.v2.world import Item, Kind, Sample, Scene

__all__ = ["IGNORE", "PATCHES", "by_tile", "normalised"]

# What the middle of the language model is asked, and the number of answers. Of a visual token that shows part of an
# item: the item's place among its kind in reading order; its place in its line; the row's name; the column's name; the
# next item's key and the first character or shape of it (0: there is none); how many things share its color, its digit
# or shape, its kind; which picture it is in. Of both: the part of an item. Of a masked place of the answer: the word
# that is looked up; the number of the item; the key and the first character of the item before, once decided.
# Tokens that show nothing are asked nothing: no hint says which tokens matter.
HINTS = {
    "rank": 48,
    "place": 8,
    "owner": len(WORDS),
    "column": len(WORDS),
    "next_key": 1 + len(COLORS) + len(WORDS),
    "next_value": 1 + len(GLYPHS) + len(SHAPES),
    "same_color": 20,
    "same_value": 20,
    "same_kind": 20,
    "picture": 8,
    "slot": 16,
    "key": 1 + len(COLORS) + len(GLYPHS) + len(SHAPES) + len(WORDS),
    "item": 48,
    "previous_key": 1 + len(COLORS) + len(WORDS),
    "previous_value": 1 + len(GLYPHS) + len(SHAPES),
}
COLUMNS = {name: i for i, name in enumerate(HINTS)}
_KINDS: tuple[Kind, ...] = ("box", "shape", "sign", "field", "head", "side", "entry", "word")


@dataclass
class VisualTokens:
    """The visual tokens of one request in reading order.

    patches: [tiles, 16, 768] bytes. source: [visual], within the patches (newline: -1). hints: [visual, hints], IGNORE
    where none is asked. shown: [visual], part of an item.
    """

    patches: NDArray[np.uint8]
    source: NDArray[np.int64]
    hints: NDArray[np.int64]
    shown: NDArray[np.bool_]


def key_class(item: Item) -> int:
    """What an item is called by, as a class of the hints "next_key" and "previous_key"."""
    return len(COLORS) + item.name if item.name else item.color


def value_class(item: Item) -> int:
    """The first thing said of an item, as a class of "next_value" and "previous_value"; IGNORE for a bare word."""
    if item.shape:
        return len(GLYPHS) + item.shape
    return 1 + GLYPHS.index(item.text[0]) if item.text else IGNORE


def _after(item: Item, items: list[Item], number: int) -> Item | None:
    return items[number + 1] if number + 1 < len(items) else None


def _slots(item: Item) -> list[int]:
    """The part of its item that each cell shows."""
    if item.kind in ("box", "shape"):
        return [IGNORE] * len(item.cells)
    names = sum(cell.name > 0 for cell in item.cells)
    return [KEY] * names + [VALUE + i for i in range(len(item.cells) - names)]


def cell_hints(sample: Sample) -> list[NDArray[np.int64]]:
    """[rows, cols, hints] for each picture."""
    grids = [np.full((scene.rows, scene.cols, len(HINTS)), IGNORE) for scene in sample.scenes]
    placed = [(scene, grid) for scene, grid in enumerate(grids)]
    for kind in _KINDS:
        runs = [[(number, item) for item in sample.scenes[number].of(kind)] for number, _ in placed]
        # The boxes of a clip follow each other from frame to frame.
        if sample.family == "clip" and kind == "box":
            runs = [[entry for run in runs for entry in run]]
        for run in runs:
            _hint_run(sample, [number for number, _ in run], [item for _, item in run], grids)
    return grids


def _hint_run(sample: Sample, pictures: list[int], items: list[Item], grids: list[NDArray[np.int64]]) -> None:
    """Hints of the items of one kind, in reading order."""
    colors = Counter(item.color for item in items)
    values = Counter((item.text, item.shape) for item in items)
    for number, (picture, item) in enumerate(zip(pictures, items, strict=True)):
        following = _after(item, items, number)
        hints: dict[str, int] = {
            "rank": min(number, HINTS["rank"] - 1),
            "next_key": key_class(following) if following else 0,
            "next_value": value_class(following) if following else 0,
        }
        if item.kind in ("head", "entry", "word"):
            hints["place"] = min(item.place, HINTS["place"] - 1)
        if item.kind in ("field", "entry"):
            hints["owner"] = item.name - 1
        if item.column:
            hints["column"] = item.column - 1
        if sample.family not in ("pair", "clip"):
            hints["same_kind"] = min(len(items), 19)
            if item.kind in ("box", "shape"):
                hints["same_color"] = min(colors[item.color], 19)
                hints["same_value"] = min(values[item.text, item.shape], 19)
        else:
            hints["picture"] = picture
        for cell, slot in zip(item.cells, _slots(item), strict=True):
            place = grids[picture][cell.row, cell.col]
            for name, value in hints.items():
                place[COLUMNS[name]] = value
            place[COLUMNS["slot"]] = slot
            # A name says itself; whose value a value is has to be found.
            if cell.name:
                place[COLUMNS["owner"]] = IGNORE


def visual_tokens(sample: Sample) -> VisualTokens:
    """As LLaDA-V lays them out: one picture as base tile and grid, several as one tile each without newline tokens."""
    hints = cell_hints(sample)
    if len(sample.scenes) == 1:
        (scene,) = sample.scenes
        return _one_picture(scene, hints[0])
    tiles = [picture_patches(render(scene))[1:] for scene in sample.scenes]
    flat = np.concatenate([grid.reshape(PATCHES, -1) for grid in hints])
    shown = np.concatenate([_occupied(scene).reshape(-1) for scene in sample.scenes])
    return VisualTokens(np.concatenate(tiles), np.arange(PATCHES * len(tiles)), flat, shown)


def _occupied(scene: Scene) -> NDArray[np.bool_]:
    occupied = np.zeros((scene.rows, scene.cols), dtype=bool)
    for item in scene.items:
        for cell in item.cells:
            occupied[cell.row, cell.col] = True
    return occupied


def _one_picture(scene: Scene, hints: NDArray[np.int64]) -> VisualTokens:
    rows, cols = scene.rows, scene.cols
    row, col = np.mgrid[0:rows, 0:cols]
    tile = 1 + row // SIDE * (cols // SIDE) + col // SIDE
    source = tile * PATCHES + row % SIDE * SIDE + col % SIDE

    def with_line_ends(grid: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        closed = np.concatenate((grid, np.full((rows, 1, *grid.shape[2:]), end)), axis=1)
        return closed.reshape(-1, *grid.shape[2:])

    base = np.arange(PATCHES)
    none = np.full((PATCHES, len(HINTS)), IGNORE)
    shown = with_line_ends(_occupied(scene).astype(np.int64), 0)
    return VisualTokens(
        picture_patches(render(scene)),
        np.concatenate((base, with_line_ends(source, -1))),
        np.concatenate((none, with_line_ends(hints, IGNORE))),
        np.concatenate((np.zeros(PATCHES, dtype=bool), shown.astype(bool))),
    )
