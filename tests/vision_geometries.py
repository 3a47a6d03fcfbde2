"""Checkpoint geometries and image sizes the vision tests share."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies

from golden_data import checkpoint_dir
from redvtp.families.config import load_config
from redvtp.vision.geometry import SO400M_PATCH14_384, Mode, Tiling, TowerConfig
from redvtp.vision.path import TiledVision


def tiled_vision(checkpoint: str, overrides: dict[str, str] | None = None) -> TiledVision:
    """The vision path of a checkpoint that cuts images into tiles."""
    vision = load_config(checkpoint_dir(checkpoint), overrides).vision
    assert isinstance(vision, TiledVision)
    return vision


def with_geometry(tower: TowerConfig, limit: int | None, pinpoints: list[tuple[int, int]]) -> Tiling:
    """ "anyres" tiles of this tower; limit: of tiles; pinpoints in tiles, (width, height)."""
    tile = tower.image_size
    canvases = tuple((width * tile, height * tile) for width, height in pinpoints)
    return Tiling(tile, tower.patch_size, "anyres", canvases, limit)


def in_mode(tiling: Tiling, mode: Mode, newline: bool = True, pooled: bool = False) -> Tiling:
    return replace(tiling, mode=mode, newline=newline, pooled=pooled)


def tower(image_size: int, patch_size: int) -> TowerConfig:
    return replace(SO400M_PATCH14_384, image_size=image_size, patch_size=patch_size)


UP_TO_SIX = [(width, height) for width in range(1, 7) for height in range(1, 7)]
LLADA_V = with_geometry(SO400M_PATCH14_384, 4, UP_TO_SIX)
GEOMETRIES = {
    "tiny": tiled_vision("tiny-llada-v").alone.tiling,
    "tiny-b": tiled_vision("tiny-llada-v-b").alone.tiling,
    "LLaDA-V": LLADA_V,
    "no limit": with_geometry(tower(74, 14), None, UP_TO_SIX),
    "limit of one tile": with_geometry(tower(56, 14), 1, UP_TO_SIX),
    "few pinpoints": with_geometry(tower(60, 14), 9, [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]),
    "one patch": with_geometry(tower(14, 14), 2, UP_TO_SIX),
    "one patch, one tile": with_geometry(tower(14, 14), 1, [(6, 1), (1, 6)]),
}

SIZES = strategies.tuples(strategies.integers(1, 2_000), strategies.integers(1, 2_000)) | strategies.sampled_from(
    [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3), (2, 9_999), (4_096, 4_096), (384, 384), (768, 384), (1, 2)]
)
