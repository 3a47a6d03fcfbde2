"""LaViDa with Dream: Llama's names, biases, fewer key heads, pooled tiles, logits of the next position."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from redvtp.families.family import Family, SamplerTraits
from redvtp.families.language import LanguageConfig
from redvtp.families.llama import LLAMA_IGNORED, LLAMA_NAMES, read_llama
from redvtp.families.llava import LLAVA_IGNORED, LLAVA_NAMES, read_llava
from redvtp.families.weights import WeightNames
from redvtp.prompt import CHATML, PLACEHOLDER, SpecialTokens

_IM_END = "<|im_end|>"
# Marks slots for visual embeddings in tokenizers of the Qwen kind; those of tiny test checkpoints may lack it.
_IMAGE_PAD = "<|image_pad|>"


def _find_tokens(tokenizer: PreTrainedTokenizerBase, language: LanguageConfig) -> SpecialTokens:
    """Mask and end token by their ids in config.json."""
    vocab, size = tokenizer.get_vocab(), len(tokenizer)

    def known(key: str, token: int | None) -> int:
        if token is None or not 0 <= token < size:
            raise ValueError(f"config.json must have a {key} that the tokenizer has (of {size} tokens), got {token!r}")
        return token

    placeholders = [vocab[text] for text in (_IMAGE_PAD, PLACEHOLDER) if text in vocab]
    if not placeholders:
        raise ValueError(f"the tokenizer has neither {_IMAGE_PAD} nor {PLACEHOLDER}, to stand where visual tokens go")
    ends = (known("eos_token_id", language.eos_token_id), *(vocab[text] for text in (_IM_END,) if text in vocab))
    return SpecialTokens(
        mask_id=known("mask_token_id", language.mask_token_id),
        end_ids=ends,
        placeholder_id=placeholders[0],
        suppressed=(),
        vocab=size,
    )


LAVIDA_DREAM = Family(
    name="LaViDa (Dream)",
    architecture="LlavaDreamForMaskedDiffusion",
    model_type="llava_dream",
    read_language=partial(read_llama, supported={"use_sliding_window": (False, (False,))}, qkv_bias=True),
    read_vision=partial(read_llava, pooled=True, limited=False),
    find_tokens=_find_tokens,
    template=CHATML,
    weights=WeightNames(prefixes=(*LLAVA_NAMES, *LLAMA_NAMES), ignored=f"{LLAVA_IGNORED}|{LLAMA_IGNORED}"),
    # top_k: of transformers' generation settings, which the reference takes because nothing sets another.
    sampler=SamplerTraits(shifted_logits=True, top_k=50, scores_proposed_masks=True),
)
