"""What a client may ask and what it is told: knobs, defaults, limits, endings. Over HTTP a refusal is status 400."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import PromptType, TextPrompt, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from golden_data import Case, runs
from plugin.requests import (
    engine_core_of,
    free_blocks,
    prompt_of,
    report_of,
    sampling_of,
    scheduler_of,
    usable_blocks,
)
from vllm_redvtp.knobs import build_params

SQUARE = Case("tiny-llada-v", "square")
HELLO = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"


def _refused(llm: LLM, prompt: Any, match: str, **sampling: Any) -> None:
    with pytest.raises(VLLMValidationError, match=match):
        llm.generate([prompt], SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling}), use_tqdm=False)


@pytest.fixture
def answering(llm: LLM) -> Iterator[LLM]:
    """The engine, which must still answer after the test."""
    yield llm
    (output,) = llm.generate([HELLO], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keep_ratio": 0}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 1.5"),
        ({"keep_ratio": "x"}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 'x'"),
        ({"keep_ratio": float("nan")}, r"redvtp_keep_ratio must be a number in \(0, 1\], got nan"),
        ({"keep_ratio": [0.5]}, r"redvtp_keep_ratio must be a number"),
        (
            {"pruning": "redvpt"},
            r"redvtp_pruning must be one of redvtp, .*, none, got 'redvpt'; did you mean 'redvtp'\?",
        ),
        ({"positions": 3}, r"redvtp_positions must be one of"),
        ({"steps": 0}, r"redvtp_steps must be an integer"),
        ({"steps": 16.0}, r"redvtp_steps must be an integer"),
        ({"steps": 9}, r"redvtp_steps must be an integer in \[1, 8\], got 9"),
        ({"block_length": 9}, r"redvtp_block_length must be an integer in \[1, 8\], got 9"),
        ({"block_length": 4, "steps": 1}, r"redvtp_steps must be at least the number of canvas blocks"),
        ({"cache": "prefix", "refresh_interval": 0}, r"redvtp_refresh_interval must be an integer >= 1, got 0"),
        ({"suffix": 1}, r"redvtp_suffix must be a string"),
        ({"report": "all"}, r"redvtp_report must be one of none, summary, full, got 'all'"),
        ({"keepratio": 0.5}, r"unknown knob 'redvtp_keepratio'; did you mean redvtp_keep_ratio\?"),
        ({"keep_ration": 0.5}, r"unknown knob 'redvtp_keep_ration'; did you mean redvtp_keep_ratio\?"),
        ({"budget": 0.5}, r"unknown knob 'redvtp_budget'; allowed: .*redvtp_keep_ratio"),
        ({"temperature": 0.5}, r"unknown knob 'redvtp_temperature'; temperature is a field of the request itself"),
        (
            {"threshold": 1, "min_confidence": 0.9},
            "redvtp_threshold and redvtp_min_confidence exclude each other, got 1 and 0.9",
        ),
        ({"gen_length": 0}, r"gen_length .* got 0|gen_length 0 differs"),
        ({"gen_length": 9}, r"redvtp_gen_length 9 differs from max_tokens 8"),
    ],
    ids=str,
)
def test_bad_knob_is_refused_by_name_and_value(answering: LLM, knobs: dict[str, Any], message: str) -> None:
    _refused(answering, HELLO, message, extra_args={f"redvtp_{name}": value for name, value in knobs.items()})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"logprobs": 1}, "logprobs .* is not supported"),
        ({"prompt_logprobs": 1}, "prompt_logprobs .* is not supported"),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, "response_format .* not supported"),
        ({"logit_bias": {1: 1.0}}, "logit_bias is not supported"),
        ({"min_tokens": 2}, "min_tokens is not supported"),
        ({"bad_words": ["no"]}, "bad_words is not supported"),
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not supported"),
        ({"temperature": 0.5, "top_p": 0.9}, "top_p below 1 with a temperature is not supported"),
    ],
    ids=str,
)
def test_sampling_option_without_a_meaning_here_is_refused(
    answering: LLM, sampling: dict[str, Any], message: str
) -> None:
    _refused(answering, HELLO, message, **sampling)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("keep_ratio", "keep_ratio"),
        ("cache", "cache"),
        ("keep_ration", "keep_ratio"),
        ("prune-stepps", "prune_steps"),
        ("redvpt_keep_ratio", "keep_ratio"),
        ("redvpt_cache", "cache"),
        ("REDVTP_Cache", "cache"),
    ],
)
def test_knob_under_another_name_is_refused_with_its_own(answering: LLM, name: str, meant: str) -> None:
    _refused(answering, HELLO, rf"unknown knob '{name}'; did you mean redvtp_{meant}\?", extra_args={name: 0.5})


@pytest.mark.parametrize("name", ["trace_label", "step", "cached", "keep", "ratio", "max_confidence", "x" * 100_000])
def test_other_extra_arguments_are_left_alone(answering: LLM, name: str) -> None:
    """They may be another plugin's."""
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, extra_args={name: "x"})
    (output,) = answering.generate([HELLO], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("marks", "images", "message"),
    [
        (2, 1, "the prompt has 2 <image> marks but 1 image was given"),
        (0, 1, "the prompt has 0 <image> marks but 1 image was given"),
        (1, 0, "the prompt has 1 <image> mark but 0 images were given"),
        (1, 2, "the prompt has 1 <image> mark but 2 images were given"),
    ],
)
def test_marks_and_images_must_match(answering: LLM, marks: int, images: int, message: str) -> None:
    prompt: TextPrompt = {"prompt": HELLO.replace("Hello", "<image>\n" * marks + "Hello")}
    if images:
        prompt["multi_modal_data"] = {"image": [Image.new("RGB", (60, 40))] * images}
    with pytest.raises(ValueError, match=message):
        answering.generate([prompt], SamplingParams(max_tokens=8), use_tqdm=False)


