"""A diffusion vision-language model: the family's vision module and a language model.

One plain torch model for the embedded engine and for vLLM; `redvtp.models.loading` fills it from a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redvtp.families.config import DvlmConfig
from redvtp.models.operations import TORCH, Operations
from redvtp.models.transformer import TP_PLAN, Transformer


class Dvlm(nn.Module):
    """The whole model of one checkpoint."""

    TP_PLAN = TP_PLAN

    def __init__(self, config: DvlmConfig, operations: Operations = TORCH) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build(config.hidden_size)
        self.language_model = Transformer(config, operations)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [tokens, hidden] of ids [tokens]."""
        embeddings: Tensor = self.language_model.embed_tokens(ids)
        return embeddings

    def embed_prompt(self, ids: Tensor, visual_spans: tuple[tuple[int, int], ...], visual: list[Tensor]) -> Tensor:
        """Prompt embeddings [tokens, hidden]: ids [tokens] with the visual tokens written over their placeholders.

        visual_spans: half-open token ranges, one for each image.
        visual: [span, hidden] each.
        """
        embeddings = self.embed(ids)
        for (start, end), tokens in zip(visual_spans, visual, strict=True):
            embeddings[start:end] = tokens
        return embeddings
