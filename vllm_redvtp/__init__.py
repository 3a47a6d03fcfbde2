"""vllm-redvtp: serves diffusion vision-language models in vLLM and prunes their visual tokens while they decode.

vLLM finds `register` through the entry point `vllm.general_plugins: redvtp` and calls it in every process it starts.
It only writes names into vLLM's registries; models, tokenizers and workers are imported by vLLM when a LLaDA-V
checkpoint is served. Other models are served as if the plugin were not there.
"""

from __future__ import annotations

PLUGIN_NAME = "redvtp"

_registered = False


def register() -> None:
    """Make vLLM know the LLaDA-V architecture. Safe to call again."""
    global _registered
    if _registered:
        return
    from pathlib import Path

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.chat_templates.registry import register_chat_template_fallback_path

    from vllm_redvtp.cli import install_plugin_option
    from vllm_redvtp.config import ARCHITECTURE, TOKENIZER_MODE, DvlmModelConfig, LlavaLladaConfig

    AutoConfig.register(LlavaLladaConfig.model_type, LlavaLladaConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "vllm_redvtp.models:LlavaLLaDAModelLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = DvlmModelConfig
    # The tokenizer is the plain Hugging Face one; the mode exists to choose our renderer (as vLLM's own "inkling"
    # mode does).
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm_redvtp.renderer", "DiffusionRenderer")
    register_chat_template_fallback_path(
        LlavaLladaConfig.model_type, Path(__file__).parent / "templates" / "llada_v.jinja"
    )
    install_plugin_option()
    _registered = True
