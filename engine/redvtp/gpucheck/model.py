"""A LLaDA-V with random weights, made on the device: the language model of the published sizes, or a small one.

Only the language model has memory. Prompts are random embeddings, so no image goes through the tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redvtp.denoising.sequence import Sequence
from redvtp.families.config import DvlmConfig, read_config
from redvtp.kv.blocks import blocks_needed
from redvtp.models.dvlm import Dvlm
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import SpecialTokens
from redvtp.pruning.resolve import policy_for


@dataclass(frozen=True, slots=True)
class Sizes:
    """text: prompt tokens beside the visual ones. visual: visual tokens. gen_length, block_length: of the canvas."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    text: int
    visual: int
    gen_length: int
    block_length: int

    @property
    def tokens(self) -> int:
        return self.text + self.visual + self.gen_length


# LLaDA-V, its largest picture, and a canvas of two blocks: a step of one of them is a response step of 32 rows.
PUBLISHED = Sizes(4096, 12288, 32, 32, 126464, 43, 3699, 64, 32)
SMALL = Sizes(128, 256, 3, 4, 512, 6, 90, 16, 8)
_ROPE_THETA = 500000.0
# The queries and keys of one head: uneven attention, so that scores differ.
_GAIN = 1.4


@dataclass(frozen=True, slots=True)
class RandomModel:
    """special: its last id is the mask, which no step chooses."""

    sizes: Sizes
    model: Dvlm
    special: SpecialTokens

    def sequence(
        self, number: int, denoising: DenoisingParams, pruning: PruningParams, blocks: list[int], visual: int
    ) -> Sequence:
        """A request before its first step. visual: visual tokens of its prompt, at most those of the sizes."""
        config, text = self.model.config, self.sizes.text
        policy = policy_for(pruning, denoising, config.num_hidden_layers, text + visual, (visual,))
        generator = torch.Generator(self.model.device).manual_seed(number)
        shape = (text + visual, config.hidden_size)
        embeds = torch.randn(shape, generator=generator, device=self.model.device, dtype=self.model.dtype)
        # A few words in front of the image and the others behind it.
        span = (text // 2, text // 2 + visual)
        return Sequence(str(number), embeds, (span,), denoising, policy, self.special, block_table=blocks)


def random_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> RandomModel:
    """The same weights at every call on one kind of device."""
    with torch.device("meta"):
        model = Dvlm(config_of(sizes))
    language_model = model.language_model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in language_model.named_parameters():
        if weight.dim() == 1:
            weight.data.fill_(1.0)
        else:
            gain = _GAIN if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            columns = 1 if name.startswith("embed_tokens") else weight.shape[1]
            weight.data.normal_(0, gain / columns**0.5, generator=generator)
    mask = sizes.vocab - 1
    special = SpecialTokens(mask_id=mask, end_ids=(), placeholder_id=mask - 1, suppressed=(mask,), vocab=sizes.vocab)
    return RandomModel(sizes, model.eval().requires_grad_(False), special)


def block_tables(tokens: list[int], block_size: int) -> tuple[int, list[list[int]]]:
    """(blocks of the cache, a shuffled block table for each sequence of so many tokens)."""
    needed = [blocks_needed(count, block_size) for count in tokens]
    shuffled = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).split(needed)
    return sum(needed), [table.tolist() for table in shuffled]


def config_of(sizes: Sizes) -> DvlmConfig:
    raw: dict[str, Any] = {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": _ROPE_THETA,
        "torch_dtype": "bfloat16",
        # The tower of the published checkpoint: known by its name, and never built.
        "mm_vision_tower": "siglip2-so400m-patch14-384",
        "mm_hidden_size": 1152,
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
    }
    return read_config(raw, Path())
