"""From the features of an image's tiles to its visual tokens: pool, stitch, unpad, scale down, close rows by newlines.

`merge_tiles` moves features; `visual_token_count` computes from the size alone how many tokens there will be. Both
read one `TokenGrid`, as `redvtp.vision.boxes` does, so counts, tokens and boxes always agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from redvtp.vision.geometry import Tiling
from redvtp.vision.images import validate_padded_size
from redvtp.vision.media import Size
from redvtp.vision.tiling import Grid, choose_grid

# The reference scales the grid's features down only when they are this much (per side) over the limit of anyres_max_k.
_SCALE_DOWN_FROM = 1.1


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The grid part of an "anyres" image, in tokens: what is cut away and what the rest is scaled to.

    grid: the same in canvas pixels.
    cols, rows: the stitched grid.
    left, top: tokens cut from each of the two opposite sides.
    out_cols, out_rows: after scaling.
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


def token_grid(width: int, height: int, tiling: Tiling) -> TokenGrid:
    """The grid of an "anyres" image of this size. Raises ValueError when no token remains."""
    grid = choose_grid(width, height, tiling.pinpoints)
    side, tile = tiling.side, tiling.tile
    cols, rows = grid.canvas[0] // tile * side, grid.canvas[1] // tile * side
    left = top = 0
    # int() of the float, as in the reference: rounding would unpad one patch less.
    if width / height > cols / rows:
        top = (rows - int(height * (cols / width))) // 2
    else:
        left = (cols - int(width * (rows / height))) // 2
    out_cols, out_rows = cols - 2 * left, rows - 2 * top
    if tiling.max_grid_tiles is not None:
        times = math.sqrt(out_rows * out_cols / (tiling.max_grid_tiles * side**2))
        if times > _SCALE_DOWN_FROM:
            out_cols, out_rows = int(out_cols // times), int(out_rows // times)
            if not (out_cols and out_rows):
                raise ValueError(
                    f"image of {width}x{height} is too narrow: no visual token is left across its short side"
                )
    return TokenGrid(grid, cols, rows, left, top, out_cols, out_rows)


def visual_token_count(width: int, height: int, tiling: Tiling) -> int:
    """Visual tokens of an image of this size."""
    one_tile = tiling.side**2
    if tiling.mode == "pad":
        validate_padded_size(width, height)
        return one_tile + int(tiling.newline)
    layout = token_grid(width, height, tiling)
    return one_tile + layout.out_rows * (layout.out_cols + 1)


def merge_tiles(features: Tensor, size: Size, newline: Tensor, tiling: Tiling) -> Tensor:
    """Orders projected tile features as the language model reads them.

    features: [tiles, patches * patches, hidden], tiles as `tile_image` makes them.
    size: the image's (width, height).
    newline: [hidden], the checkpoint's newline token.
    Returns [visual, hidden]: tile 0 first, then the grid's rows, each closed by a newline token.
    """
    tiles, _, hidden = features.shape
    side = tiling.side
    if tiling.pooled:
        features = _pool(features, tiling.patches, side)
    if tiling.mode == "pad":
        _check_tiles(tiles, 1, size)
        return torch.cat((features[0], newline.to(features)[None])) if tiling.newline else features[0]
    layout = token_grid(*size, tiling)
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
    """[tiles, before * before, hidden] -> [tiles, after * after, hidden] (reference: get_2dPool, bilinear)."""
    tiles, _, hidden = features.shape
    pooled = _resize(features.reshape(tiles, before, before, hidden), after, after)
    return pooled.reshape(tiles, after * after, hidden)


def _resize(grids: Tensor, rows: int, cols: int) -> Tensor:
    """[grids, rows, cols, hidden] to another number of rows and columns, bilinearly."""
    channels_first = grids.permute(0, 3, 1, 2).contiguous()
    scaled = functional.interpolate(channels_first, (rows, cols), mode="bilinear", align_corners=False)
    return scaled.permute(0, 2, 3, 1)


def _check_tiles(tiles: int, expected: int, size: Size) -> None:
    if tiles != expected:
        raise ValueError(f"image of {size[0]}x{size[1]} has {expected} tiles, got features of {tiles}")
