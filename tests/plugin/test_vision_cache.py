"""An image that comes again is not encoded again, whatever the client calls it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt

from golden_data import Case, checkpoint_dir
from plugin.conftest import in_process_llm
from plugin.requests import prompt_of, runner_of

CASE = Case("tiny-llada-v", "wide")
SAMPLING = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@contextmanager
def _tower_calls(llm: LLM) -> Iterator[list[int]]:
    """The number of tiles of every call of the tower."""
    calls: list[int] = []
    tower = runner_of(llm).model.vision.tower
    hook = tower.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    try:
        yield calls
    finally:
        hook.remove()


def _answers(llm: LLM, prompts: list[TextPrompt]) -> list[list[int]]:
    outputs = llm.generate(prompts, SAMPLING, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _picture(seed: int) -> TextPrompt:
    image = Image.frombytes("RGB", (60, 40), random.Random(seed).randbytes(60 * 40 * 3))
    return {**prompt_of(CASE), "multi_modal_data": {"image": [image]}}


def test_second_request_with_the_same_image_does_not_run_the_tower(llm: LLM) -> None:
    llm.reset_mm_cache()
    runner_of(llm).reset_encoder_cache()
    with _tower_calls(llm) as calls:
        first = _answers(llm, [prompt_of(CASE)])
        assert len(calls) == 1
        assert _answers(llm, [prompt_of(CASE)] * 3) == first * 3
        assert len(calls) == 1


def test_images_of_requests_that_arrive_together_share_a_call(llm: LLM) -> None:
    runner_of(llm).reset_encoder_cache()
    with _tower_calls(llm) as calls:
        together = _answers(llm, [_picture(1), _picture(2), _picture(1)])
        assert len(calls) == 1
    runner_of(llm).reset_encoder_cache()
    assert together == [_answers(llm, [_picture(seed)])[0] for seed in (1, 2, 1)]


def test_a_clients_name_for_an_image_is_not_believed(llm: LLM) -> None:
    """vLLM takes `uuid` for the content; two images under one name must stay two."""
    prompts: list[TextPrompt] = [{**_picture(seed), "multi_modal_uuids": {"image": ["mine"]}} for seed in (3, 4)]
    with _tower_calls(llm) as calls:
        named = [_answers(llm, [prompt])[0] for prompt in prompts]
        assert len(calls) == 2
    assert named == [_answers(llm, [_picture(seed)])[0] for seed in (3, 4)]


def test_zero_switches_it_off(llm_factory: Callable[..., LLM], llm: LLM) -> None:
    expected = _answers(llm, [prompt_of(CASE)])
    forgetful = llm_factory("tiny-llada-v", additional_config={"redvtp": {"vision_cache_gb": 0}})
    with _tower_calls(forgetful) as calls:
        assert [_answers(forgetful, [prompt_of(CASE)]) for _ in range(2)] == [expected] * 2
    assert len(calls) == 2


@pytest.mark.parametrize("size", [-1, "1", True, float("nan")])
def test_size_that_is_none_is_refused_at_start(size: object) -> None:
    with pytest.raises(ValueError, match=r"--additional-config: redvtp\.vision_cache_gb must be a number of GiB"):
        in_process_llm(str(checkpoint_dir("tiny-llada-v")), additional_config={"redvtp": {"vision_cache_gb": size}})


def test_it_is_no_knob_of_a_request(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=4, extra_args={"redvtp_vision_cache_gb": 1})
    with pytest.raises(VLLMValidationError, match="vision_cache_gb"):
        llm.generate([prompt_of(CASE)], sampling, use_tqdm=False)
