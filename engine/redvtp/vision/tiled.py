"""Images as tiles: the treatment and the vision path of checkpoints with a SigLIP tower over square tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from redvtp.vision.boxes import visual_token_boxes
from redvtp.vision.geometry import Tiling
from redvtp.vision.media import Box, Size
from redvtp.vision.merge import visual_token_count
from redvtp.vision.tiling import tile_image


@dataclass(frozen=True, slots=True)
class TiledImage:
    """A `redvtp.vision.media.Treatment`: the image's tiles go through the tower one by one, then are merged."""

    tiling: Tiling

    def count(self, size: Size) -> int:
        return visual_token_count(*size, self.tiling)

    def boxes(self, size: Size) -> list[Box | None]:
        return visual_token_boxes(*size, self.tiling)

    def coarse(self, size: Size) -> range:
        """Tile 0 of "anyres", which comes first."""
        return range(self.tiling.side**2 if self.tiling.mode == "anyres" else 0)

    def inputs(self, image: Image.Image) -> Tensor:
        """[tiles, 3, tile, tile] float32."""
        return tile_image(image, self.tiling)

    def largest_size(self) -> Size:
        """The size with the most visual tokens: it fills a pinpoint, so nothing is cut away."""
        return max(self._full_sizes(), key=self.count)

    def most_tiles(self) -> Size:
        """A size that is cut into the most tiles."""
        return max(self._full_sizes(), key=lambda size: size[0] * size[1])

    def _full_sizes(self) -> Sequence[Size]:
        return self.tiling.pinpoints if self.tiling.mode == "anyres" else ((self.tiling.tile, self.tiling.tile),)
