"""In-process vLLM engines over the tiny checkpoints, loaded once a session, in float32."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import LLM

from devices import vllm_options
from golden_data import checkpoint_dir
from plugin.requests import free_blocks, usable_blocks

LlmFactory = Callable[..., LLM]


@pytest.fixture(scope="session")
def llm_factory() -> Iterator[LlmFactory]:
    """llm_factory(checkpoint, **keywords of LLM) -> LLM in this process, one for each distinct call."""
    made: dict[str, LLM] = {}

    def make(checkpoint: str, **options: Any) -> LLM:
        key = json.dumps([checkpoint, options], sort_keys=True)
        if key not in made:
            made[key] = in_process_llm(str(checkpoint_dir(checkpoint)), **options)
        return made[key]

    yield make
    # vLLM collects garbage at the end of each engine; with the heap of a whole run that is a second each.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        made.clear()


@pytest.fixture
def llm(llm_factory: LlmFactory) -> Iterator[LLM]:
    """tiny-llada-v; the test must leave every KV block in the pool."""
    engine = llm_factory("tiny-llada-v")
    assert free_blocks(engine) == usable_blocks(engine)
    yield engine
    assert free_blocks(engine) == usable_blocks(engine), "every KV block is back in vLLM's pool"


def in_process_llm(model: str, **options: Any) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        return LLM(model, **{"dtype": "float32", "disable_log_stats": True, **vllm_options(), **options})
