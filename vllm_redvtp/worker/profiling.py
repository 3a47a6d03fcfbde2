"""The largest step that a server may have to take, run once at start: vLLM leaves room for it beside the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from redvtp.canvas.proposals import rows_of_logits
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import SpecialTokens
from redvtp.pruning.resolve import policy_of
from vllm_redvtp.knobs import server_defaults
from vllm_redvtp.server_options import vision_cache_bytes
from vllm_redvtp.worker.kv_cache import make_pages, token_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A canvas at least this long, where the request may have one.
_GEN_LENGTH = 512


def held_embedding_bytes(
    max_num_seqs: int, longest_prompt: int, row_bytes: int, kv_token_bytes: int, keep_ratio: float, memory: float
) -> int:
    """Bytes of prompt embeddings that running and preempted sequences hold at most, beside the KV cache.

    A sequence holds the embeddings of its prompt, and with cache `prefix` or `dual` a copy from before the pruning.
    Neither is split over ranks. The most is max_num_seqs of the longest prompts, but no more than `memory` admits.

    row_bytes: one embedding. kv_token_bytes: keys and values of a token on this rank.
    keep_ratio: share of a prompt whose KV cache stays, so that other requests are admitted in place of the rest.
    memory: bytes for KV cache and embeddings together.
    """
    largest = 2 * max_num_seqs * longest_prompt * row_bytes
    for_each_kv_token = (1 + 1 / keep_ratio) * row_bytes
    return int(min(largest, memory * for_each_kv_token / (for_each_kv_token + kv_token_bytes)))


def profiled_canvas(length: int, sequences: int, logit_rows: int) -> int:
    """Canvas length of each of some sequences of `length` tokens, so that a step has its largest tensors.

    logit_rows: rows of logits that are held at once. All together have as many undecided positions; they take at most
    half of a sequence, so that there is a prompt to score.
    """
    return min(length - 1, max(_GEN_LENGTH, min(-(-logit_rows // sequences), length // 2)))


@torch.inference_mode()
def profile_largest_step(
    model: Dvlm,
    vllm_config: VllmConfig,
    special: SpecialTokens,
    make_engine: Callable[[Dvlm, KVPages], DenoisingRunner],
) -> None:
    """Run the largest calls of the vision module, then a first (scoring, drawing) step that fills the token budget.

    What a server holds beside its steps is allocated meanwhile.
    """
    config = model.config
    held = [
        torch.empty(size, dtype=torch.uint8, device=model.device)
        for size in (vision_cache_bytes(vllm_config), _embeddings_held(model, vllm_config))
    ]
    visual = model.vision.encode_largest()

    budget, longest = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
    lengths = [longest] * max(1, budget // longest)
    block_size = vllm_config.cache_config.block_size
    cache = _one_layer_cache(model, vllm_config, sum(blocks_needed(length, block_size) for length in lengths))
    batch: list[Sequence] = []
    first_block = 0
    gen_length = profiled_canvas(longest, len(lengths), rows_of_logits(special.vocab))
    for length in lengths:
        prompt = length - gen_length
        blocks = blocks_needed(length, block_size)
        denoising = DenoisingParams(gen_length=gen_length, block_length=gen_length, temperature=1.0, seed=0)
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
    del held


def _embeddings_held(model: Dvlm, vllm_config: VllmConfig) -> int:
    return held_embedding_bytes(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.model_config.max_model_len - 1,
        model.config.hidden_size * model.dtype.itemsize,
        token_bytes(model.config, vllm_config),
        server_defaults(vllm_config).get("keep_ratio", PruningParams().keep_ratio),
        _memory_for_sequences(vllm_config, model.device),
    )


def _memory_for_sequences(vllm_config: VllmConfig, device: torch.device) -> float:
    """What the server may give to sequences: the KV cache where its size is set, else the rest of the device."""
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None or device.type == "cpu":
        return cache.kv_cache_memory_bytes or 0
    free, total = torch.accelerator.get_memory_info(device)
    return max(0.0, total * cache.gpu_memory_utilization - (total - free))


def _one_layer_cache(model: Dvlm, vllm_config: VllmConfig, num_blocks: int) -> KVPages:
    """Pages every layer shares: what is measured must not contain a KV cache of the real size."""
    cache = make_pages(model.config, vllm_config, 1, num_blocks, model.device)
    cache.keys *= model.config.num_hidden_layers
    cache.values *= model.config.num_hidden_layers
    return cache
