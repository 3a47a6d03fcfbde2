"""A request's images and prompt, in the front-end: tiles for the tower, a slot in the prompt for every visual token.

vLLM's usual way replaces a placeholder's tokens inside the tokenised prompt. The reference instead splits the text at
`<image>` and tokenises the pieces (losing the first token of each later one), so here the prompt is decoded back to
text and rebuilt by the same `redvtp.prompt` functions the engine uses. The number of slots comes from the image sizes
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.processor import (
    MultiModalProcessingResult,
    PlaceholderFeaturesInfo,
    PromptUpdate,
)

from redvtp.checkpoint.config import DvlmConfig
from redvtp.models.visual_cache import content_digest
from redvtp.prompt import IMAGE_MARK, SpecialTokens, build_prompt_tokens, special_tokens, split_prompt
from redvtp.vision.merge import visual_token_count
from redvtp.vision.tiling import ImageMode, image_mode, tile_image
from vllm_redvtp.engine_config import engine_config


def decode_prompt(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a tokenised prompt, special tokens included. Raises ValueError for ids no token has."""
    if any(not 0 <= token < len(tokenizer) for token in ids):
        raise ValueError(f"the prompt has token ids outside [0, {len(tokenizer) - 1}]")
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class DvlmProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a model's inputs. Our models have no Hugging Face processor class, and need none."""

    @cached_property
    def config(self) -> DvlmConfig:
        return engine_config(self.ctx.model_config)

    @cached_property
    def special(self) -> SpecialTokens:
        return special_tokens(cast(Any, self.get_tokenizer()), self.config)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.visual_tokens(*self.largest_image(), image_mode(self.config, 1))}

    def largest_image(self) -> tuple[int, int]:
        """The (width, height) with the most visual tokens: it fills a pinpoint, so nothing is unpadded."""
        mode = image_mode(self.config, 1)
        sizes = self.config.image_grid_pinpoints or ((self.config.tower.image_size,) * 2,)
        return max(sizes, key=lambda size: self.visual_tokens(size[0], size[1], mode))

    def visual_tokens(self, width: int, height: int, mode: ImageMode) -> int:
        return visual_token_count(width, height, self.config, mode)


class DvlmDummyInputs(BaseDummyInputsBuilder[DvlmProcessingInfo]):
    """The worst case vLLM warms the processor up with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_MARK * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        width, height = self.info.largest_image()
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


class DvlmProcessor(BaseMultiModalProcessor[DvlmProcessingInfo]):
    """Images to tiles, prompt to tokens. All errors are ValueErrors that vLLM answers with HTTP 400."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        if hf_kwargs:
            raise ValueError(f"mm_processor_kwargs are not supported, got {', '.join(sorted(hf_kwargs))}")
        images = [_pil_image(image) for image in hf_data.get("images", ())]
        mode = image_mode(self.info.config, len(images))
        tiles = [tile_image(image, self.info.config, mode.mode) for image in images]
        return BatchFeature(
            {
                "pixel_values": torch.cat(tiles),
                "num_tiles": torch.tensor([part.shape[0] for part in tiles]),
                "image_sizes": torch.tensor([image.size for image in images]),
                "image_digest": torch.tensor([list(content_digest(image)) for image in images], dtype=torch.uint8),
            }
        )

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        # vLLM also asks with nothing in hf_inputs.
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            # vLLM's own hash of an image is whatever the client says (`uuid`).
            "image_digest": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list[PromptUpdate]:
        return []

    def _maybe_apply_prompt_updates(
        self, mm_items: MultiModalDataItems, mm_res: MultiModalProcessingResult
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Rebuild the prompt around the images instead of matching tokens in it."""
        self._validate_mm_kwargs(mm_res.kwargs, mm_items.get_all_counts())
        images = mm_items.get_items("image", ImageProcessorItems)
        sizes = [images.get_image_size(index) for index in range(images.get_count())]
        mode = image_mode(self.info.config, len(sizes))
        counts = [self.info.visual_tokens(size.width, size.height, mode) for size in sizes]
        tokenizer, placeholder = cast(Any, self.info.get_tokenizer()), self.info.special.placeholder_id
        pieces = split_prompt(tokenizer, decode_prompt(tokenizer, mm_res.prompt_ids), len(counts))
        prompt = build_prompt_tokens(pieces, counts, placeholder)
        slots = [
            PlaceholderFeaturesInfo(
                modality="image", item_idx=index, start_idx=start, tokens=[placeholder] * (end - start), is_embed=None
            )
            for index, (start, end) in enumerate(prompt.visual_spans)
        ]
        return list(prompt.ids), {"image": slots}


def _pil_image(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise ValueError(f"images must be given as files, URLs or PIL images, got {type(image).__name__}")
    return image
