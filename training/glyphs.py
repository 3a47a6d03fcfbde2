"""Atlases of small pictures: handwritten digits, printed characters, words and shapes, as opacity masks of one cell.

A cell is one 16 x 16 patch of the vision tower. All variants (font, size, shift, tilt) are drawn once, so that making
an image is only picking and blending. Of scikit-learn's handwritten digits a fixed fifth never appears in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from training.vocab import GLYPHS, NAMES, SHAPES

Split = Literal["train", "test"]
Masks = NDArray[np.float32]

CELL = 16
_OVERSAMPLE = 4
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
)
_TEST_SHARE = 0.2
_HAND_VARIANTS = 24


@dataclass(frozen=True)
class Atlas:
    """Opacity masks in [0, 1], `variants` of each: handwriting [n, 16, 16] per digit, printed [n, 16, 16] per glyph,
    names [n, 16, 32] per word, shapes [n, 16, 16] per shape, box [n, 16, 16], sign and comb [n, 3, 16, 16] (left,
    middle, right part)."""

    handwriting: list[Masks]
    printed: list[Masks]
    names: list[Masks]
    shapes: list[Masks]
    box: Masks
    sign: Masks
    comb: Masks


@cache
def atlas(split: Split) -> Atlas:
    """The pictures of one split; only the handwriting differs between the two."""
    rng = np.random.default_rng(20_240_601)
    return Atlas(
        handwriting=_handwriting(split),
        printed=[_printed(glyph) for glyph in GLYPHS],
        names=[word_masks(name, rng) for name in NAMES],
        shapes=[np.stack([_shape(shape, rng) for _ in range(80)]) for shape in SHAPES],
        box=np.stack([_plate(rng, left=True, right=True) for _ in range(40)]),
        sign=np.stack([[_plate(rng, left=part == 0, right=part == 2) for part in range(3)] for _ in range(40)]),
        comb=np.stack([_comb(part) for part in range(3)])[None],
    )


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _handwriting(split: Split) -> list[Masks]:
    data = load_digits()
    order = np.random.default_rng(20_240_605).permutation(len(data.target))
    border = int(len(order) * _TEST_SHARE)
    part = order[:border] if split == "test" else order[border:]
    rng = np.random.default_rng(20_240_602 if split == "train" else 20_240_603)
    # Training bends the digits further than evaluation does: there are few writers, and new ones differ more.
    variants, bend = (_HAND_VARIANTS, 1.0) if split == "train" else (4, 0.35)
    digits: list[Masks] = []
    for digit in range(10):
        pictures = data.images[part][data.target[part] == digit]
        digits.append(np.stack([_bent(picture, bend, rng) for picture in pictures for _ in range(variants)]))
    return digits


def _bent(picture: NDArray[np.float64], bend: float, rng: np.random.Generator) -> Masks:
    """An 8 x 8 digit drawn about 13 pixels high in a cell; turned, slanted, stretched, shifted, thinner or bolder."""
    image = Image.fromarray((picture * (255 / 16)).astype(np.uint8))
    angle = math.radians(rng.uniform(-13, 13)) * bend
    slant = rng.uniform(-0.18, 0.18) * bend
    # Source pixels for one pixel of the cell.
    wide, high = 0.62 + rng.uniform(-0.09, 0.09) * bend, 0.61 + rng.uniform(-0.07, 0.07) * bend
    shift_x, shift_y = rng.uniform(-1.4, 1.4, 2) * max(bend, 0.6)
    cos, sin = math.cos(angle), math.sin(angle)
    middle = CELL / 2
    a, b, d, e = cos * wide, (sin + slant) * wide, -sin * high, cos * high
    c = 4 - a * (middle + shift_x) - b * (middle + shift_y)
    f = 4 - d * (middle + shift_x) - e * (middle + shift_y)
    drawn = image.transform((CELL, CELL), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    strength = math.exp(rng.uniform(-0.4, 0.4) * bend)
    mask: Masks = np.clip((np.asarray(drawn, dtype=np.float32) / 255) ** strength * 1.15, 0, 1)
    return mask


def _text(text: str, font: str, size: int, width: int, shift: tuple[float, float]) -> Masks:
    """Text centred in a mask of width x 16."""
    image = Image.new("L", (width, CELL), 0)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(font, size))
    # Whole pixels: at fractional places Pillow cuts the first row of some glyphs off.
    x = round((width - (right - left)) / 2 - left + shift[0])
    y = round((CELL - (bottom - top)) / 2 - top + shift[1])
    draw.text((x, y), text, fill=255, font=_font(font, size))
    mask: Masks = np.asarray(image, dtype=np.float32) / np.float32(255)
    return mask


def _printed(glyph: str) -> Masks:
    shifts = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    return np.stack(
        [_text(glyph, font, size, CELL, shift) for font in _FONTS for size in (12, 13, 14) for shift in shifts]
    )


def word_masks(name: str, rng: np.random.Generator) -> Masks:
    """A printed word over two cells: [n, 16, 32]."""
    variants = []
    for font in _FONTS:
        for size in (10, 11, 12):
            left, _, right, _ = _font(font, size).getbbox(name)
            room = max(0, int(2 * CELL - 1 - (right - left)) // 2)
            for _ in range(6):
                shift = (int(rng.integers(-min(room, 3), min(room, 3) + 1)), int(rng.integers(-1, 2)))
                variants.append(_text(name, font, size, 2 * CELL, shift))
    return np.stack(variants)


def _antialiased(draw_on: Image.Image) -> Masks:
    small = draw_on.resize((CELL, CELL), Image.Resampling.BOX)
    mask: Masks = np.asarray(small, dtype=np.float32) / np.float32(255)
    return mask


def _shape(shape: str, rng: np.random.Generator) -> Masks:
    image = Image.new("L", (CELL * _OVERSAMPLE, CELL * _OVERSAMPLE), 0)
    draw = ImageDraw.Draw(image)
    radius = rng.uniform(5.5, 7.0) * _OVERSAMPLE
    x, y = (CELL / 2 + rng.uniform(-0.9, 0.9, 2)) * _OVERSAMPLE

    def corners(count: int, start: float, inner: float | None = None) -> list[tuple[float, float]]:
        points = count * (2 if inner else 1)
        return [
            (
                x + radius * (inner if inner and i % 2 else 1) * math.cos(start + 2 * math.pi * i / points),
                y + radius * (inner if inner and i % 2 else 1) * math.sin(start + 2 * math.pi * i / points),
            )
            for i in range(points)
        ]

    up = -math.pi / 2
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif shape == "square":
        side = radius * 0.85
        draw.rectangle((x - side, y - side, x + side, y + side), fill=255)
    elif shape == "triangle":
        draw.polygon(corners(3, up), fill=255)
    elif shape == "star":
        draw.polygon(corners(5, up, inner=0.42), fill=255)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x + radius * 0.72, y), (x, y + radius), (x - radius * 0.72, y)], fill=255)
    else:
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    return _antialiased(image)


def _plate(rng: np.random.Generator, *, left: bool, right: bool) -> Masks:
    """A filled cell with a margin above and below, and at the sides where the plate ends."""
    image = Image.new("L", (CELL * _OVERSAMPLE, CELL * _OVERSAMPLE), 0)
    margin = rng.uniform(0.3, 1.2, 4) * _OVERSAMPLE
    edge = CELL * _OVERSAMPLE
    radius = int(rng.integers(0, 4)) * _OVERSAMPLE
    x0 = margin[0] if left else -4 * _OVERSAMPLE
    x1 = edge - margin[1] if right else edge + 4 * _OVERSAMPLE
    ImageDraw.Draw(image).rounded_rectangle((x0, margin[2], x1, edge - margin[3]), radius, fill=255)
    return _antialiased(image)


def _comb(part: int) -> Masks:
    """The frame of one cell of a form's value: thin lines, a thick one where the value begins and ends."""
    mask = np.zeros((CELL, CELL), dtype=np.float32)
    mask[0], mask[-1] = 1, 1
    mask[:, 0] = 0.35
    if part == 0:
        mask[:, :2] = 1
    if part == 2:
        mask[:, -2:] = 1
    return mask
