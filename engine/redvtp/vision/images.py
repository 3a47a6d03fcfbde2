"""Opening images safely: every file becomes an RGB image or a ValueError that says what is wrong with it.

`open_image` is for files; `validate_size` is the same size rule for images that vLLM's media loader opened.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

# The longest side a JPEG can have. Tiling needs memory for one tile's width times the longer side: 75 MB here.
MAX_SIDE = 65_535
# Resizing a padded tall image takes time with the square of its side: 3 s at this limit, a minute at MAX_SIDE.
MAX_PADDED_SIDE = 16_384


def validate_size(width: int, height: int) -> None:
    """Raises ValueError for a size not to be decoded or tiled: empty, too long, or more pixels than PIL's limit."""
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} has no pixels")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"image of {width}x{height} is longer than {MAX_SIDE} pixels; scale it down")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"image of {width}x{height} has more than {limit:,} pixels; scale it down")


def validate_padded_size(width: int, height: int) -> None:
    """`validate_size` for an image that will be padded to a square."""
    validate_size(width, height)
    if max(width, height) > MAX_PADDED_SIDE:
        raise ValueError(
            f"image of {width}x{height} is longer than {MAX_PADDED_SIDE} pixels, the limit where images are padded "
            f"to a square (several images in one request); scale it down"
        )


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Reads an image (first frame), turns it upright and converts it to RGB; alpha is dropped, as in the reference.

    EXIF orientation is applied, as by vLLM's media loader; the reference ignores it. The size is checked before any
    pixel is decoded.
    """
    name = f"image file {source}" if isinstance(source, (str, Path)) else "image"
    try:
        with warnings.catch_warnings():
            # PIL warns from its limit on; the size rule below refuses and names the size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source)
        with opened as image:
            _validate_size_of(name, image)
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not in an image format that PIL reads") from error
    except Image.DecompressionBombError as error:
        # PIL refuses by itself, before the size is known here, from twice the limit on.
        raise ValueError(f"{name} has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; scale it down") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except (OSError, SyntaxError, EOFError) as error:
        # PIL's decoders report broken data in all of these ways.
        raise ValueError(f"{name} is damaged or cut short: {error}") from error


def _validate_size_of(name: str, image: Image.Image) -> None:
    try:
        validate_size(*image.size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
