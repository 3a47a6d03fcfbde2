"""Heat maps tell dropped patches from kept ones, also on a grey picture, and say how in a legend."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from golden_data import checkpoint_dir
from redvtp.families.config import load_config
from redvtp.heatmap import draw_saved

CONFIG = load_config(checkpoint_dir("tiny-llada-v"))
GREY = Image.new("RGB", (96, 60), (128, 128, 128))
VISUAL = sum(len(treatment.boxes(GREY.size)) for treatment in CONFIG.vision.of_images([GREY.size]))


def picture(kept: list[int], *, legend: bool) -> Image.Image:
    pruning = {
        "visual_before": VISUAL,
        "visual_after": len(kept),
        "importance": [index / VISUAL for index in range(VISUAL)],
        "kept": kept,
    }
    return draw_saved([GREY], CONFIG, {"prunings": [pruning]}, legend=legend)


def test_dropped_patches_have_lines_and_no_colour_and_kept_ones_the_reverse() -> None:
    dropped, kept = (np.asarray(picture(stay, legend=False), dtype=int) for stay in ([], list(range(VISUAL))))
    assert dropped.shape == kept.shape == (GREY.height, GREY.width, 3)
    assert (dropped.max(axis=2) == dropped.min(axis=2)).all()
    # Each row and each column of a hatched picture has dark and light pixels.
    assert (dropped[..., 0].min(axis=0) < dropped[..., 0].max(axis=0)).all()
    assert (dropped[..., 0].min(axis=1) < dropped[..., 0].max(axis=1)).all()
    assert (kept.max(axis=2) - kept.min(axis=2) > 20).all()


@pytest.mark.parametrize("stay", [[0], list(range(VISUAL))])
def test_the_legend_stands_below_the_enlarged_picture(stay: list[int]) -> None:
    bare, drawn = picture(stay, legend=False), picture(stay, legend=True)
    # 96 pixels across are too few for the words; 480 are enough.
    above = drawn.crop((0, 0, 480, 300))
    assert above.tobytes() == bare.resize((480, 300), Image.Resampling.NEAREST).tobytes()
    strip = np.asarray(drawn.crop((0, 300, 480, drawn.height)), dtype=int)
    # Black letters on white, the colours of the scale, and the grey of what was dropped.
    assert {(0, 0, 0), (255, 255, 255)} <= {tuple(pixel) for pixel in strip.reshape(-1, 3)}
    assert (strip.max(axis=2) - strip.min(axis=2)).max() > 80
    # The words end before the picture does.
    assert (strip[:, -8:] == 255).all()
