"""The vision module for tiled images: SigLIP tower, projector and newline token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from redvtp.vision.geometry import TowerConfig
from redvtp.vision.media import MediaItem, VisionModule
from redvtp.vision.merge import merge_tiles
from redvtp.vision.tiled import TiledImage
from redvtp.vision.tower import VisionTower

# Tiles the tower takes in one call, so that its memory does not grow with the number of images that come together.
TILES_AT_ONCE = 16


class TiledEncoder(VisionModule):
    """Tiles of all items through the tower and the projector together, then each item's tokens merged.

    select_layer: hidden state of the tower whose features are used; -1 is the output of the last layer.
    hidden_size: width of the language model.
    largest: treatment of the items that have the most tiles.
    """

    def __init__(self, tower: TowerConfig, select_layer: int, hidden_size: int, largest: TiledImage) -> None:
        super().__init__()
        self.tower = VisionTower(tower, select_layer)
        # The exact (erf) GELU, unlike the tower's tanh form (reference: the builder of mlp2x_gelu projectors).
        self.projector = nn.Sequential(
            nn.Linear(tower.hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.newline = nn.Parameter(torch.empty(hidden_size))
        self._largest = largest

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """Visual tokens [visual, hidden] of each item. Items must have a `TiledImage` treatment."""
        if not items:
            return []
        pixels = [item.inputs() for item in items]
        features = torch.cat([self.tile_features(tiles) for tiles in torch.cat(pixels).split(TILES_AT_ONCE)])
        parts = features.split([tiles.shape[0] for tiles in pixels])
        return [self._merge(part, item) for part, item in zip(parts, items, strict=True)]

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Tiles [tiles, 3, tile, tile] to features [tiles, patches * patches, hidden]."""
        features: Tensor = self.projector(self.tower(tiles.to(self.newline.device, self.newline.dtype)))
        return features

    def _merge(self, features: Tensor, item: MediaItem) -> Tensor:
        if not isinstance(item.treatment, TiledImage):
            raise TypeError(f"not an item for tiles: {item.treatment!r}")
        return merge_tiles(features, item.size, self.newline, item.treatment.tiling)

    def encode_largest(self) -> Tensor:
        """As many tiles as one call of the tower takes, then one image with the most tiles."""
        tile = self._largest.tiling.tile
        self.tile_features(torch.zeros(TILES_AT_ONCE, 3, tile, tile))
        size = self._largest.most_tiles()
        tiles = self._largest.inputs(Image.new("RGB", size))
        (visual,) = self.encode([MediaItem("image", b"", size, self._largest, lambda: tiles)])
        return visual
