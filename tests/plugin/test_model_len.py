"""`--max-model-len auto`: vLLM lowers the length when it knows the memory, and every process goes by the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from golden_data import checkpoint_dir
from plugin.requests import free_blocks, runner_of, scheduler_of, usable_blocks
from redvtp.families.config import load_config

BLOCK = 32
BLOCKS = 16
# vLLM keeps one block for itself.
FITTED = (BLOCKS - 1) * BLOCK
HELLO = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"


@pytest.fixture
def fitted(llm_factory: Callable[..., LLM]) -> Iterator[LLM]:
    """An engine whose model length was fitted to 16 blocks."""
    config = load_config(checkpoint_dir("tiny-llada-v"))
    block = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * BLOCK
    llm = llm_factory("tiny-llada-v", max_model_len=-1, kv_cache_memory_bytes=block * BLOCKS, max_num_seqs=4)
    assert llm.llm_engine.model_config.max_model_len == FITTED
    yield llm
    assert free_blocks(llm) == usable_blocks(llm)


def _prompt_tokens(llm: LLM) -> int:
    return len(llm.get_tokenizer().encode(HELLO, add_special_tokens=False))


def _as_over_http(llm: LLM, sent: int | None, **knobs: Any) -> SamplingParams:
    """The check of vLLM's OpenAI server for a client that sent this max_tokens, with what vLLM makes of it."""
    prompt = _prompt_tokens(llm)
    room = llm.llm_engine.model_config.max_model_len - prompt
    filled_in = room if sent is None else min(sent, room)
    extra = {f"redvtp_{name}": value for name, value in knobs.items()}
    sampling = SamplingParams(max_tokens=filled_in, temperature=0.0, extra_args=extra)
    renderer: Any = llm.llm_engine.renderer
    renderer._check(prompt, (), sampling, max_tokens=sent)
    return sampling


def test_every_process_goes_by_the_fitted_length(fitted: LLM) -> None:
    renderer: Any = fitted.llm_engine.renderer
    planners = (renderer._planner, scheduler_of(fitted)._planner, runner_of(fitted).planner)
    assert [planner.max_model_len for planner in planners] == [FITTED] * 3


def test_unset_max_tokens_is_the_default_length_after_fitting(fitted: LLM) -> None:
    """It was taken for a length that fills the context, and refused for having too few steps."""
    sampling = _as_over_http(fitted, None, steps=8)
    assert sampling.max_tokens == 64
    assert sampling.extra_args is not None
    assert sampling.extra_args["redvtp_gen_length"] == 64
    (output,) = fitted.generate([HELLO], SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 64


@pytest.mark.slow
def test_max_tokens_that_fills_the_context_is_a_length_like_any_other(fitted: LLM) -> None:
    room = FITTED - _prompt_tokens(fitted)
    sampling = _as_over_http(fitted, room)
    assert (sampling.max_tokens, (sampling.extra_args or {})["redvtp_gen_length"]) == (room, room)
    sampling.ignore_eos = True
    (output,) = fitted.generate([HELLO], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == room


@pytest.mark.parametrize("more", [1, 64])
def test_a_request_longer_than_the_fitted_length_is_refused_by_the_front_end(fitted: LLM, more: int) -> None:
    """It passed, and ended in the engine with finish reason `error`."""
    too_long = FITTED - _prompt_tokens(fitted) + more
    reason = rf"plus max_tokens {too_long} exceeds max_model_len {FITTED}"
    with pytest.raises(VLLMValidationError, match=reason):
        _as_over_http(fitted, too_long)
    with pytest.raises(VLLMValidationError, match=reason):
        fitted.generate([HELLO], SamplingParams(max_tokens=too_long, temperature=0.0), use_tqdm=False)
