"""The numbers that tiling, the tower and merging work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redvtp.vision.media import Size

Mode = Literal["anyres", "pad"]


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Sizes of a whole SigLIP tower as published; only the layers up to the selected one are run.

    num_hidden_layers: layers of the whole tower, the dropped last ones included.
    image_size: side of one tile in pixels.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"vision tower {key} must be at least 1, got {getattr(self, key)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision tower hidden_size {self.hidden_size} is not a multiple of "
                f"its num_attention_heads {self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"vision tower patch_size {self.patch_size} is larger than its image_size {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches along one side of a tile; the tower drops pixels that do not fill a patch."""
        return self.image_size // self.patch_size

    def kept_layers(self, select_layer: int) -> int:
        """Layers that must run to have the hidden state `select_layer` (-1 is the output of the last layer)."""
        return self.num_hidden_layers + 1 + select_layer


# The tower's repository is often not at hand, and a checkpoint's config.json names it without its sizes. SigLIP and
# SigLIP 2 agree.
SO400M_PATCH14_384 = TowerConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an image is cut into tiles, and how the features of its tiles become visual tokens.

    tile: side of a tile in pixels.
    patch: side of a patch in pixels.
    mode: "anyres" or "pad", see `redvtp.vision.tiling`.
    pinpoints: (width, height) of the canvases of "anyres" in pixels, multiples of the tile; the order breaks ties.
    max_grid_tiles: "anyres" scales the grid's features down to about so many tiles; None: no limit.
    newline: a newline token ends the tokens of "pad"; "anyres" always has one at the end of each row.
    pooled: every tile is pooled 2x2.
    """

    tile: int
    patch: int
    mode: Mode
    pinpoints: tuple[Size, ...] = ()
    max_grid_tiles: int | None = None
    newline: bool = True
    pooled: bool = False

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def side(self) -> int:
        """Visual tokens along one side of a tile: its patches, or half of them, rounded up, when pooled (27 -> 14)."""
        return -(-self.patches // 2) if self.pooled else self.patches
