"""The hook that sets vLLM's config up for diffusion decoding.

`DvlmModelConfig` is an entry of vLLM's MODELS_CONFIG_MAP. It runs before workers, scheduler and tokenizers are chosen,
once in every process that builds a config; engine and workers receive the finished one. A choice of the user that
cannot work is refused here, with a sentence.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from redvtp.families.registry import architectures
from vllm_redvtp.engine_config import TOKENIZER_MODE, engine_config

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.redvtp.hook")

# Small enough that a pruning frees blocks.
BLOCK_SIZE = 32
# What all paged attention kernels of graphics cards want a block to be a multiple of.
CARD_BLOCK_MULTIPLE = 16
# KV cache on a CPU when the user names no size: so many longest requests, within so many bytes, but always one.
CPU_KV_CACHE_REQUESTS = 8
CPU_KV_CACHE_BYTES = 4 << 30


class DvlmModelConfig(VerifyAndUpdateConfig):
    """MODELS_CONFIG_MAP entry of every family."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse a checkpoint that cannot run, before anything is loaded; set tokenizer mode and request checks."""
        family = engine_config(model_config).family
        if model_config.skip_tokenizer_init:
            raise ValueError(
                f"{family.name} needs its tokenizer to find the mask token; do not use --skip-tokenizer-init"
            )
        if model_config.enable_prompt_embeds:
            raise ValueError(f"--enable-prompt-embeds is not supported for {family.name}; send text and images")
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE
        # Compilation and CUDA graphs of vLLM assume vLLM's model runners.
        model_config.enforce_eager = True
        checker = "vllm_redvtp.frontend.refusals:RequestKnobs"
        if checker not in (model_config.logits_processors or []):
            model_config.logits_processors = [*(model_config.logits_processors or []), checker]
        _default_to_greedy(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Choose our scheduler and worker, and switch off what assumes one causal pass over the prompt."""
        from vllm_redvtp.attention.choice import chosen_backend
        from vllm_redvtp.knobs import misplaced_defaults, server_defaults
        from vllm_redvtp.patches import install_metrics
        from vllm_redvtp.scheduling.metrics import DenoisingProm
        from vllm_redvtp.server_options import vision_cache_bytes

        _refuse_unsupported_features(vllm_config)
        server_defaults(vllm_config)
        vision_cache_bytes(vllm_config)
        for name in misplaced_defaults(vllm_config):
            # Not refused: it may be another plugin's.
            logger.warning(
                '--additional-config: %r stands beside "redvtp" and not in it, so it sets no default of requests; '
                'for that write {"redvtp": {"%s": ...}}',
                name,
                name,
            )
        _use_our_parts(vllm_config)
        _schedule_synchronously(vllm_config)
        _size_kv_cache(vllm_config)
        chosen_backend(vllm_config)
        # The hook runs in every front-end, where metrics are collected.
        install_metrics(DenoisingProm)


def _default_to_greedy(model_config: ModelConfig) -> None:
    """Without a temperature from the client or the checkpoint: 0, the reference's default (vLLM's is 1).

    `--generation-config vllm` asks for vLLM's defaults and gets them.
    """
    if model_config.generation_config == "vllm":
        return
    given = {**model_config.try_get_generation_config(), **model_config.override_generation_config}
    if "temperature" not in given:
        model_config.override_generation_config = {**model_config.override_generation_config, "temperature": 0.0}


def refuse_explicit(arguments: EngineArgs, model_config: ModelConfig) -> None:
    """Raises ValueError for a flag that a user has set and that cannot work; unset ones are still None.

    `DvlmModelConfig` switches the same features off, but there a default of vLLM looks like a user's choice.
    """
    if architectures().isdisjoint(model_config.architectures):
        return
    set_by_user = {
        "--enable-prefix-caching": arguments.enable_prefix_caching,
        "--enable-chunked-prefill": arguments.enable_chunked_prefill,
        "--async-scheduling": arguments.async_scheduling,
    }
    reasons = {
        "--enable-prefix-caching": "keys and values of a prompt depend on the response",
        "--enable-chunked-prefill": "attention is bidirectional, so a prompt is computed whole",
        "--async-scheduling": "a pruning decides what the next step computes",
    }
    for flag, value in set_by_user.items():
        if value:
            raise ValueError(
                f"{flag} cannot work with diffusion decoding of {engine_config(model_config).family.name}: "
                f"{reasons[flag]}; leave it out"
            )


def _refuse_unsupported_features(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    used = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "LoRA (--enable-lora)": vllm_config.lora_config is not None,
        "KV connectors (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "encoder connectors (--ec-transfer-config)": vllm_config.ec_transfer_config is not None,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
    }
    config = engine_config(vllm_config.model_config)
    for feature, is_used in used.items():
        if is_used:
            raise ValueError(
                f"not supported for diffusion decoding of {config.family.name}: {feature}; start the server without it"
            )
    _refuse_cache_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype)
    ranks = parallel.tensor_parallel_size
    if config.num_key_value_heads % ranks:
        raise ValueError(f"--tensor-parallel-size {ranks} does not divide the {config.num_key_value_heads} KV heads")


def _refuse_cache_dtype(cache_dtype: str, dtype: Any) -> None:
    """Raises ValueError unless keys and values are of the weights' type, `auto` or by its name."""
    type_name = str(dtype).removeprefix("torch.")
    if cache_dtype not in ("auto", type_name):
        kind = "another type than the weights'" if cache_dtype in ("float16", "bfloat16") else "a quantised KV cache"
        raise ValueError(
            f"--kv-cache-dtype {cache_dtype}: {kind} is not supported for diffusion decoding; keys and values are "
            f"{type_name} as the weights are; leave it out"
        )


