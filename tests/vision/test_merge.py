"""Merging: the golden token order, and token counts and boxes that agree with it on any size."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from golden_data import Case, cases
from redvtp.families.config import load_config
from redvtp.vision.boxes import visual_token_boxes
from redvtp.vision.geometry import SO400M_PATCH14_384, Mode, Tiling
from redvtp.vision.merge import merge_tiles, visual_token_count
from redvtp.vision.tiling import choose_grid, tile_image
from vision_geometries import GEOMETRIES, LLADA_V, SIZES, in_mode, tiled_vision, with_geometry

_REFUSED = "is too narrow|limit where images are padded"
# (mode, newline, pooled)
ALL_MODES: list[tuple[Mode, bool, bool]] = [
    ("anyres", True, False),
    ("pad", True, False),
    ("pad", False, False),
    ("anyres", True, True),
    ("pad", True, True),
]
TILINGS = st.builds(
    lambda tiling, mode: in_mode(tiling, *mode), st.sampled_from(list(GEOMETRIES.values())), st.sampled_from(ALL_MODES)
)


def _num_tiles(size: tuple[int, int], tiling: Tiling) -> int:
    if tiling.mode == "pad":
        return 1
    canvas = choose_grid(*size, tiling.pinpoints).canvas
    return 1 + canvas[0] * canvas[1] // tiling.tile**2


def _newline(case: Case) -> Tensor:
    with safe_open(case.model_dir / "model.safetensors", "pt") as file:
        newline: Tensor = file.get_tensor("model.image_newline")
    return newline


@pytest.mark.parametrize("case", [case for case in cases() if case.image_files], ids=str)
def test_count_from_the_size_equals_the_reference(case: Case) -> None:
    config = load_config(case.model_dir, case.config_overrides)
    counts = config.vision.counts([(width, height) for width, height in case.meta["image_sizes"]])
    assert sum(counts) == case.meta["num_visual_tokens_total"]


@pytest.mark.parametrize(
    "case",
    [case for case in cases(tensor="projected_features") if case.has("visual_tokens")],
    ids=str,
)
def test_merged_projected_features_equal_the_reference(case: Case) -> None:
    tiling = tiled_vision(case.checkpoint, case.config_overrides).alone.tiling
    (width, height) = case.meta["image_sizes"][0]
    features = case.base("projected_features")
    merged = merge_tiles(features, (width, height), _newline(case), tiling)
    # Only the scaled-down cases compute anything here, and they with the same function: equal to the last bits.
    torch.testing.assert_close(merged, case.base("visual_tokens"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "tokens"), [((768, 768), 196 + 28 * 29), ((384, 384), 196 + 14 * 15)])
def test_lavida_pools_27_patches_to_14_tokens(size: tuple[int, int], tokens: int) -> None:
    pinpoints = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    tiling = in_mode(with_geometry(SO400M_PATCH14_384, None, pinpoints), "anyres", pooled=True)
    assert visual_token_count(*size, tiling) == tokens


@pytest.mark.parametrize("case", cases(tensor="pooled_features"), ids=str)
def test_pooled_tile_is_the_references(case: Case) -> None:
    """In "pad" mode the tokens of an image are its one tile, so every tile can be looked at by itself."""
    tiling = in_mode(tiled_vision(case.checkpoint).alone.tiling, "pad", newline=False, pooled=True)
    for tile, expected in zip(case.base("projected_features"), case.base("pooled_features"), strict=True):
        assert torch.equal(merge_tiles(tile[None], (9, 9), _newline(case), tiling), expected)


def test_square_image_of_four_tiles_has_the_most_tokens_of_llada_v() -> None:
    assert visual_token_count(768, 768, LLADA_V) == 729 + 54 * 55 == 3699


@given(size=SIZES, tiling=TILINGS)
@settings(deadline=None)
def test_count_is_the_number_of_merged_tokens_and_of_boxes(size: tuple[int, int], tiling: Tiling) -> None:
    features = torch.zeros(_num_tiles(size, tiling), tiling.patches**2, 1)
    try:
        count = visual_token_count(*size, tiling)
    except ValueError as error:
        # Only some sizes of some geometries are refused.
        assert re.search(_REFUSED, str(error))  # noqa: PT017
        if tiling.mode == "pad":
            return
        with pytest.raises(ValueError, match=_REFUSED):
            merge_tiles(features, size, torch.ones(1), tiling)
        return
    merged = merge_tiles(features, size, torch.ones(1), tiling)
    boxes = visual_token_boxes(*size, tiling)
    assert merged.shape == (count, 1)
    # The features are zeros and the newline is one, so the newlines show where they are.
    assert [box is None for box in boxes] == [bool(value) for value in merged[:, 0]]


def _merge_by_hand(features: Tensor, size: tuple[int, int], newline: Tensor, tiling: Tiling) -> Tensor:
    """The token order without any tensor trick, for grids that are not scaled down."""
    side, tile = tiling.patches, tiling.tile
    canvas = choose_grid(*size, tiling.pinpoints).canvas
    across, down = canvas[0] // tile, canvas[1] // tile
    cols, rows = across * side, down * side
    skip_cols = skip_rows = 0
    if size[0] / size[1] > cols / rows:
        skip_rows = (rows - int(size[1] * (cols / size[0]))) // 2
    else:
        skip_cols = (cols - int(size[0] * (rows / size[1]))) // 2
    tokens = list(features[0])
    for row in range(skip_rows, rows - skip_rows):
        tokens.extend(
            features[1 + row // side * across + col // side][row % side * side + col % side]
            for col in range(skip_cols, cols - skip_cols)
        )
        tokens.append(newline)
    return torch.stack(tokens)


@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)))
@settings(deadline=None, max_examples=50)
def test_unscaled_order_is_base_tile_then_rows_with_newlines(size: tuple[int, int]) -> None:
    tiling = GEOMETRIES["no limit"]
    features = torch.randn(_num_tiles(size, tiling), tiling.patches**2, 3)
    newline = torch.full((3,), 7.0)
    merged = merge_tiles(features, size, newline, tiling)
    assert torch.equal(merged, _merge_by_hand(features, size, newline, tiling))


def _position_image(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 0 to 255; blue is full, unlike padding."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height), Image.Resampling.BILINEAR)
    green = Image.linear_gradient("L").resize((width, height), Image.Resampling.BILINEAR)
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 255)))


@pytest.mark.parametrize("name", ["tiny", "tiny-b", "no limit", "limit of one tile", "few pinpoints"])
@pytest.mark.parametrize(
    ("mode", "size"),
    [
        *itertools.product(
            [mode for mode in ALL_MODES if not mode[2]],
            [(300, 200), (200, 300), (333, 140), (97, 500), (256, 256), (620, 410)],
        ),
        # Pooling weighs patches unevenly, so there is no telling what a token at the edge of the padding saw. These
        # sizes have none.
        *itertools.product([("anyres", True, True)], [(300, 300), (300, 600), (600, 300)]),
        (("pad", True, True), (300, 300)),
    ],
    ids=str,
)
def test_a_token_is_made_of_the_pixels_in_its_box(
    name: str, mode: tuple[Mode, bool, bool], size: tuple[int, int]
) -> None:
    """Patches are averaged instead of run through a tower, so a token holds the mean position of the pixels it saw."""
    tiling = in_mode(GEOMETRIES[name], *mode)
    side, patch = tiling.patches, tiling.patch
    tiles = tile_image(_position_image(*size), tiling)[:, :, : side * patch, : side * patch]
    means = tiles.unfold(2, patch, patch).unfold(3, patch, patch).mean(dim=(-1, -2)).flatten(2).transpose(1, 2)
    tokens = merge_tiles(means, size, torch.zeros(3), tiling)
    padding = -1.0 if tiling.mode == "anyres" else 127 / 127.5 - 1
    compared = 0
    for token, box in zip(tokens, visual_token_boxes(*size, tiling), strict=True):
        image_share = (token[2] - padding) / (1 - padding)
        if box is None or image_share < 0.2:
            continue  # a newline, or hardly anything but padding
        centre = torch.tensor([(box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]])
        seen = ((token[:2] - (1 - image_share) * padding) / image_share + 1) / 2
        # Resize filters and the gradient's bytes blur positions a little; a wrong patch is 5 % off or more.
        assert (centre - seen).abs().max() < 0.03
        compared += 1
    assert compared >= tiling.side


@given(size=SIZES, tiling=TILINGS)
@settings(deadline=None)
def test_boxes_lie_in_the_image(size: tuple[int, int], tiling: Tiling) -> None:
    try:
        boxes = visual_token_boxes(*size, tiling)
    except ValueError as error:
        assert re.search(_REFUSED, str(error))  # noqa: PT017
        return
    for left, top, right, bottom in filter(None, boxes):
        assert 0 <= left <= right <= size[0]
        assert 0 <= top <= bottom <= size[1]


def test_line_of_pixels_keeps_its_base_tile_like_the_reference() -> None:
    """Unpadding 1 row to 4 patches leaves none of them: the reference goes on with the base tile alone."""
    assert visual_token_count(20_000, 1, GEOMETRIES["tiny"]) == 16
    # An odd number of patches leaves the middle row.
    assert visual_token_count(20_000, 1, LLADA_V) == 729 + 28


def test_scaled_to_nothing_is_refused_with_the_size() -> None:
    with pytest.raises(ValueError, match="image of 300x50 is too narrow"):
        visual_token_count(300, 50, GEOMETRIES["one patch, one tile"])


@pytest.mark.parametrize(
    ("size", "rows", "cols"),
    [
        # 54 x 61 patches left of 54 x 81: 1.06 times the side of four tiles, kept as they are.
        ((600, 540), 54, 61),
        # 54 x 67: 1.114 times, scaled down by it.
        ((660, 540), 48, 60),
    ],
)
def test_grid_is_scaled_down_only_from_a_tenth_over_the_limit(size: tuple[int, int], rows: int, cols: int) -> None:
    tiling = with_geometry(SO400M_PATCH14_384, 4, [(3, 2)])
    assert visual_token_count(*size, tiling) == 729 + rows * (cols + 1)


def test_features_of_another_image_are_refused() -> None:
    with pytest.raises(ValueError, match="image of 64x64 has 5 tiles, got features of 3"):
        merge_tiles(torch.zeros(3, 16, 8), (64, 64), torch.zeros(8), GEOMETRIES["tiny"])
