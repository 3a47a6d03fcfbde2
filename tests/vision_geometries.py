"""Checkpoint geometries and image sizes the vision tests share."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies

from golden_data import checkpoint_dir
from redvtp.checkpoint.config import SO400M_PATCH14_384, DvlmConfig, TowerConfig, load_config


def with_geometry(tower: TowerConfig, aspect: str, pinpoints: list[tuple[int, int]]) -> DvlmConfig:
    """A checkpoint whose vision part looks like this; pinpoints in tiles, (width, height)."""
    tile = tower.image_size
    return replace(
        load_config(checkpoint_dir("tiny-llada-v")),
        tower=tower,
        image_aspect_ratio=aspect,
        image_grid_pinpoints=tuple((width * tile, height * tile) for width, height in pinpoints),
    )


def tower(image_size: int, patch_size: int) -> TowerConfig:
    return replace(SO400M_PATCH14_384, image_size=image_size, patch_size=patch_size)


UP_TO_SIX = [(width, height) for width in range(1, 7) for height in range(1, 7)]
LLADA_V = with_geometry(SO400M_PATCH14_384, "anyres_max_4", UP_TO_SIX)
GEOMETRIES = {
    "tiny": load_config(checkpoint_dir("tiny-llada-v")),
    "tiny-b": load_config(checkpoint_dir("tiny-llada-v-b")),
    "LLaDA-V": LLADA_V,
    "no limit": with_geometry(tower(74, 14), "anyres", UP_TO_SIX),
    "limit of one tile": with_geometry(tower(56, 14), "anyres_max_1", UP_TO_SIX),
    "few pinpoints": with_geometry(tower(60, 14), "anyres_max_9", [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]),
    "one patch": with_geometry(tower(14, 14), "anyres_max_2", UP_TO_SIX),
    "one patch, one tile": with_geometry(tower(14, 14), "anyres_max_1", [(6, 1), (1, 6)]),
}

SIZES = strategies.tuples(strategies.integers(1, 2_000), strategies.integers(1, 2_000)) | strategies.sampled_from(
    [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3), (2, 9_999), (4_096, 4_096), (384, 384), (768, 384), (1, 2)]
)
