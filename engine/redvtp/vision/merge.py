"""From the features of an image's tiles to its visual tokens: stitch, unpad, scale down, close each row by a newline.

`merge_tiles` moves features; `visual_token_count` and `visual_token_boxes` tell from the size alone how many tokens
there will be and what each looks at. All three read one `_Layout`, so the prompt never has another number of slots
than there are tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from redvtp.models.config import LladaVConfig
from redvtp.vision.images import validate_padded_size
from redvtp.vision.tiling import Grid, ImageMode, Mode, choose_grid

Box = tuple[float, float, float, float]

# The reference scales the grid's features down only when they are this much (per side) over the limit of anyres_max_k.
_SCALE_DOWN_FROM = 1.1


@dataclass(frozen=True, slots=True)
class _Layout:
    """The grid part of an "anyres" image, in patches: what is cut away and what the rest is scaled to.

    cols, rows: the stitched grid. left, top: patches cut from each of the two opposite sides. out_cols, out_rows:
    after scaling.
    """

    grid: Grid
    cols: int
    rows: int
    left: int
    top: int
    out_cols: int
    out_rows: int

    @property
    def kept_cols(self) -> int:
        return self.cols - 2 * self.left

    @property
    def kept_rows(self) -> int:
        return self.rows - 2 * self.top

    @property
    def scaled(self) -> bool:
        return (self.out_cols, self.out_rows) != (self.kept_cols, self.kept_rows)


def _layout(width: int, height: int, config: LladaVConfig) -> _Layout:
    grid = choose_grid(width, height, config)
    side, tile = config.tower.side, config.tower.image_size
    cols, rows = grid.canvas[0] // tile * side, grid.canvas[1] // tile * side
    left = top = 0
    # int() of the float, nothing rounded first: the reference unpads one patch more than a rounding version would.
    if width / height > cols / rows:
        top = (rows - int(height * (cols / width))) // 2
    else:
        left = (cols - int(width * (rows / height))) // 2
    out_cols, out_rows = cols - 2 * left, rows - 2 * top
    if config.max_grid_tiles is not None:
        times = math.sqrt(out_rows * out_cols / (config.max_grid_tiles * side**2))
        if times > _SCALE_DOWN_FROM:
            out_cols, out_rows = int(out_cols // times), int(out_rows // times)
            if not (out_cols and out_rows):
                raise ValueError(
                    f"image of {width}x{height} is too narrow: no visual token is left across its short side"
                )
    return _Layout(grid, cols, rows, left, top, out_cols, out_rows)


def visual_token_count(width: int, height: int, config: LladaVConfig, mode: Mode, newline: bool) -> int:
    """Visual tokens of an image of this size. `newline` matters to "pad" only, see `ImageMode`."""
    patches = config.tower.side**2
    if mode == "pad":
        validate_padded_size(width, height)
        return patches + int(newline)
    layout = _layout(width, height, config)
    return patches + layout.out_rows * (layout.out_cols + 1)


def merge_tiles(
    features: Tensor, size: tuple[int, int], newline: Tensor, config: LladaVConfig, mode: ImageMode
) -> Tensor:
    """Orders projected tile features as the language model reads them.

    features: [tiles, side * side, hidden], tiles as `tile_image` makes them. size: the image's (width, height).
    newline: [hidden], the checkpoint's newline token.
    Returns [visual, hidden]: tile 0 first, then the grid's rows, each closed by a newline token.
    """
    tiles, _, hidden = features.shape
    if mode.mode == "pad":
        _check_tiles(tiles, 1, size)
        return torch.cat((features[0], newline.to(features)[None])) if mode.newline else features[0]
    layout = _layout(*size, config)
    side = config.tower.side
    _check_tiles(tiles, 1 + layout.rows // side * (layout.cols // side), size)
    grid = features[1:].reshape(layout.rows // side, layout.cols // side, side, side, hidden)
    grid = grid.transpose(1, 2).reshape(layout.rows, layout.cols, hidden)
    grid = grid[layout.top : layout.rows - layout.top, layout.left : layout.cols - layout.left]
    if layout.scaled:
        channels_first = grid.permute(2, 0, 1)[None].contiguous()
        scaled = functional.interpolate(
            channels_first, (layout.out_rows, layout.out_cols), mode="bilinear", align_corners=False
        )
        grid = scaled[0].permute(1, 2, 0)
    line_ends = newline.to(features).expand(layout.out_rows, 1, hidden)
    rows = torch.cat((grid, line_ends), dim=1).reshape(-1, hidden)
    return torch.cat((features[0], rows))


def _check_tiles(tiles: int, expected: int, size: tuple[int, int]) -> None:
    if tiles != expected:
        raise ValueError(f"image of {size[0]}x{size[1]} has {expected} tiles, got features of {tiles}")


def visual_token_boxes(width: int, height: int, config: LladaVConfig, mode: Mode, newline: bool) -> list[Box | None]:
    """The part of the image each visual token looks at: (left, top, right, bottom) in pixels; None for newline tokens.

    Same order as the tokens: in "anyres" the first side * side are tile 0, which sees the whole image, so they overlap
    the others. A token that sees padding only has an empty box at the nearest edge.
    """
    if mode == "pad":
        validate_padded_size(width, height)
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        padded: list[Box | None] = [
            (_clamp(x0 - left, width), _clamp(y0 - top, height), _clamp(x1 - left, width), _clamp(y1 - top, height))
            for x0, y0, x1, y1 in _tile_boxes(longest, longest, config)
        ]
        return [*padded, None] if newline else padded
    layout = _layout(width, height, config)
    grid = layout.grid
    columns = [
        tuple(_clamp((pixel - grid.offset[0]) * width / grid.size[0], width) for pixel in edge)
        for edge in _edges(layout.left, layout.kept_cols, layout.out_cols, config)
    ]
    rows = [
        tuple(_clamp((pixel - grid.offset[1]) * height / grid.size[1], height) for pixel in edge)
        for edge in _edges(layout.top, layout.kept_rows, layout.out_rows, config)
    ]
    boxes: list[Box | None] = list(_tile_boxes(width, height, config))
    for y0, y1 in rows:
        boxes.extend((x0, y0, x1, y1) for x0, x1 in columns)
        boxes.append(None)
    return boxes


def _tile_boxes(width: int, height: int, config: LladaVConfig) -> list[Box]:
    """Boxes of the patches of one tile that shows an area of width x height."""
    side = config.tower.side
    # The tower drops the pixels that do not fill a last patch, so the patches cover a little less than the tile.
    step_x = width * config.tower.patch_size / config.tower.image_size
    step_y = height * config.tower.patch_size / config.tower.image_size
    return [
        (col * step_x, row * step_y, (col + 1) * step_x, (row + 1) * step_y)
        for row in range(side)
        for col in range(side)
    ]


def _edges(first: int, kept: int, out: int, config: LladaVConfig) -> list[tuple[float, float]]:
    """Start and end in canvas pixels of the `out` tokens that `kept` patches from `first` on became, on one axis."""
    side, tile, patch = config.tower.side, config.tower.image_size, config.tower.patch_size

    def start(position: float) -> float:
        return position // side * tile + position % side * patch

    def end(position: float) -> float:
        # A token that ends with its tile ends before the pixels the tower drops there.
        before = math.ceil(position / side) - 1
        return before * tile + (position - before * side) * patch

    return [(start(first + index * kept / out), end(first + (index + 1) * kept / out)) for index in range(out)]


def _clamp(value: float, limit: int) -> float:
    return min(max(value, 0.0), float(limit))
