"""A request's images and prompt in the front-end: inputs for the vision module, a prompt slot for every visual token.

vLLM's usual processor replaces a placeholder's tokens inside the tokenised prompt. The references split the text at
`<image>` and tokenise the pieces, so the prompt is decoded back to text and rebuilt by the functions of
`redvtp.prompt` that the engine uses too. The number of slots comes from the image sizes alone.
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

from redvtp.families.config import DvlmConfig
from redvtp.prompt import IMAGE_MARK, SpecialTokens, build_prompt_tokens, split_prompt
from vllm_redvtp.engine_config import engine_config


def decode_prompt(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a tokenised prompt, special tokens included. Raises ValueError for ids no token has."""
    if any(not 0 <= token < len(tokenizer) for token in ids):
        raise ValueError(f"the prompt has token ids outside [0, {len(tokenizer) - 1}]")
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class DvlmProcessingInfo(BaseProcessingInfo):
    """Facts about a model's inputs for vLLM. These models have no Hugging Face processor class and need none."""

    @cached_property
    def config(self) -> DvlmConfig:
        return engine_config(self.ctx.model_config)

    @cached_property
    def special(self) -> SpecialTokens:
        return self.config.special_tokens(cast(Any, self.get_tokenizer()))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        (largest,) = self.config.vision.counts([self.config.vision.largest_size()])
        return {"image": largest}


class DvlmDummyInputs(BaseDummyInputsBuilder[DvlmProcessingInfo]):
    """The worst case vLLM warms the processor up with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_MARK * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        width, height = self.info.config.vision.largest_size()
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


class DvlmProcessor(BaseMultiModalProcessor[DvlmProcessingInfo]):
    """Images to inputs of the vision module, prompt to tokens. Errors are ValueErrors, which vLLM answers with 400."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        if hf_kwargs:
            raise ValueError(f"mm_processor_kwargs are not supported, got {', '.join(sorted(hf_kwargs))}")
        images = [_pil_image(image) for image in hf_data.get("images", ())]
        items = self.info.config.vision.items(images)
        inputs = [item.inputs() for item in items]
        return BatchFeature(
            {
                "pixel_values": torch.cat(inputs),
                "num_tiles": torch.tensor([part.shape[0] for part in inputs]),
                "image_sizes": torch.tensor([item.size for item in items]),
                "image_digest": torch.tensor([list(item.digest) for item in items], dtype=torch.uint8),
            }
        )

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        # vLLM also calls this with nothing in hf_inputs.
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            # vLLM's hash of an image is the client's `uuid`, which can be wrong.
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
        counts = self.info.config.vision.counts([(size.width, size.height) for size in sizes])
        tokenizer, placeholder = cast(Any, self.info.get_tokenizer()), self.info.special.placeholder_id
        text, template = decode_prompt(tokenizer, mm_res.prompt_ids), self.info.config.family.template
        prompt = build_prompt_tokens(split_prompt(tokenizer, text, len(counts), template), counts, placeholder)
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
