"""The part of an image that each of its visual tokens looks at, from the image's size alone."""

from __future__ import annotations

import math

from redvtp.vision.geometry import Tiling
from redvtp.vision.images import validate_padded_size
from redvtp.vision.media import Box
from redvtp.vision.merge import token_grid


def visual_token_boxes(width: int, height: int, tiling: Tiling) -> list[Box | None]:
    """The part of the image each visual token looks at, in token order; None for newline tokens.

    In "anyres" the first side * side boxes are those of tile 0, which shows the whole image; they overlap the others.
    A token that sees padding only has an empty box at the nearest edge.
    """
    if tiling.mode == "pad":
        validate_padded_size(width, height)
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        padded: list[Box | None] = [
            (_clamp(x0 - left, width), _clamp(y0 - top, height), _clamp(x1 - left, width), _clamp(y1 - top, height))
            for x0, y0, x1, y1 in _tile_boxes(longest, longest, tiling)
        ]
        return [*padded, None] if tiling.newline else padded
    layout = token_grid(width, height, tiling)
    grid = layout.grid
    columns = [
        tuple(_clamp((pixel - grid.offset[0]) * width / grid.size[0], width) for pixel in edge)
        for edge in _edges(layout.left, layout.kept_cols, layout.out_cols, tiling)
    ]
    rows = [
        tuple(_clamp((pixel - grid.offset[1]) * height / grid.size[1], height) for pixel in edge)
        for edge in _edges(layout.top, layout.kept_rows, layout.out_rows, tiling)
    ]
    boxes: list[Box | None] = list(_tile_boxes(width, height, tiling))
    for y0, y1 in rows:
        boxes.extend((x0, y0, x1, y1) for x0, x1 in columns)
        boxes.append(None)
    return boxes


def _token_pixels(tiling: Tiling) -> float:
    """Side of the square of tile pixels that one token looks at.

    The tower drops pixels that do not fill a last patch, so the tokens together cover a little less than the tile.
    """
    return tiling.patches * tiling.patch / tiling.side


def _tile_boxes(width: int, height: int, tiling: Tiling) -> list[Box]:
    """Boxes of the side x side tokens of one tile that shows an area of width x height."""
    side, step = tiling.side, _token_pixels(tiling)
    step_x, step_y = width * step / tiling.tile, height * step / tiling.tile
    return [
        (col * step_x, row * step_y, (col + 1) * step_x, (row + 1) * step_y)
        for row in range(side)
        for col in range(side)
    ]


def _edges(first: int, kept: int, out: int, tiling: Tiling) -> list[tuple[float, float]]:
    """Start and end in canvas pixels of the `out` tokens that `kept` tokens from `first` on became, on one axis."""
    tile, side, step = tiling.tile, tiling.side, _token_pixels(tiling)

    def start(position: float) -> float:
        return position // side * tile + position % side * step

    def end(position: float) -> float:
        # A token that ends with its tile ends before the pixels the tower drops there.
        before = math.ceil(position / side) - 1
        return before * tile + (position - before * side) * step

    return [(start(first + index * kept / out), end(first + (index + 1) * kept / out)) for index in range(out)]


def _clamp(value: float, limit: int) -> float:
    return min(max(value, 0.0), float(limit))
