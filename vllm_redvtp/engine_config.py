"""config.json under vLLM: a Hugging Face config class for each model type, and what the engine reads in it.

Transformers has no class for these model types. `CONFIG_CLASSES` has one each, made from the registry of families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from redvtp.families.config import DvlmConfig, read_config
from redvtp.families.fields import value_at
from redvtp.families.registry import FAMILIES, family_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# The tokenizer mode that makes vLLM choose our renderer.
TOKENIZER_MODE = "redvtp"


class DvlmHfConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """A checkpoint's config.json unchanged; `engine_config` gives its meaning."""

    def __init__(self, **kwargs: Any) -> None:
        for name, key in _keys(kwargs).items():
            # vLLM looks for sizes under their usual names.
            if (size := value_at(kwargs, key)) is not None:
                kwargs.setdefault(name, size)
        super().__init__(**kwargs)


def _keys(raw: Mapping[str, Any]) -> Mapping[str, str]:
    try:
        return family_of(raw).keys
    except ValueError:
        # Transformers also makes a config without any keys.
        return {}


def _config_class(model_type: str) -> type[DvlmHfConfig]:
    name = "".join(part.capitalize() for part in model_type.split("_")) + "Config"
    # Transformers replaces an inherited `__init__`, but not one in the class body.
    body = {"model_type": model_type, "__init__": DvlmHfConfig.__init__, "__module__": __name__}
    made = type(name, (DvlmHfConfig,), body)
    # vLLM sends configs to its worker processes, and pickle finds a class by its module and name.
    globals()[name] = made
    return made


CONFIG_CLASSES = {
    model_type: _config_class(model_type) for model_type in dict.fromkeys(family.model_type for family in FAMILIES)
}


def engine_config(model_config: ModelConfig) -> DvlmConfig:
    """The engine's view of the served checkpoint, `--hf-overrides` included. Raises ValueError if it cannot run it."""
    return read_config(model_config.hf_config.to_dict(), model_config.model)