def refuse_card_block_size(block_size: int) -> None:
    """Raises ValueError for a block size that attention on a graphics card cannot have.

    vLLM would refuse it after the weights are loaded, with "No valid attention backend" and a list of all its own.
    """
    if block_size % CARD_BLOCK_MULTIPLE:
        raise ValueError(
            f"--block-size must be a multiple of {CARD_BLOCK_MULTIPLE} on a graphics card, got {block_size}; leave it "
            f"out for {BLOCK_SIZE}"
        )


def _use_our_parts(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    # An explicit choice of the user stands.
    if vllm_config.parallel_config.worker_cls == "auto":
        kind = "CpuWorker" if current_platform.is_cpu() else "GpuWorker"
        vllm_config.parallel_config.worker_cls = f"vllm_redvtp.worker.worker.{kind}"
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = "vllm_redvtp.scheduling.scheduler.DiffusionScheduler"
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None:
        # A request refused after image processing would leave the front-end's cache ahead of the engine's, and the next
        # request with that image would fail once with HTTP 500.
        multimodal.mm_processor_cache_gb = 0
        # Our processor gets images unchanged and drops transparency as the reference does. vLLM would lay them on
        # white, and turn an oversized one into RGB before it is refused.
        multimodal.media_io_kwargs.setdefault("image", {}).setdefault("image_mode", None)


def _schedule_synchronously(vllm_config: VllmConfig) -> None:
    """Strictly schedule, execute, update: a pruning changes what the next step computes."""
    scheduler = vllm_config.scheduler_config
    scheduler.async_scheduling = False
    # Attention is bidirectional: a prompt is computed whole, and its keys depend on the response.
    scheduler.enable_chunked_prefill = False
    vllm_config.cache_config.enable_prefix_caching = False
    longest = vllm_config.model_config.max_model_len
    if scheduler.max_num_batched_tokens < longest:
        logger.info(
            "max_num_batched_tokens raised from %d to max_model_len %d: a prompt is computed whole",
            scheduler.max_num_batched_tokens,
            longest,
        )
        scheduler.max_num_batched_tokens = longest
    # Derived from max_num_batched_tokens before this hook; too small a value refuses large images.
    scheduler.max_num_encoder_input_tokens = max(
        scheduler.max_num_encoder_input_tokens, scheduler.max_num_batched_tokens
    )
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, scheduler.max_num_batched_tokens)


def _size_kv_cache(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = BLOCK_SIZE
        # Otherwise the CPU platform replaces it with its own default afterwards.
        cache.user_specified_block_size = True
    if not current_platform.is_cpu():
        refuse_card_block_size(cache.block_size)
        return
    if cache.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # vLLM's default, 92 % of the machine's memory, refuses to start wherever something else runs.
        cache.kv_cache_memory_bytes = _cpu_kv_cache_bytes(vllm_config)
    parallel, bind = vllm_config.parallel_config, os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if parallel.tensor_parallel_size * parallel.data_parallel_size > 1 and bind == "auto":
        # vLLM wants one NUMA node for each rank of each engine; this lets them share one. Child processes inherit it.
        os.environ.setdefault("VLLM_CPU_SIM_MULTI_NUMA", "1")


def _cpu_kv_cache_bytes(vllm_config: VllmConfig) -> int:
    # Here: the hook is imported for other models too, which need no engine.
    from redvtp.kv.blocks import blocks_needed, kv_token_bytes

    model, block_size = vllm_config.model_config, vllm_config.cache_config.block_size
    config = engine_config(model)
    dtype: Any = model.dtype
    heads = config.num_key_value_heads // vllm_config.parallel_config.tensor_parallel_size
    block_bytes = kv_token_bytes(config.num_hidden_layers, heads, config.head_dim, dtype.itemsize) * block_size
    # One block more: vLLM keeps block 0 for itself.
    longest = (blocks_needed(model.max_model_len, block_size) + 1) * block_bytes
    return int(max(longest, min(CPU_KV_CACHE_REQUESTS * longest, CPU_KV_CACHE_BYTES)))
