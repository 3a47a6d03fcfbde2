"""What the engine needs to know about a checkpoint, read from its `config.json` and checked once.

`load_config(model_dir)` reads that file; `read_config` takes the same keys from a mapping (vLLM hands its copy over).
A checkpoint this engine cannot run exactly is refused here, with the key, its value and what is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redvtp.families.family import Family
from redvtp.families.fields import read_json
from redvtp.families.language import LanguageConfig
from redvtp.families.registry import family_of
from redvtp.prompt import SpecialTokens
from redvtp.vision.media import VisionPath


@dataclass(frozen=True, slots=True, kw_only=True)
class DvlmConfig(LanguageConfig):
    """A checkpoint: the sizes of its language model, and its family and vision path.

    family: what the architecture implies.
    vision: how its images become visual tokens.
    """

    family: Family
    vision: VisionPath

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Ids with a meaning for denoising. Raises ValueError naming what the checkpoint lacks."""
        return self.family.find_tokens(tokenizer, self)


def load_config(model_dir: str | Path, overrides: Mapping[str, Any] | None = None) -> DvlmConfig:
    """Reads `model_dir/config.json`; `overrides` replaces top-level keys before anything is checked."""
    raw = read_json(Path(model_dir) / "config.json")
    return read_config({**raw, **(overrides or {})}, model_dir)


def read_config(raw: Mapping[str, Any], model_dir: str | Path) -> DvlmConfig:
    """Checks and picks the keys of a config.json; model_dir: the checkpoint's folder."""
    family = family_of(raw)
    language = family.read_language(raw)
    sizes = {each.name: getattr(language, each.name) for each in fields(language)}
    return DvlmConfig(**sizes, family=family, vision=family.read_vision(raw, Path(model_dir)))
