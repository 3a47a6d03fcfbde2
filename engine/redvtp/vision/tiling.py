"""From an image to the tiles the vision tower looks at, pixel for pixel as the reference makes them.

"anyres": the whole image squashed to one square tile, then the image itself, fitted on the pinpoint that shows most of
it and cut into tiles row by row. "pad": the image on a grey square, one tile. `Grid` is the geometry of "anyres",
computed from the size alone; merging and token counting use it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from redvtp.vision.geometry import Tiling
from redvtp.vision.images import validate_padded_size, validate_size
from redvtp.vision.media import Size

# The image mean of SigLIP (0.5) as the reference rounds it.
GREY = (127, 127, 127)
# Rows resized at a time when an image is padded, so that the whole square never exists.
_STRIP = 512


@dataclass(frozen=True, slots=True)
class Grid:
    """Where an image lies on its canvas of tiles, in canvas pixels.

    canvas: (width, height), multiples of the tile.
    size: (width, height) the image is resized to.
    offset: (left, top) of the resized image.
    """

    canvas: Size
    size: Size
    offset: tuple[int, int]


def choose_grid(width: int, height: int, pinpoints: Sequence[Size]) -> Grid:
    """The pinpoint that keeps most of the image's pixels; of equals, the least wasteful, then the first listed."""
    validate_size(width, height)
    canvas = max(pinpoints, key=lambda pinpoint: _pinpoint_rank(width, height, pinpoint))
    scale_width, scale_height = canvas[0] / width, canvas[1] / height
    if scale_width < scale_height:
        size = (canvas[0], min(math.ceil(height * scale_width), canvas[1]))
    else:
        size = (min(math.ceil(width * scale_height), canvas[0]), canvas[1])
    return Grid(canvas, size, ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2))


def _pinpoint_rank(width: int, height: int, pinpoint: Size) -> tuple[int, int]:
    scale = min(pinpoint[0] / width, pinpoint[1] / height)
    # Upscaling shows no more than the image has. int() here and ceil() at the resize are both the reference's.
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, effective - pinpoint[0] * pinpoint[1]


def tile_image(image: Image.Image, tiling: Tiling) -> Tensor:
    """Returns [tiles, 3, tile, tile] float32 in [-1, 1]; for "anyres" the squashed whole image is tile 0."""
    tile = tiling.tile
    if tiling.mode == "pad":
        validate_padded_size(*image.size)
        image = image.convert("RGB")
        return _normalise([_padded_tile(image, tile)])
    grid = choose_grid(*image.size, tiling.pinpoints)
    image = image.convert("RGB")
    canvas = Image.new("RGB", grid.canvas, (0, 0, 0))
    canvas.paste(image.resize(grid.size, Image.Resampling.BICUBIC), grid.offset)
    tiles = [image.resize((tile, tile), Image.Resampling.BICUBIC)]
    for top in range(0, grid.canvas[1], tile):
        tiles.extend(canvas.crop((left, top, left + tile, top + tile)) for left in range(0, grid.canvas[0], tile))
    return _normalise(tiles)


def _padded_tile(image: Image.Image, tile: int) -> Image.Image:
    """The image centred on a grey square, resized to a tile, without ever holding the square.

    PIL resizes the rows first, rounds to bytes, then resizes the columns. Doing the two by hand gives the same bytes,
    and the rows can be padded and resized a strip at a time. The square of a panorama 12,000 pixels wide has 430 MB.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (tile, side), GREY)
    for start in range(0, height, _STRIP):
        rows = min(_STRIP, height - start)
        strip = Image.new("RGB", (side, rows), GREY)
        strip.paste(image.crop((0, start, width, start + rows)), (left, 0))
        narrow.paste(strip.resize((tile, rows), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((tile, tile), Image.Resampling.BICUBIC)


def _pixel_table() -> Tensor:
    """The value of each byte: scaled in float64, rounded to float32, normalised in float32, like the reference."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(0.5)) / np.float32(0.5))


_PIXEL_VALUES = _pixel_table()


def _normalise(tiles: list[Image.Image]) -> Tensor:
    """Bytes of [tiles] images to [tiles, 3, tile, tile] float32."""
    stacked = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
    return _PIXEL_VALUES[stacked.permute(0, 3, 1, 2).long()].contiguous()
