"""Tiles: the golden pixels bit for bit, and the rules they follow on any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from golden_data import Case, cases
from redvtp.families.config import load_config
from redvtp.vision.geometry import Tiling
from redvtp.vision.images import open_image
from redvtp.vision.tiling import choose_grid, tile_image
from vision_geometries import GEOMETRIES, LLADA_V, SIZES, in_mode, tiled_vision

TILINGS = st.sampled_from(list(GEOMETRIES.values()))


@pytest.mark.parametrize("case", cases(tensor="pixel_values"), ids=str)
def test_pixels_from_the_png_equal_the_reference(case: Case) -> None:
    items = load_config(case.model_dir, case.config_overrides).vision.items([open_image(p) for p in case.image_files])
    assert torch.equal(torch.cat([item.inputs() for item in items]), case.base("pixel_values"))


@pytest.mark.parametrize(("checkpoint", "pooled"), [("tiny-llada-v", False), ("tiny-lavida", True)])
def test_mode_follows_the_checkpoint_for_one_image_and_pads_several(checkpoint: str, pooled: bool) -> None:
    anyres, padding = tiled_vision(checkpoint), tiled_vision(checkpoint, {"image_aspect_ratio": "pad"})
    for vision, mode in ((anyres, "anyres"), (padding, "pad")):
        assert vision.treatments(["image"]) == [vision.alone]
        assert (vision.alone.tiling.mode, vision.alone.tiling.newline, vision.alone.tiling.pooled) == (
            mode,
            True,
            pooled,
        )
        assert vision.treatments(["image"] * 3) == [vision.several] * 3
    several = anyres.several
    assert several == padding.several
    assert (several.tiling.mode, several.tiling.newline, several.tiling.pooled) == ("pad", False, False)


def test_largest_size_has_the_most_visual_tokens() -> None:
    vision = tiled_vision("tiny-llada-v")
    width, height = vision.largest_size()
    assert vision.counts([(width, height)])[0] == max(
        vision.counts([size])[0] for size in vision.alone.tiling.pinpoints
    )
    assert tiled_vision("tiny-llada-v", {"image_aspect_ratio": "pad"}).largest_size() == (56, 56)


def _choose_by_hand(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """The rule spelled out: most effective pixels, then least waste, then list order."""
    best, best_effective, best_waste = None, 0, math.inf
    for across, down in tiling.pinpoints:
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = across * down - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (across, down), effective, waste
    assert best is not None
    return best


@given(size=SIZES, tiling=TILINGS)
def test_the_pinpoint_is_the_rules_and_the_image_lies_inside_it(size: tuple[int, int], tiling: Tiling) -> None:
    grid = choose_grid(*size, tiling.pinpoints)
    assert grid.canvas == _choose_by_hand(*size, tiling)
    for axis in (0, 1):
        assert 1 <= grid.size[axis] <= grid.canvas[axis]
        assert 0 <= grid.canvas[axis] - grid.size[axis] - 2 * grid.offset[axis] <= 1
    assert grid.size[0] == grid.canvas[0] or grid.size[1] == grid.canvas[1]


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), tiling=TILINGS.filter(lambda t: t is not LLADA_V))
@settings(deadline=None, max_examples=40)
def test_tiles_stitch_back_to_the_padded_image(size: tuple[int, int], tiling: Tiling) -> None:
    image = Image.effect_noise(size, 80).convert("RGB")
    grid = choose_grid(*size, tiling.pinpoints)
    tile = tiling.tile
    tiles = tile_image(image, tiling)
    across, down = grid.canvas[0] // tile, grid.canvas[1] // tile
    assert tiles.shape == (1 + across * down, 3, tile, tile)
    canvas = torch.full((3, grid.canvas[1], grid.canvas[0]), -1.0)
    left, top = grid.offset
    resized = torch.from_numpy(np.asarray(image.resize(grid.size, Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    canvas[:, top : top + grid.size[1], left : left + grid.size[0]] = resized / 255 * 2 - 1
    for row in range(down):
        for col in range(across):
            expected = canvas[:, row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
            torch.testing.assert_close(tiles[1 + row * across + col], expected, rtol=0, atol=1e-6)


@given(size=st.tuples(st.integers(1, 700), st.integers(1, 1_300)), flip=st.booleans())
@settings(deadline=None, max_examples=40)
def test_padding_in_strips_equals_padding_the_whole_square(size: tuple[int, int], flip: bool) -> None:
    width, height = reversed(size) if flip else size
    tiling = in_mode(GEOMETRIES["tiny"], "pad")
    tile = tiling.tile
    image = Image.effect_noise((width, height), 80).convert("RGB")
    side = max(width, height)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((tile, tile), Image.Resampling.BICUBIC))
    pixels = tile_image(image, tiling)[0]
    assert np.array_equal(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), expected)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_extreme_shapes_are_tiled(size: tuple[int, int]) -> None:
    tiles = tile_image(Image.new("RGB", size, (200, 0, 0)), GEOMETRIES["tiny"])
    assert tiles.shape[1:] == (3, 56, 56)
    assert tiles.isfinite().all()


def test_image_too_long_to_pad_is_refused() -> None:
    with pytest.raises(ValueError, match="image of 20000x1 is longer than 16384 pixels"):
        tile_image(Image.new("RGB", (20_000, 1)), in_mode(GEOMETRIES["tiny"], "pad"))


def test_too_large_image_is_refused_before_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(ValueError, match="image of 100x100 has more than 5,000 pixels"):
        tile_image(image, GEOMETRIES["tiny"])
