"""vllm-redvtp: serves diffusion vision-language models in vLLM and prunes their visual tokens while they decode.

vLLM finds `register` through the entry point `vllm.general_plugins: redvtp` and calls it in every process it starts.
It only writes names into vLLM's registries; models, tokenizers and workers are imported by vLLM when a checkpoint
of one of the families is served. Other models are served as if the plugin were not there.
"""

from __future__ import annotations

_registered = False


def register() -> None:
    """Make vLLM know the architectures. Safe to call again."""
    global _registered
    if _registered:
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.chat_templates.registry import (
        get_chat_template_fallback_path,
        register_chat_template_fallback_path,
    )

    from redvtp.families.registry import FAMILIES
    from vllm_redvtp.engine_config import CONFIG_CLASSES, TOKENIZER_MODE
    from vllm_redvtp.hook import DvlmModelConfig, refuse_explicit
    from vllm_redvtp.patches import install_check_of_flags, install_plugin_option

    for model_type, config_class in CONFIG_CLASSES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
    for family in FAMILIES:
        ModelRegistry.register_model(family.architecture, "vllm_redvtp.served_model:ServedDvlm")
        MODELS_CONFIG_MAP[family.architecture] = DvlmModelConfig
        # Families share model types, and vLLM warns of a second template for one.
        if get_chat_template_fallback_path(family.model_type, "") is None:
            register_chat_template_fallback_path(family.model_type, family.template.path)
    # The tokenizer is the plain Hugging Face one; the mode exists to choose our renderer, as vLLM's "inkling"
    # mode does.
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm_redvtp.frontend.renderer", "DiffusionRenderer")
    install_plugin_option()
    install_check_of_flags(refuse_explicit)
    _registered = True
