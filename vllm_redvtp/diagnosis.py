"""What `redvtp doctor` asks of vLLM: the config that `vllm serve` would start with, without starting anything.

Found under the entry point group `redvtp.doctor`.
"""

from __future__ import annotations

from typing import Any

from redvtp.doctor.server import ServerFacts, ServerOptions
from redvtp.errors import BadInput
from vllm_redvtp.offline import vllm_refusing
from vllm_redvtp.quiet import logs_on_stderr, start_up_noise


def server_facts(options: ServerOptions) -> ServerFacts:
    """Raises BadInput for options that vLLM or the plugin refuse."""
    with logs_on_stderr(), start_up_noise(BadInput), vllm_refusing():
        from vllm.platforms import current_platform

        facts = ServerFacts(current_platform.device_name)
        return facts if options.model is None else _facts(facts.device, options.model, options)


def _facts(device: str, model: str, options: ServerOptions) -> ServerFacts:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from vllm_redvtp import register
    from vllm_redvtp.attention.choice import attention_summary

    register()
    given: dict[str, Any] = {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
    given = {name: value for name, value in given.items() if value is not None} | {"dtype": options.dtype}
    config = AsyncEngineArgs(model, **given).create_engine_config()
    return ServerFacts(
        device,
        attention=attention_summary(config),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        max_model_len=config.model_config.max_model_len,
        block_size=config.cache_config.block_size,
        memory_share=None if current_platform.is_cpu() else config.cache_config.gpu_memory_utilization,
    )
