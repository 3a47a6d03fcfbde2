"""Hugging Face config classes of the families, and the engine's view of a served checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from redvtp.checkpoint.config import DvlmConfig
from redvtp.families.family import FAMILIES

if TYPE_CHECKING:
    from vllm.config import ModelConfig

TOKENIZER_MODE = "redvtp"


class LlavaLladaConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """config.json of a LLaDA-V or LaViDa checkpoint as it stands; `engine_config` gives its meaning."""

    model_type = "llava_llada"

    def __init__(self, **kwargs: Any) -> None:
        # vLLM asks for sizes under their usual names.
        for architecture in kwargs.get("architectures") or ():
            for ours, theirs in getattr(FAMILIES.get(architecture), "keys", {}).items():
                if theirs in kwargs:
                    kwargs.setdefault(ours, kwargs[theirs])
        super().__init__(**kwargs)


class LlavaDreamConfig(LlavaLladaConfig):  # type: ignore[no-untyped-call]
    """The same for LaViDa with the Dream language model."""

    model_type = "llava_dream"


def engine_config(model_config: ModelConfig) -> DvlmConfig:
    """The engine's view of the served checkpoint, `--hf-overrides` included. Raises ValueError if it cannot run it."""
    return DvlmConfig.from_dict(model_config.hf_config.to_dict(), model_config.model)
