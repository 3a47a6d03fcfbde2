"""A picture of a pruning: which patches kept their visual token, and how each scored.

Patches that lost their visual token are grey and hatched; a tint on the others shows their scores, from blue (least
attention) to red. If an image has a coarse tile and a fine grid, the fine token of a patch decides; its grey is
darker if the coarse token over it is dropped too. `redvtp generate --heatmap` draws from a run, `redvtp heatmap`
(`draw_saved`) from a stored trace or API response. `scripts/demo.py` adds a legend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from redvtp.families.config import DvlmConfig
from redvtp.trace import survivors
from redvtp.vision.media import Box

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# From least to most attention: blue, cyan, green, yellow, red.
_PALETTE = np.array([[40, 60, 190], [40, 180, 220], [90, 200, 90], [250, 215, 60], [220, 40, 30]], dtype=np.float32)
_TINT = 0.5
# Brightness of a pruned patch under a kept token of the coarse tile, and of one under none.
_GREY_SEEN = 0.75
_GREY_UNSEEN = 0.45
# Dark diagonal lines on pruned patches: grey alone does not stand out on a grey picture.
_HATCH = 0.7
_HATCH_LINES = 48
_GAP = 8
# Narrower pictures are enlarged, so that the legend fits and patches are visible.
_LEGEND_WIDTH = 480
_LEGEND_FONT = 15


def draw(
    images: Sequence[Image.Image], config: DvlmConfig, importance: Sequence[float], kept: Sequence[int]
) -> Image.Image:
    """The images of one request side by side, each in its size.

    importance: one score for each visual token of the request, images in order.
    kept: indices of those that stayed.

    Raises ValueError when the scores are not those of these images.
    """
    treatments = config.vision.of_images([image.size for image in images])
    boxes = [treatment.boxes(image.size) for treatment, image in zip(treatments, images, strict=True)]
    total = sum(len(part) for part in boxes)
    if total != len(importance):
        raise ValueError(
            f"{len(importance)} scores for {len(images)} image(s) that have {total} visual tokens together"
        )
    scores = _stretch(np.asarray(importance, dtype=np.float32))
    stays = np.zeros(total, dtype=bool)
    stays[list(kept)] = True
    panels = []
    first = 0
    for image, treatment, part in zip(images, treatments, boxes, strict=True):
        end = first + len(part)
        coarse = np.zeros(len(part), dtype=bool)
        coarse[treatment.coarse(image.size)] = True
        panels.append(_panel(image, part, scores[first:end], stays[first:end], coarse))
        first = end
    return side_by_side(panels)


def draw_saved(
    images: Sequence[Image.Image], config: DvlmConfig, saved: object, *, legend: bool = False
) -> Image.Image:
    """The same from a stored trace, or from an API response to a request with `"redvtp_report": "full"`.

    legend: add what the colours say, below. Small pictures are enlarged for it.

    Raises ValueError when it is neither, or when there is no pruning in it.
    """
    prunings = prunings_of(saved)
    kept = survivors(prunings)
    picture = draw(images, config, prunings[0]["importance"], kept)
    return with_legend(picture, len(kept), prunings[0]["visual_before"]) if legend else picture


def with_legend(picture: Image.Image, kept: int, total: int) -> Image.Image:
    """The picture above a strip that tells dropped patches from kept ones."""
    factor = math.ceil(_LEGEND_WIDTH / picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    height, line = 2 * _LEGEND_FONT + 4 * _GAP, _LEGEND_FONT + 2 * _GAP
    drawn = Image.new("RGB", (picture.width, picture.height + height), "white")
    drawn.paste(picture, (0, 0))
    heat = np.tile(np.linspace(0, 1, 120, dtype=np.float32), (_LEGEND_FONT, 1))
    white = np.full((*heat.shape, 3), 255, dtype=np.float32)
    dropped = _hatched(white * np.float32(_GREY_SEEN), np.zeros(heat.shape, dtype=bool), period=8)
    stayed = white * (1 - _TINT) + _colour(heat) * _TINT
    rows = (
        (stayed, f"kept, {kept:,} of {total:,}: looked at least (blue) to most (red)"),
        (dropped, f"dropped, {total - kept:,} of {total:,}: grey and hatched"),
    )
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(_LEGEND_FONT)
    for number, (swatch, words) in enumerate(rows):
        top = picture.height + _GAP + number * line
        drawn.paste(_image(swatch), (_GAP, top))
        pen.text((_GAP + 128, top + _LEGEND_FONT / 2), words, fill="black", font=font, anchor="lm")
    return drawn


def prunings_of(saved: object) -> list[Mapping[str, Any]]:
    """The prunings of a trace or an API response read from JSON, checked. Raises ValueError saying what is wrong."""
    if not isinstance(saved, Mapping):
        raise ValueError("this is neither an API response nor a trace: both are JSON objects")
    transferred = saved.get("kv_transfer_params")
    report = transferred.get("redvtp") if isinstance(transferred, Mapping) else saved
    prunings = report.get("prunings") if isinstance(report, Mapping) else None
    if prunings is None:
        raise ValueError(
            'no "prunings" in this response; ask for them with "vllm_xargs": {"redvtp_report": "full"}, unstreamed'
        )
    if not isinstance(prunings, Sequence) or not all(_is_pruning(pruning) for pruning in prunings):
        raise ValueError(
            '"prunings" are damaged: each needs "importance", one number for each visual token, and "kept"'
        )
    if not prunings:
        raise ValueError("nothing was pruned in this request, so there are no scores to draw")
    for before, after in itertools.pairwise(prunings):
        if after["visual_before"] != len(before["kept"]):
            raise ValueError('"prunings" are damaged: one does not begin with what the one before it kept')
    return list(prunings)


def _is_pruning(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    scores, kept, before = value.get("importance"), value.get("kept"), value.get("visual_before")
    return (
        isinstance(scores, list)
        and isinstance(kept, list)
        and len(scores) == before
        and all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
        and all(isinstance(index, int) and 0 <= index < len(scores) for index in kept)
    )


def _stretch(scores: Floats) -> Floats:
    """Scores [visual] to [0, 1] by rank: they span orders of magnitude, so their values would show little."""
    if scores.size < 2 or scores.min() == scores.max():
        return np.ones_like(scores)
    ranks = np.argsort(np.argsort(scores, kind="stable")).astype(np.float32)
    return ranks / np.float32(scores.size - 1)


def _panel(image: Image.Image, boxes: Sequence[Box | None], scores: Floats, stays: Mask, coarse: Mask) -> Image.Image:
    """One image, drawn over.

    boxes, scores, stays: its visual tokens.
    coarse: those that show all of it at once.
    """
    shape, kept_tokens = (image.height, image.width), stays.astype(np.float32)
    coarse_boxes = [box if of_all else None for box, of_all in zip(boxes, coarse, strict=True)]
    fine_boxes = [None if of_all else box for box, of_all in zip(boxes, coarse, strict=True)]
    seen_coarse = _raster(coarse_boxes, kept_tokens, shape)
    seen = _raster(fine_boxes, kept_tokens, shape)
    heat = _raster(fine_boxes, scores, shape)
    heat = np.where(np.isnan(heat), _raster(coarse_boxes, scores, shape), heat)

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    # Pixels without a fine token (the tower drops a margin of each tile) follow the coarse tile.
    kept = np.where(np.isnan(seen), np.nan_to_num(seen_coarse), seen) > 0
    brightness = np.where(np.nan_to_num(seen_coarse) > 0, _GREY_SEEN, _GREY_UNSEEN)[..., None]
    base = np.where(kept[..., None], pixels, grey * brightness)
    tint = np.where(kept & ~np.isnan(heat), _TINT, 0)[..., None]
    drawn = base * (1 - tint) + _colour(np.nan_to_num(heat)) * tint
    return _image(_hatched(drawn, kept, period=max(4, max(shape) // _HATCH_LINES)))


def _hatched(pixels: Floats, kept: Mask, period: int) -> Floats:
    """Diagonal lines, `period` pixels apart, where `kept` is false."""
    rows, columns = np.indices(kept.shape)
    line = ((rows + columns) % period < max(1, period // 4)) & ~kept
    return np.where(line[..., None], pixels * np.float32(_HATCH), pixels)


def _image(pixels: Floats) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGB")


def _raster(boxes: Sequence[Box | None], values: Floats, shape: tuple[int, int]) -> Floats:
    """values [tokens] painted over their boxes: [height, width] float32, NaN where there is no box."""
    painted = np.full(shape, np.nan, dtype=np.float32)
    for box, value in zip(boxes, values, strict=True):
        if box is None:
            continue
        left, top, right, bottom = box
        if right > left and bottom > top:
            rows, columns = _pixels(top, bottom, shape[0]), _pixels(left, right, shape[1])
            painted[rows, columns] = np.fmax(painted[rows, columns], value)
    return painted


def _pixels(start: float, end: float, limit: int) -> slice:
    """Pixels whose centre lies in [start, end), at least one: a small image has several tokens to a pixel."""
    first = math.floor(start) if end - start < 1 else math.ceil(start - 0.5)
    first = min(first, limit - 1)
    return slice(first, max(first + 1, min(math.ceil(end - 0.5), limit)))


def _colour(heat: Floats) -> Floats:
    """[height, width] in [0, 1] to [height, width, 3] in [0, 255]."""
    steps = np.linspace(0, 1, len(_PALETTE))
    return np.stack([np.interp(heat, steps, _PALETTE[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """One picture of several, each in its size."""
    if len(panels) == 1:
        return panels[0]
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    picture = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        picture.paste(panel, (left, 0))
        left += panel.width + _GAP
    return picture
