"""The vision path of checkpoints with a SigLIP tower over square tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redvtp.vision.geometry import TowerConfig
from redvtp.vision.media import Kind, Size, Treatment, VisionModule, VisionPath
from redvtp.vision.tiled import TiledImage


@dataclass(frozen=True, slots=True)
class TiledVision(VisionPath):
    """An image alone in its request has one treatment, each of several images another.

    tower: the whole tower as published.
    select_layer: hidden state of the tower whose features are used; -1 is the output of the last layer.
    alone: treatment of an image that is alone.
    several: treatment of each of several images.
    """

    tower: TowerConfig
    select_layer: int
    alone: TiledImage
    several: TiledImage

    def treatments(self, kinds: Sequence[Kind]) -> list[Treatment]:
        return [self.alone if len(kinds) == 1 else self.several] * len(kinds)

    def largest_size(self) -> Size:
        return self.alone.largest_size()

    def build(self, hidden_size: int) -> VisionModule:
        # Imported here: transformers' SigLIP takes a second, and a process that only counts tokens does not need it.
        from redvtp.vision.encoder import TiledEncoder

        return TiledEncoder(self.tower, self.select_layer, hidden_size, self.alone)
