"""LLaDA-V (GSAI-ML): LLaDA with Llama's names, tiles as they are, an optional limit of tiles."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from redvtp.families.family import Family, SamplerTraits
from redvtp.families.language import LanguageConfig
from redvtp.families.llada_tokens import find_llada_tokens
from redvtp.families.llama import LLAMA_IGNORED, LLAMA_NAMES, read_llama
from redvtp.families.llava import LLAVA_IGNORED, LLAVA_NAMES, read_llava
from redvtp.families.weights import WeightNames
from redvtp.prompt import BOS, END_HEADER, EOS, LLADA_CHAT, START_HEADER, SpecialTokens

# The mask and <|eot_id|> are missing on purpose: the reference lets the model choose them.
_SAMPLER = SamplerTraits(suppressed=(BOS, EOS, START_HEADER, END_HEADER))


def _find_tokens(tokenizer: PreTrainedTokenizerBase, _: LanguageConfig) -> SpecialTokens:
    return find_llada_tokens(tokenizer, LLADA_V.name, _SAMPLER.suppressed)


LLADA_V = Family(
    name="LLaDA-V",
    architecture="LlavaLLaDAModelLM",
    model_type="llava_llada",
    read_language=partial(read_llama, supported={"attention_bias": (False, (False,))}),
    read_vision=partial(read_llava, pooled=False, limited=True),
    find_tokens=_find_tokens,
    template=LLADA_CHAT,
    weights=WeightNames(prefixes=(*LLAVA_NAMES, *LLAMA_NAMES), ignored=f"{LLAVA_IGNORED}|{LLAMA_IGNORED}"),
    sampler=_SAMPLER,
)
