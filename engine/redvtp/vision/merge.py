"""From the features of an image's tiles to its visual tokens: pool, stitch, unpad, scale down, close rows by newlines.

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

from redvtp.checkpoint.config import DvlmConfig
from redvtp.vision.images import validate_padded_size
from redvtp.vision.tiling import Grid, ImageMode, choose_grid

Box = tuple[float, float, float, float]

# The reference scales the grid's features down only when they are this much (per side) over the limit of anyres_max_k.
_SCALE_DOWN_FROM = 1.1


@dataclass(frozen=True, slots=True)
class _Layout:
    """The grid part of an "anyres" image, in tokens: what is cut away and what the rest is scaled to.

    cols, rows: the stitched grid. left, top: tokens cut from each of the two opposite sides. out_cols, out_rows:
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


def _layout(width: int, height: int, config: DvlmConfig, mode: ImageMode) -> _Layout:
    grid = choose_grid(width, height, config)
    side, tile = mode.tile_side(config), config.tower.image_size
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


def visual_token_count(width: int, height: int, config: DvlmConfig, mode: ImageMode) -> int:
    """Visual tokens of an image of this size."""
    one_tile = mode.tile_side(config) ** 2
    if mode.mode == "pad":
        validate_padded_size(width, height)
        return one_tile + int(mode.newline)
    layout = _layout(width, height, config, mode)
    return one_tile + layout.out_rows * (layout.out_cols + 1)


def merge_tiles(
    features: Tensor, size: tuple[int, int], newline: Tensor, config: DvlmConfig, mode: ImageMode
) -> Tensor:
    """Orders projected tile features as the language model reads them.

    features: [tiles, side * side, hidden], tiles as `tile_image` makes them. size: the image's (width, height).
    newline: [hidden], the checkpoint's newline token.
    Returns [visual, hidden]: tile 0 first, then the grid's rows, each closed by a newline token.
    """
    tiles, _, hidden = features.shape
    side = mode.tile_side(config)
    if mode.pooled:
        features = _pool(features, config.tower.side, side)
    if mode.mode == "pad":
        _check_tiles(tiles, 1, size)
        return torch.cat((features[0], newline.to(features)[None])) if mode.newline else features[0]
    layout = _layout(*size, config, mode)
    _check_tiles(tiles, 1 + layout.rows // side * (layout.cols // side), size)
    grid = features[1:].reshape(layout.rows // side, layout.cols // side, side, side, hidden)
    grid = grid.transpose(1, 2).reshape(layout.rows, layout.cols, hidden)
    grid = grid[layout.top : layout.rows - layout.top, layout.left : layout.cols - layout.left]
    if layout.scaled:
        grid = _resize(grid[None], layout.out_rows, layout.out_cols)[0]
    line_ends = newline.to(features).expand(layout.out_rows, 1, hidden)
    rows = torch.cat((grid, line_ends), dim=1).reshape(-1, hidden)
    return torch.cat((features[0], rows))


def _pool(features: Tensor, before: int, after: int) -> Tensor:
    """[tiles, before * before, hidden] -> [tiles, after * after, hidden] (reference: LaViDa's get_2dPool, bilinear)."""
    tiles, _, hidden = features.shape
    pooled = _resize(features.reshape(tiles, before, before, hidden), after, after)
    return pooled.reshape(tiles, after * after, hidden)


def _resize(grids: Tensor, rows: int, cols: int) -> Tensor:
    """[grids, rows, cols, hidden] to another number of rows and columns, bilinearly."""
    channels_first = grids.permute(0, 3, 1, 2).contiguous()
    scaled = functional.interpolate(channels_first, (rows, cols), mode="bilinear", align_corners=False)
    return scaled.permute(0, 2, 3, 1)


def _check_tiles(tiles: int, expected: int, size: tuple[int, int]) -> None:
    if tiles != expected:
        raise ValueError(f"image of {size[0]}x{size[1]} has {expected} tiles, got features of {tiles}")


def visual_token_boxes(width: int, height: int, config: DvlmConfig, mode: ImageMode) -> list[Box | None]:
    """The part of the image each visual token looks at: (left, top, right, bottom) in pixels; None for newline tokens.

    Same order as the tokens: in "anyres" the first tile_side ** 2 are tile 0, which sees the whole image, so they
    overlap the others. A token that sees padding only has an empty box at the nearest edge.
    """
    side = mode.tile_side(config)
    if mode.mode == "pad":
        validate_padded_size(width, height)
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        padded: list[Box | None] = [
            (_clamp(x0 - left, width), _clamp(y0 - top, height), _clamp(x1 - left, width), _clamp(y1 - top, height))
            for x0, y0, x1, y1 in _tile_boxes(longest, longest, config, side)
        ]
        return [*padded, None] if mode.newline else padded
    layout = _layout(width, height, config, mode)
    grid = layout.grid
    columns = [
        tuple(_clamp((pixel - grid.offset[0]) * width / grid.size[0], width) for pixel in edge)
        for edge in _edges(layout.left, layout.kept_cols, layout.out_cols, config, side)
    ]
    rows = [
        tuple(_clamp((pixel - grid.offset[1]) * height / grid.size[1], height) for pixel in edge)
        for edge in _edges(layout.top, layout.kept_rows, layout.out_rows, config, side)
    ]
    boxes: list[Box | None] = list(_tile_boxes(width, height, config, side))
    for y0, y1 in rows:
        boxes.extend((x0, y0, x1, y1) for x0, x1 in columns)
        boxes.append(None)
    return boxes


def _token_pixels(config: DvlmConfig, side: int) -> float:
    """Side of the square of tile pixels that one of `side` tokens looks at. The tower drops the pixels that do not fill
    a last patch, so the tokens together cover a little less than the tile."""
    return config.tower.side * config.tower.patch_size / side


def _tile_boxes(width: int, height: int, config: DvlmConfig, side: int) -> list[Box]:
    """Boxes of the side x side tokens of one tile that shows an area of width x height."""
    step = _token_pixels(config, side)
    step_x, step_y = width * step / config.tower.image_size, height * step / config.tower.image_size
    return [
        (col * step_x, row * step_y, (col + 1) * step_x, (row + 1) * step_y)
        for row in range(side)
        for col in range(side)
    ]


def _edges(first: int, kept: int, out: int, config: DvlmConfig, side: int) -> list[tuple[float, float]]:
    """Start and end in canvas pixels of the `out` tokens that `kept` tokens from `first` on became, on one axis."""
    tile, step = config.tower.image_size, _token_pixels(config, side)

    def start(position: float) -> float:
        return position // side * tile + position % side * step

    def end(position: float) -> float:
        # A token that ends with its tile ends before the pixels the tower drops there.
        before = math.ceil(position / side) - 1
        return before * tile + (position - before * side) * step

    return [(start(first + index * kept / out), end(first + (index + 1) * kept / out)) for index in range(out)]


def _clamp(value: float, limit: int) -> float:
    return min(max(value, 0.0), float(limit))
