"""The model families the engine runs, and all that tells one from another.

A checkpoint's `architectures` chooses its `Family` (LLaDA-V and LaViDa both say model_type `llava_llada`). Everything
else in the engine is written once and asks the family: which keys its `config.json` uses, how its tensors are named,
whether tiles are pooled, whether logits are shifted, how a conversation is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

# key -> (what a missing key means, what is supported). Each is a place where the reference would compute something
# else.
Supported = Mapping[str, tuple[Any, tuple[Any, ...]]]

_VISION: Supported = {
    "mm_patch_merge_type": ("flat", ("spatial_unpad",)),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_layer": (-2, (-2,)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_resampler_type": (None, (None,)),
    "mm_use_im_start_end": (False, (False,)),
    "mm_use_im_patch_token": (False, (False,)),
    "use_pos_skipping": (False, (False,)),
}
_POOLED: Supported = {
    "mm_spatial_pool_mode": ("bilinear", ("bilinear",)),
    "mm_pooler_ratio": (2, (2,)),
}
_LLAMA: Supported = {
    "hidden_act": ("silu", ("silu",)),
    "mlp_bias": (False, (False,)),
    "tie_word_embeddings": (False, (False,)),
    "rope_scaling": (None, (None,)),
}
_OLMO: Supported = {
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
_OLMO_KEYS = MappingProxyType(
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


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    name: for people. model_type: what its config.json says beside the architecture.
    supported: see `Supported`. keys: our name of a number -> the config.json key, where the two differ.
    layout: how its tensors are named (redvtp.models.loading). template: how a conversation is written (redvtp.prompt).
    aspect_ratios: pattern of the image_aspect_ratio values that are supported; `allowed_ratios` says them in words.
    qkv_bias: whether the attention projections have biases.
    pooled_tiles: every tile is pooled 2x2 after the projector.
    shifted_logits: what the model says at position i is about position i + 1, as in the language model it grew from.
    suppresses: bos, end of text and the header tokens are never chosen (eot and the mask may be).
    counts_surplus_rows: the head is not cut to the tokenizer's length, so the rows beyond it take their share of every
        probability (they still can never win: no token has their ids).
    top_k: only so many best tokens of a row have any probability. LaViDa's Dream takes 50, because transformers'
        generation settings say so where nobody else does; confidences are computed from what is left even when nothing
        is drawn.
    scores_proposed_masks: a canvas position for which the first step chose the mask id itself counts as undecided when
        visual tokens are scored.
    """

    name: str
    architecture: str
    model_type: str
    supported: Supported
    keys: Mapping[str, str] = field(default_factory=dict)
    layout: Literal["llama", "olmo"] = "llama"
    template: Literal["llada", "chatml"] = "llada"
    aspect_ratios: str = r"anyres|pad"
    allowed_ratios: str = "'anyres', 'pad'"
    qkv_bias: bool = False
    pooled_tiles: bool = False
    shifted_logits: bool = False
    suppresses: bool = False
    counts_surplus_rows: bool = False
    top_k: int | None = None
    scores_proposed_masks: bool = False


LLADA_V = Family(
    name="LLaDA-V",
    architecture="LlavaLLaDAModelLM",
    model_type="llava_llada",
    supported=MappingProxyType({**_LLAMA, "attention_bias": (False, (False,)), **_VISION}),
    aspect_ratios=r"anyres(_max_[1-9]\d*)?|pad",
    allowed_ratios="'anyres', 'anyres_max_<k>', 'pad'",
    suppresses=True,
)
LAVIDA_LLADA = Family(
    name="LaViDa (LLaDA)",
    architecture="LlavaLladaForMaskedDiffusion",
    model_type="llava_llada",
    supported=MappingProxyType({**_OLMO, **_VISION, **_POOLED}),
    keys=_OLMO_KEYS,
    layout="olmo",
    pooled_tiles=True,
    counts_surplus_rows=True,
    scores_proposed_masks=True,
)
LAVIDA_DREAM = Family(
    name="LaViDa (Dream)",
    architecture="LlavaDreamForMaskedDiffusion",
    model_type="llava_dream",
    supported=MappingProxyType({**_LLAMA, "use_sliding_window": (False, (False,)), **_VISION, **_POOLED}),
    template="chatml",
    qkv_bias=True,
    pooled_tiles=True,
    shifted_logits=True,
    top_k=50,
    scores_proposed_masks=True,
)
FAMILIES = MappingProxyType({family.architecture: family for family in (LLADA_V, LAVIDA_LLADA, LAVIDA_DREAM)})


def family_of(architectures: object) -> Family:
    """The family of a checkpoint whose config.json says `architectures`. Raises ValueError for one we do not run."""
    if isinstance(architectures, (list, tuple)) and len(architectures) == 1 and architectures[0] in FAMILIES:
        return FAMILIES[architectures[0]]
    raise ValueError(f"architectures {architectures!r} is not supported; supported: {', '.join(map(repr, FAMILIES))}")
