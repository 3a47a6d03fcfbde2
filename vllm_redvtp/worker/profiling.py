"""The largest step a server can be asked for, run once at start so that vLLM leaves room for it beside the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import SpecialTokens
from redvtp.pruning.resolve import policy_of
from vllm_redvtp.knobs import vision_cache_bytes
from vllm_redvtp.worker.kv_cache import make_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A long canvas makes logits the largest tensor.
_GEN_LENGTH = 512


@torch.inference_mode()
def profile_largest_step(
    model: Dvlm,
    vllm_config: VllmConfig,
    special: SpecialTokens,
    make_engine: Callable[[Dvlm, KVPages], DenoisingRunner],
) -> None:
    """Run the largest calls of the vision module, then a first (scoring) step that fills the token budget."""
    config = model.config
    # What images that come again will take, for as long as the rest runs.
    remembered = torch.empty(vision_cache_bytes(vllm_config), dtype=torch.uint8, device=model.device)
    visual = model.vision.encode_largest()

    budget, longest = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
    lengths = [longest] * max(1, budget // longest)
    block_size = vllm_config.cache_config.block_size
    cache = _one_layer_cache(model, vllm_config, sum(blocks_needed(length, block_size) for length in lengths))
    batch: list[Sequence] = []
    first_block = 0
    for length in lengths:
        gen_length = min(_GEN_LENGTH, length - 1)
        prompt = length - gen_length
        blocks = blocks_needed(length, block_size)
        denoising = DenoisingParams(gen_length=gen_length, block_length=gen_length)
        batch.append(
            Sequence(
                f"profile-{len(batch)}",
                torch.zeros(prompt, config.hidden_size, dtype=model.dtype, device=model.device),
                ((0, min(prompt, visual.shape[0])),),
                denoising,
                policy_of(PruningParams(), config.num_hidden_layers, denoising),
                special,
                block_table=list(range(first_block, first_block + blocks)),
            )
        )
        first_block += blocks
    make_engine(model, cache).step(batch)
    del remembered


def _one_layer_cache(model: Dvlm, vllm_config: VllmConfig, num_blocks: int) -> KVPages:
    """Pages every layer shares: what is measured must not contain a KV cache of the real size."""
    cache = make_pages(model.config, vllm_config, 1, num_blocks, model.device)
    cache.keys *= model.config.num_hidden_layers
    cache.values *= model.config.num_hidden_layers
    return cache
