"""What a model family must say. Each family says it in one file of this folder; `registry.py` lists them.

The rest of the engine is written once and asks the `Family` of the checkpoint it runs, never its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redvtp.families.language import LanguageConfig
from redvtp.families.weights import WeightNames
from redvtp.prompt import ChatTemplate, SpecialTokens, load_tokenizer
from redvtp.vision.media import VisionPath


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTraits:
    """What a family's reference does with logits and with the mask.

    suppressed: texts of the special tokens that are never chosen at a masked position.
    shifted_logits: logits at position i are about position i + 1, as in the language model the family grew from.
    top_k: only so many best tokens of a row have any probability; confidences are computed from these, also when
        nothing is drawn. None: all tokens.
    counts_surplus_rows: the head is not cut to the tokenizer's length. The rows beyond it take their share of every
        probability and never win: no token has their ids.
    scores_proposed_masks: a canvas position where a step chose the mask id counts as undecided when visual tokens are
        scored.
    """

    suppressed: tuple[str, ...] = ()
    shifted_logits: bool = False
    top_k: int | None = None
    counts_surplus_rows: bool = False
    scores_proposed_masks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """One model family.

    name: for people.
    architecture: the only entry of `architectures` in config.json.
    model_type: the value of `model_type` in config.json.
    marked_by: further keys of config.json and their values, where families share an architecture.
    keys: field of LanguageConfig -> its key in config.json, where the two differ; see `fields.value_at`.
    read_language: config.json -> sizes of the language model. Raises ValueError for what is not supported.
    read_vision: (config.json, checkpoint folder) -> vision path. Raises ValueError for what is not supported.
    load_tokenizer: checkpoint folder -> tokenizer.
    find_tokens: (tokenizer, sizes) -> special tokens, `sampler.suppressed` among them. Raises ValueError naming what
        is missing.
    template: how a conversation is written down.
    weights: how its tensors are named.
    sampler: what its reference does with logits.
    """

    name: str
    architecture: str
    model_type: str
    marked_by: Mapping[str, object] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    read_language: Callable[[Mapping[str, Any]], LanguageConfig]
    read_vision: Callable[[Mapping[str, Any], Path], VisionPath]
    load_tokenizer: Callable[[str | Path], PreTrainedTokenizerBase] = load_tokenizer
    find_tokens: Callable[[PreTrainedTokenizerBase, LanguageConfig], SpecialTokens]
    template: ChatTemplate
    weights: WeightNames
    sampler: SamplerTraits
