"""LaViDa with LLaDA: OLMo's config keys and tensor names, pooled tiles, nothing suppressed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from redvtp.families.family import Family, SamplerTraits
from redvtp.families.fields import Supported, check_supported
from redvtp.families.language import LanguageConfig, read_language
from redvtp.families.llada_tokens import find_llada_tokens
from redvtp.families.llava import LLAVA_IGNORED, LLAVA_NAMES, read_llava
from redvtp.families.weights import LAYERS, WeightNames
from redvtp.prompt import LLADA_CHAT, SpecialTokens

_KEYS = MappingProxyType(
    {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "vocab_size": "embedding_size",
    }
)
_SUPPORTED: Supported = {
    "activation_type": ("silu", ("silu",)),
    "alibi": (False, (False,)),
    "attention_layer_norm": (False, (False,)),
    "bias_for_layer_norm": (False, (False, None)),
    "block_type": ("llama", ("llama",)),
    "block_group_size": (1, (1,)),
    "include_bias": (False, (False,)),
    "include_qkv_bias": (False, (False,)),
    "input_emb_norm": (False, (False,)),
    "layer_norm_type": ("rms", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "multi_query_attention": (None, (None, False)),
    "rope": (True, (True,)),
    "rope_full_precision": (True, (True,)),
    "scale_logits": (False, (False,)),
    "weight_tying": (False, (False,)),
}
_WEIGHTS = WeightNames(
    prefixes=(
        *LLAVA_NAMES,
        ("model.transformer.wte.", "language_model.embed_tokens."),
        ("model.transformer.blocks.", LAYERS),
        ("model.transformer.ln_f.", "language_model.norm."),
        ("model.transformer.ff_out.", "language_model.lm_head."),
    ),
    in_layer=(
        ("attn_norm.", "input_layernorm."),
        ("ff_norm.", "post_attention_layernorm."),
        ("q_proj.", "self_attn.q_proj."),
        ("k_proj.", "self_attn.k_proj."),
        ("v_proj.", "self_attn.v_proj."),
        ("attn_out.", "self_attn.o_proj."),
        ("ff_proj.", "mlp.gate_proj."),
        ("up_proj.", "mlp.up_proj."),
        ("ff_out.", "mlp.down_proj."),
    ),
    # Buffers that older transformers saved.
    ignored=rf"{LLAVA_IGNORED}|model\.transformer\.blocks\.\d+\.rotary_emb\.inv_freq$",
)
_SAMPLER = SamplerTraits(counts_surplus_rows=True, scores_proposed_masks=True)


def _read_language(raw: Mapping[str, Any]) -> LanguageConfig:
    check_supported(raw, _SUPPORTED)
    return read_language(raw, _KEYS)


def _find_tokens(tokenizer: PreTrainedTokenizerBase, _: LanguageConfig) -> SpecialTokens:
    return find_llada_tokens(tokenizer, LAVIDA.name, _SAMPLER.suppressed)


LAVIDA = Family(
    name="LaViDa (LLaDA)",
    architecture="LlavaLladaForMaskedDiffusion",
    model_type="llava_llada",
    keys=_KEYS,
    read_language=_read_language,
    read_vision=partial(read_llava, pooled=True, limited=False),
    find_tokens=_find_tokens,
    template=LLADA_CHAT,
    weights=_WEIGHTS,
    sampler=_SAMPLER,
)
