"""Sizes of a language model, read from the keys most families' `config.json` use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from redvtp.families.fields import dtype_name, integer, number, optional_integer, rope_theta

_USUAL_KEYS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """What `redvtp.models.transformer` is built from, and what config.json says about its use.

    num_key_value_heads: fewer than num_attention_heads where several query heads share a key head.
    vocab_size: rows of the embedding and of the head.
    qkv_bias: whether the attention projections have biases.
    tokenizer_model_max_length: longest prompt the checkpoint was trained for; None when it does not say.
    torch_dtype: name of the dtype of its weights.
    eos_token_id, mask_token_id: as config.json says; None leaves them to the tokenizer.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    qkv_bias: bool
    max_position_embeddings: int
    tokenizer_model_max_length: int | None
    torch_dtype: str
    eos_token_id: int | None
    mask_token_id: int | None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")

    @property
    def max_length(self) -> int:
        """Longest prompt and response together."""
        return min(self.max_position_embeddings, self.tokenizer_model_max_length or self.max_position_embeddings)


def read_language(
    raw: Mapping[str, Any], keys: Mapping[str, str] = _USUAL_KEYS, qkv_bias: bool = False
) -> LanguageConfig:
    """keys: field of LanguageConfig -> its key in config.json, where the two differ; see `fields.value_at`."""

    def size(name: str, default: int | None = None) -> int:
        return integer(raw, keys.get(name, name), default)

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return LanguageConfig(
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        rms_norm_eps=number(raw, "rms_norm_eps"),
        rope_theta=rope_theta(raw),
        vocab_size=size("vocab_size"),
        qkv_bias=qkv_bias,
        max_position_embeddings=size("max_position_embeddings"),
        tokenizer_model_max_length=optional_integer(raw, "tokenizer_model_max_length"),
        torch_dtype=dtype_name(raw),
        eos_token_id=optional_integer(raw, "eos_token_id"),
        mask_token_id=optional_integer(raw, "mask_token_id"),
    )
