"""How much memory a server takes, whether it is there, and the command line that fits.

Weights and KV cache are exact. What a step needs beside them, and what the processes of a server take by themselves,
are estimates.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

import torch

from redvtp.doctor.checkpoint import Checkpoint
from redvtp.doctor.findings import Finding, readable
from redvtp.doctor.machine import Machine
from redvtp.families.config import DvlmConfig
from redvtp.kv.blocks import blocks_needed, kv_token_bytes
from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES

TOPIC = "memory"
# Requests at a time where the user names no number.
MAX_NUM_SEQS = 8
# Measured with `vllm serve` on a CPU: three processes with 0.55 GiB of their own each. On a GPU: CUDA's context.
_PROCESS_BYTES = {"cpu": int(1.7 * (1 << 30)), "cuda": 1 << 30}
# Rows of logits in the largest step (`vllm_redvtp.worker.profiling`), and bytes for each of their numbers: the model's,
# and copies in float32 and float64.
_LOGIT_ROWS = 512
_LOGIT_BYTES = 24
# A canvas and a question beside the largest image.
_TEXT_TOKENS = 128
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, but for the first four.

    kv_token: keys and values of one token. one_request: KV cache that a server needs to start. kv_cache: of
    max_num_seqs longest requests, or as much of it as fits. step, processes: estimates.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    block_size: int
    weights: int
    kv_token: int
    one_request: int
    kv_cache: int
    step: int
    processes: int

    @property
    def least(self) -> int:
        """What a server with room for one longest request takes."""
        return self.weights + self.one_request + self.step + self.processes

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.step + self.processes


def needs_of(
    checkpoint: Checkpoint, config: DvlmConfig, found: Machine, dtype: str, lengths: tuple[int, int], block_size: int
) -> Needs:
    """lengths: max_model_len and max_num_seqs."""
    itemsize = getattr(torch, dtype).itemsize
    max_model_len, max_num_seqs = lengths
    token = kv_token_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, itemsize)
    blocks, block = blocks_needed(max_model_len, block_size), token * block_size
    weights = checkpoint.weight_bytes if checkpoint.weight_bytes is not None else checkpoint.parameters * itemsize
    # Residual, attention and both halves of the MLP of every token; embeddings that waiting requests hold; logits.
    layers = max_model_len * (6 * config.hidden_size + 3 * config.intermediate_size) * itemsize
    held = 2 * max_num_seqs * max_model_len * config.hidden_size * itemsize
    logits = min(_LOGIT_ROWS, max_model_len) * config.vocab_size * _LOGIT_BYTES
    needs = Needs(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        block_size=block_size,
        weights=weights,
        kv_token=token,
        # One block more: vLLM keeps block 0 for itself.
        one_request=(blocks + 1) * block,
        kv_cache=(max_num_seqs * blocks + 1) * block,
        step=layers + held + logits + DEFAULT_CACHE_BYTES,
        processes=_PROCESS_BYTES[found.device],
    )
    room = found.free - (needs.total - needs.kv_cache)
    return replace(needs, kv_cache=max(needs.one_request, min(needs.kv_cache, room)))


def longest_that_fits(needs: Needs, free: int) -> int:
    """The longest max_model_len, a multiple of the block size, with which one request fits; 0 if none is of use."""
    fixed = needs.weights + needs.processes
    each = (needs.one_request + needs.step) / needs.max_model_len
    longest = min(needs.max_model_len, int((free - fixed) / each)) // needs.block_size * needs.block_size
    return longest if longest >= 2 * _TEXT_TOKENS else 0


def judged(needs: Needs, config: DvlmConfig, found: Machine, images: list[tuple[str, int]]) -> list[Finding]:
    """The needs in lines. images: visual tokens of images by name; the first is the largest that there can be."""
    lines = [
        f"weights: {readable(needs.weights)} in {needs.dtype}",
        f"KV cache: {readable(needs.kv_token)} a token, {readable(needs.one_request)} for a request of "
        f"{needs.max_model_len:,} tokens; {readable(needs.kv_cache)} for up to {needs.max_num_seqs} at once",
        f"beside them, estimated: {readable(needs.step)} in a step, {readable(needs.processes)} for processes",
        *(f"{name}: {count:,} visual tokens, {readable(count * needs.kv_token)} of KV cache" for name, count in images),
    ]
    findings = [Finding(TOPIC, line) for line in lines]
    if needs.least > found.free:
        findings.append(_too_little(needs, found))
    else:
        findings.append(Finding(TOPIC, f"fits: {readable(needs.total)} of {readable(found.free)} that are free"))
    for index, (name, count) in enumerate(images):
        if count + _TEXT_TOKENS <= needs.max_model_len:
            continue
        text = f"{name} is too large for max_model_len {needs.max_model_len:,} beside a question and an answer"
        longer = min(config.max_length, count + _TEXT_TOKENS)
        # Only an image that the user named must fit.
        findings.append(Finding(TOPIC, text, f"use --max-model-len {longer}, or scale it down" if index else ""))
    return findings


def serve_line(command: str, model: str, needs: Needs, device: str, dtype: str) -> str:
    """The command line of a server that takes no more than `needs`. dtype: what the user asked for."""
    words = [command, "serve", model, "--plugin", "redvtp", "--max-model-len", needs.max_model_len]
    words += ["--max-num-seqs", needs.max_num_seqs]
    if dtype != "auto":
        words += ["--dtype", dtype]
    if device == "cpu":
        # A GPU's KV cache takes what --gpu-memory-utilization leaves.
        words += ["--kv-cache-memory-bytes", f"{-(-needs.kv_cache // _MIB)}M"]
    return shlex.join(map(str, words))


def _too_little(needs: Needs, found: Machine) -> Finding:
    text = f"does not fit: {readable(needs.least)} for one request, and {readable(found.free)} are free"
    shorter = longest_that_fits(needs, found.free)
    if shorter > 0:
        return Finding(TOPIC, text, f"use --max-model-len {shorter}, or free memory")
    if needs.dtype == "float32":
        return Finding(TOPIC, text, "use --dtype bfloat16, or a machine with more memory")
    return Finding(TOPIC, text, "use a machine with more memory, or --tensor-parallel-size on several GPUs")
