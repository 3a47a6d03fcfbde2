"""A diffusion vision-language model: SigLIP tower, projector, newline token and language model.

All families are put together the same way; what differs is in `config.family`. One plain torch model for the embedded
engine and for vLLM; `redvtp.models.loading` fills it from a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redvtp.checkpoint.config import DvlmConfig
from redvtp.models.transformer import TP_PLAN, Transformer
from redvtp.vision.merge import merge_tiles
from redvtp.vision.tiling import ImageMode
from redvtp.vision.tower import VisionTower

# Tiles the tower takes in one call, so that its memory does not grow with the number of images that come together.
TILES_AT_ONCE = 16


class Dvlm(nn.Module):
    """The whole model of one checkpoint."""

    TP_PLAN = TP_PLAN

    def __init__(self, config: DvlmConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.tower, config.mm_vision_select_layer)
        # mlp2x_gelu; the exact (erf) GELU, unlike the tower's tanh form (reference: the projector builder of both).
        self.projector = nn.Sequential(
            nn.Linear(config.mm_hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.empty(config.hidden_size))
        self.language_model = Transformer(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.image_newline.dtype

    @property
    def device(self) -> torch.device:
        return self.image_newline.device

    def encode_images(self, pixels: list[Tensor], sizes: list[tuple[int, int]], mode: ImageMode) -> list[Tensor]:
        """Visual tokens of the images of one request.

        pixels: for each image [tiles, 3, tile, tile] float32; sizes: (width, height) in pixels.
        Returns for each image [visual, hidden], in the order the model reads them.
        """
        return self.encode_tiles(pixels, sizes, [mode] * len(pixels))

    def encode_tiles(self, pixels: list[Tensor], sizes: list[tuple[int, int]], modes: list[ImageMode]) -> list[Tensor]:
        """The same for images of several requests, which may be tiled in different ways."""
        if not pixels:
            return []
        features = torch.cat([self.tile_features(tiles) for tiles in torch.cat(pixels).split(TILES_AT_ONCE)])
        return [
            merge_tiles(part, size, self.image_newline, self.config, mode)
            for part, size, mode in zip(features.split([image.shape[0] for image in pixels]), sizes, modes, strict=True)
        ]

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Tiles [tiles, 3, tile, tile] to features [tiles, side * side, hidden] of the language model's width."""
        features: Tensor = self.projector(self.vision_tower(tiles.to(self.device, self.dtype)))
        return features

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [tokens, hidden] of ids [tokens]."""
        embeddings: Tensor = self.language_model.embed_tokens(ids)
        return embeddings

    def embed_prompt(self, ids: Tensor, visual_spans: tuple[tuple[int, int], ...], visual: list[Tensor]) -> Tensor:
        """Prompt embeddings [tokens, hidden]: ids [tokens] with the visual tokens written over their placeholders.

        visual_spans: half-open token ranges, one for each image; visual: [span, hidden] each.
        """
        embeddings = self.embed(ids)
        for (start, end), tokens in zip(visual_spans, visual, strict=True):
            embeddings[start:end] = tokens
        return embeddings
