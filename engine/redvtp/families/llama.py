"""Building block: language models with Llama's config keys and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redvtp.families.fields import Supported, check_supported, is_plain_rope
from redvtp.families.language import LanguageConfig, read_language
from redvtp.families.weights import LAYERS

_SUPPORTED: Supported = {
    "hidden_act": ("silu", ("silu",)),
    "mlp_bias": (False, (False,)),
    "tie_word_embeddings": (False, (False,)),
}

LLAMA_NAMES = (
    ("model.embed_tokens.", "language_model.embed_tokens."),
    ("model.layers.", LAYERS),
    ("model.norm.", "language_model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that older transformers saved.
LLAMA_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"


def read_llama(raw: Mapping[str, Any], supported: Supported, qkv_bias: bool = False) -> LanguageConfig:
    """supported: keys of this family beside Llama's usual ones."""
    check_supported(raw, {**_SUPPORTED, **supported})
    scaling = raw.get("rope_scaling")
    if scaling is not None and not (isinstance(scaling, Mapping) and is_plain_rope(scaling)):
        raise ValueError(f"rope_scaling {scaling!r} is not supported; supported: None")
    return read_language(raw, qkv_bias=qkv_bias)
