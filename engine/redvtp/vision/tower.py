"""The SigLIP vision tower, cut to the layers whose output is used.

Built from transformers' SigLIP modules, so weights inside the tower keep the names they have in a checkpoint. They come
from the checkpoint of the whole model, which was trained with its tower; the tower's repository holds other numbers.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from redvtp.vision.geometry import TowerConfig


class VisionTower(nn.Module):
    """Tiles to patch features: hidden state `select_layer` of the full tower, without its final norm and head."""

    def __init__(self, config: TowerConfig, select_layer: int = -2) -> None:
        super().__init__()
        self.config = config
        siglip = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.kept_layers(select_layer),
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act="gelu_pytorch_tanh",
        )
        # A PreTrainedModel would choose an attention; these modules are built without one and would run eagerly.
        siglip._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(siglip)
        self.encoder = SiglipEncoder(siglip)  # type: ignore[arg-type]  # annotated for the joint text and vision config

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [tiles, 3, tile, tile], normalised. Returns [tiles, side * side, hidden], patches row by row."""
        size = self.config.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels must be [tiles, 3, {size}, {size}], got {list(pixels.shape)}")
        weight = self.embeddings.patch_embedding.weight
        patches = self.embeddings.patch_embedding(pixels.to(dtype=weight.dtype)).flatten(2).transpose(1, 2)
        # The whole table, not a look-up by the module's index buffer: no checkpoint has that buffer, so it would be
        # empty in a model that was built on the meta device.
        hidden = patches + self.embeddings.position_embedding.weight
        features: Tensor = self.encoder(inputs_embeds=hidden).last_hidden_state
        return features