def test_prompt_canvas_and_suffix_must_fit_the_model(answering: LLM) -> None:
    longest = answering.model_config.max_model_len
    prompt = SQUARE.meta["prompt_len"]
    room = longest - prompt
    what = rf"prompt \({prompt} tokens, 88 of them visual\) plus max_tokens"
    _refused(
        answering,
        prompt_of(SQUARE),
        rf"{what} {room + 1} exceeds max_model_len {longest}; shorten max_tokens or use",
        max_tokens=room + 1,
    )
    suffix = {"redvtp_suffix": " and so it goes on"}
    _refused(
        answering,
        prompt_of(SQUARE),
        rf"{what} {room - 1} plus a suffix of \d tokens",
        max_tokens=room - 1,
        extra_args=suffix,
    )


def test_unset_max_tokens_is_the_default_canvas(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([HELLO], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 64
    assert output.outputs[0].finish_reason == "length"


def test_unset_max_tokens_near_the_end_of_the_context_takes_what_is_left(llm_factory: Callable[..., LLM]) -> None:
    room = 20
    llm = llm_factory("tiny-llada-v", max_model_len=SQUARE.meta["prompt_len"] + room)
    sampling = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([prompt_of(SQUARE)], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == room


def test_max_tokens_that_fills_the_context_is_not_taken_for_unset(answering: LLM) -> None:
    prompt = len(answering.get_tokenizer().encode(HELLO, add_special_tokens=False))
    room = answering.model_config.max_model_len - prompt
    _refused(answering, HELLO, rf"max_tokens {room} is all that is left .*redvtp_gen_length", max_tokens=room)


def test_gen_length_knob_is_the_canvas(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True, extra_args={"redvtp_gen_length": 12})
    (output,) = llm.generate([HELLO], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 12


def test_server_defaults_hold_where_the_client_says_nothing(llm_factory: Callable[..., LLM]) -> None:
    defaults = {"gen_length": 16, "block_length": 8, "steps": 16, "keep_ratio": 0.25, "report": "full"}
    llm = llm_factory("tiny-llada-v", additional_config={"redvtp": defaults})
    plain = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    own = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, extra_args={"redvtp_keep_ratio": 0.5})
    by_default, overridden = llm.generate([prompt_of(SQUARE)] * 2, [plain, own], use_tqdm=False)
    assert len(by_default.outputs[0].token_ids) == 16
    told = report_of(by_default)
    assert (told["steps"], told["visual_tokens_kept"]) == (16, 22)
    assert {step["canvas_block"] for step in told["trace"]} == {0, 1}
    # A canvas shorter than the server's block_length and steps takes what fits of them.
    assert len(overridden.outputs[0].token_ids) == 4
    told = report_of(overridden)
    assert (told["steps"], told["visual_tokens_kept"]) == (4, 44)


@pytest.mark.parametrize(
    ("knobs", "rule"),
    [
        ({}, (0.9, None)),
        ({"cache": "prefix", "remasking": "margin"}, (0.9, None)),
        ({"threshold": 1.0}, (1.0, None)),
        ({"threshold": 1.0, "steps": 4}, (1.0, None)),
        ({"min_confidence": 0.8}, (None, 0.8)),
        ({"steps": 4}, (None, None)),
        ({"schedule": "shift"}, (None, None)),
        ({"remasking": "random"}, (None, None)),
        ({"threshold": None}, (None, None)),
    ],
    ids=str,
)
def test_servers_threshold_gives_way_to_what_a_request_says(
    knobs: dict[str, Any], rule: tuple[float | None, float | None]
) -> None:
    sampling = SamplingParams(extra_args={f"redvtp_{name}": value for name, value in knobs.items()})
    built = build_params(sampling, 16, {"threshold": 0.9, "steps": 8}).denoising
    assert (built.threshold, built.min_confidence) == rule


def test_a_clients_confidence_rule_goes_before_a_remasking_of_the_server() -> None:
    """It was refused for a remasking that the client had not sent."""
    sampling = SamplingParams(extra_args={"redvtp_threshold": 0.9})
    built = build_params(sampling, 16, {"remasking": "entropy"}).denoising
    assert (built.remasking, built.threshold) == ("low_confidence", 0.9)
    margin = build_params(sampling, 16, {"remasking": "margin"}).denoising
    assert margin.remasking == "margin"


def test_without_a_temperature_the_answer_is_greedy(llm: LLM) -> None:
    assert llm.get_default_sampling_params().temperature == 0.0


def test_seed_decides_the_drawn_answer(llm: LLM) -> None:
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)
        return list(llm.generate([HELLO], sampling, use_tqdm=False)[0].outputs[0].token_ids)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_several_answers_to_one_prompt_differ(llm: LLM) -> None:
    sampling = SamplingParams(n=3, max_tokens=16, temperature=1.0, ignore_eos=True)
    (output,) = llm.generate([HELLO], sampling, use_tqdm=False)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3


def test_end_token_ends_the_answer_with_reason_stop(llm: LLM) -> None:
    """The golden runs that stop at <|eot_id|>, with the model's end tokens in the stop string's place."""
    run = next(
        run for run in runs("plain", checkpoints=("tiny-llada-v",)) if "stopping_criteria" in run.params and run.output
    )
    sampling = sampling_of(run)
    sampling.stop, sampling.ignore_eos = [], False
    (output,) = llm.generate([prompt_of(run.case)], sampling, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert list(output.outputs[0].token_ids)[:-1] == run.output
    assert output.outputs[0].token_ids[-1] == llm.get_tokenizer().convert_tokens_to_ids("<|eot_id|>")


def test_stop_string_ends_the_answer_before_it(llm: LLM) -> None:
    (whole,) = llm.generate([prompt_of(SQUARE)], SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True))
    tokenizer = llm.get_tokenizer()
    token = next(
        token for token in whole.outputs[0].token_ids[4:] if tokenizer.decode([token]).isascii() and token < 576
    )
    stop = tokenizer.decode([token])
    sampling = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, stop=[stop])
    (output,) = llm.generate([prompt_of(SQUARE)], sampling, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop
    assert stop not in output.outputs[0].text
    # The report came with the last tokens: vLLM's front-end ends these requests, not the scheduler.
    assert report_of(output)["steps"] > 0


def test_stop_string_the_front_end_does_not_see_still_ends_the_request(llm: LLM) -> None:
    """<|eot_id|> as a stop string matches the tokens, but special tokens are not in the text vLLM searches."""
    run = next(run for run in runs("plain", checkpoints=("tiny-llada-v",)) if "stopping_criteria" in run.params)
    (output,) = llm.generate([prompt_of(run.case)], sampling_of(run), use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert list(output.outputs[0].token_ids)[:-1] == run.output


def test_mixed_requests_get_the_tokens_they_get_alone(llm: LLM) -> None:
    some = {(run.case, run.kind, run.uses_threshold): run for run in runs(checkpoints=("tiny-llada-v",))}
    chosen = [run for run in some.values() if not run.case.config_overrides][:6]
    assert any(run.uses_threshold for run in chosen)
    prompts: list[PromptType] = [*(prompt_of(run.case) for run in chosen), HELLO, prompt_of(SQUARE)]
    sampling = [sampling_of(run) for run in chosen] + [
        SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=24, temperature=0.7, seed=6, extra_args={"redvtp_remasking": "random"}),
    ]
    assert len(prompts) == 8
    together = llm.generate(prompts, sampling, use_tqdm=False)
    for prompt, params, output in zip(prompts, sampling, together, strict=True):
        (alone,) = llm.generate([prompt], params, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_streaming_input_session_is_refused_and_the_engine_lives(answering: LLM) -> None:
    engine = answering.llm_engine
    request = engine.input_processor.process_inputs(
        "session",
        {"prompt": HELLO},
        SamplingParams(max_tokens=8),
        supported_tasks=("generate",),
        resumable=True,
    )
    scheduler = scheduler_of(answering)
    engine_core = engine_core_of(answering)
    for _ in range(2):
        engine_core.add_request(*engine_core.preprocess_add_request(request))
    outputs, _ = engine_core.step()
    (output,) = (output for outs in outputs.values() for output in outs.outputs)
    assert str(output.finish_reason) == "error"
    assert "streaming input sessions are not supported" in str(output.stop_reason)
    assert not scheduler.requests


@pytest.mark.parametrize("size", [(1, 1), (20_000, 64)], ids=str)
def test_extreme_image_is_answered(answering: LLM, size: tuple[int, int]) -> None:
    prompt: TextPrompt = {**prompt_of(SQUARE), "multi_modal_data": {"image": Image.new("RGB", size, (10, 20, 30))}}
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (output,) = answering.generate([prompt], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    assert free_blocks(answering) == usable_blocks(answering)


def test_chat_has_the_default_system_message_and_the_references_tokens(llm: LLM) -> None:
    run = next(run for run in runs("redvtp", checkpoints=("tiny-llada-v",)) if run.case == SQUARE and run.robust)
    content = [
        {"type": "image_pil", "image_pil": SQUARE.images()[0]},
        {"type": "text", "text": SQUARE.question},
    ]
    messages: Any = [{"role": "user", "content": content}]
    (output,) = llm.chat(messages, sampling_of(run), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == run.output


def test_chat_keeps_a_system_message_of_its_own(llm: LLM) -> None:
    messages: Any = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello"}]
    (output,) = llm.chat(messages, SamplingParams(max_tokens=4), use_tqdm=False)
    assert output.prompt_token_ids is not None
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_bfloat16_answers(llm_factory: Callable[..., LLM]) -> None:
    llm = llm_factory("tiny-llada-v", dtype="bfloat16")
    half = {"redvtp_keep_ratio": 0.5}
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, extra_args=half)
    (output,) = llm.generate([prompt_of(SQUARE)], sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    report = report_of(output)
    assert report["visual_tokens_kept"] == report["visual_tokens"] // 2
    assert free_blocks(llm) == usable_blocks(llm)


def test_raw_token_ids_outside_the_vocabulary_are_refused(answering: LLM) -> None:
    with pytest.raises(ValueError, match=r"token ids outside \[0, 593\]"):
        answering.generate([TokensPrompt(prompt_token_ids=[1, 10**6])], SamplingParams(max_tokens=8), use_tqdm=False)
