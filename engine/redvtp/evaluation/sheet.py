"""A contact sheet: labelled pictures in rows, all of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Pixels across of each picture: narrower ones are enlarged, so that the label fits and patches are visible.
WIDTH = 240
_FONT_SIZE = 15
_LINE = 19
_GAP = 10


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture with a label. label: the lines above the picture."""

    picture: Image.Image
    label: tuple[str, ...]


def sheet(rows: Sequence[Sequence[Panel | None]]) -> Image.Image:
    """None leaves a place free. Each row is as high as its highest picture."""
    font = ImageFont.load_default(_FONT_SIZE)
    scaled = [[None if panel is None else _scaled(panel.picture) for panel in row] for row in rows]
    labels = [_LINE * max(len(panel.label) for panel in row if panel is not None) for row in rows]
    heights = [max(picture.height for picture in row if picture is not None) for row in scaled]
    columns = max(map(len, rows))
    size = (_GAP + columns * (WIDTH + _GAP), _GAP + sum(labels) + sum(heights) + len(rows) * _GAP)
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    top = _GAP
    for row, pictures, above, height in zip(rows, scaled, labels, heights, strict=True):
        for column, (panel, picture) in enumerate(zip(row, pictures, strict=True)):
            if panel is None or picture is None:
                continue
            left = _GAP + column * (WIDTH + _GAP)
            for number, line in enumerate(panel.label):
                pen.text((left, top + number * _LINE), line, fill="black", font=font)
            drawn.paste(picture, (left, top + above))
        top += above + height + _GAP
    return drawn


def _scaled(picture: Image.Image) -> Image.Image:
    height = max(1, round(picture.height * WIDTH / picture.width))
    # Enlarged pixels keep their edges: a patch of a small picture is only a few of them.
    how = Image.Resampling.NEAREST if picture.width < WIDTH else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((WIDTH, height), how)
