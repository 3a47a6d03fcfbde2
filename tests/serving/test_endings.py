"""How answers arrive and end: streams, stop strings, end tokens, usage, a client that leaves."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest

from golden_data import Run
from redvtp.prompt import EOT, load_tokenizer
from serving.chat import LONG, ask, ask_in_pieces, ask_streaming, golden_run, in_the_middle, message_of, options_of
from serving.server import Server

pytestmark = pytest.mark.serving

# Two canvas blocks and 20 steps: the resolved prefix grows in many pieces.
BLOCKS = golden_run("tall", "plain_g64_b16_s20")
PRUNED = golden_run("square", "redvtp_k25_g32_b32_s16")
STOPPED = golden_run("wide", "stop_g32_b32_s16")


@pytest.mark.parametrize("run", [BLOCKS, PRUNED], ids=str)
def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: str, run: Run) -> None:
    whole = ask(client, model, message_of(run.case), **options_of(run))
    streamed = ask_in_pieces(client, model, message_of(run.case), least=3, **options_of(run))
    assert streamed.text == whole.text
    assert streamed.token_ids == whole.token_ids == run.output
    assert (streamed.finish_reason, whole.finish_reason) == ("length", "length")
    assert streamed.usage == whole.usage == (run.case.meta["prompt_len"], run.params["gen_length"])


def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI, model: str) -> None:
    options = options_of(STOPPED)
    assert options["stop"] == [EOT]
    # Otherwise vLLM leaves <|eot_id|>, a special token, out of the text it searches.
    options["extra_body"] |= {"skip_special_tokens": False}
    answer = ask(client, model, message_of(STOPPED.case), **options)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", EOT)
    assert answer.text == load_tokenizer(STOPPED.case.model_dir).decode(STOPPED.output)
    # It travels with the last tokens, before the front-end ends the request.
    assert answer.report is not None


def test_stop_string_of_ordinary_letters_is_not_in_the_stream(client: openai.OpenAI, model: str) -> None:
    run = golden_run("text_only", "plain_g32_b32_s16")
    tokenizer = load_tokenizer(run.case.model_dir)
    words = [str(tokenizer.decode([token])).strip() for token in run.output]
    # Late enough for something to be streamed before it.
    stop = next(word for word in words[8:] if len(word) > 2 and word.isascii() and word.isalpha())
    answer = ask_streaming(client, model, message_of(run.case), **(options_of(run) | {"stop": [stop]}))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text
    assert stop not in answer.text
    assert answer.usage[1] < run.params["gen_length"]


@pytest.mark.parametrize("report", ["summary", "full"])
def test_stop_string_that_other_tokens_spell_ends_the_answer_too(
    client: openai.OpenAI, model: str, report: str
) -> None:
    """The canvas does not have it, since it is searched for token ids; the front-end finds it in the text."""
    tokenizer = load_tokenizer(BLOCKS.case.model_dir)
    stop = _straddling(tokenizer, BLOCKS.output)
    assert tokenizer.encode(stop, add_special_tokens=False)[0] not in BLOCKS.output
    options = options_of(BLOCKS) | {"stop": [stop]}
    options["extra_body"]["vllm_xargs"]["redvtp_report"] = report
    whole = ask(client, model, message_of(BLOCKS.case), **options)
    assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
    assert whole.text == str(tokenizer.decode(BLOCKS.output)).partition(stop)[0]
    # It came with the tokens in which the stop string was found: the abort that follows has nothing to carry it.
    assert whole.report is not None
    assert 0 < whole.report["steps"] <= BLOCKS.params["steps"]
    assert ("trace" in whole.report) == (report == "full")
    streamed = ask_streaming(client, model, message_of(BLOCKS.case), **options)
    assert (streamed.text, streamed.finish_reason, streamed.stop_reason) == (whole.text, "stop", stop)
    assert streamed.usage == whole.usage


def _straddling(tokenizer: Any, tokens: list[int]) -> str:
    """Two letters, the last of one token and the first of the next, that no token of the answer begins with.

    Their first place in the text is past the middle, so that something is streamed before.
    """
    words = [str(tokenizer.decode([token])) for token in tokens]
    text = str(tokenizer.decode(tokens))
    for left, right in itertools.pairwise(words[len(words) // 3 :]):
        stop = left[-1:] + right[:1]
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(stop) == 2 and stop.isascii() and stop.isalpha() and ids[0] not in tokens and text.find(stop) > 20:
            return stop
    raise AssertionError("the golden answer has no such place")


def test_stop_token_id_ends_the_answer_at_its_first_place(client: openai.OpenAI, model: str) -> None:
    last = next(index for index in range(20, 60) if BLOCKS.output.index(BLOCKS.output[index]) == index)
    stop = BLOCKS.output[last]
    options = options_of(BLOCKS)
    options["extra_body"]["stop_token_ids"] = [stop]
    whole = ask(client, model, message_of(BLOCKS.case), **options)
    assert whole.token_ids == BLOCKS.output[: last + 1]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
    assert whole.text == load_tokenizer(BLOCKS.case.model_dir).decode(BLOCKS.output[:last])
    assert whole.report is not None
    streamed = ask_streaming(client, model, message_of(BLOCKS.case), **options)
    assert (streamed.text, streamed.token_ids) == (whole.text, whole.token_ids)
    assert (streamed.finish_reason, streamed.stop_reason, streamed.usage) == ("stop", stop, whole.usage)


def test_end_token_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    """The golden run that stops at <|eot_id|>, with the model's own end tokens in the stop string's place."""
    options = options_of(STOPPED) | {"stop": None}
    options["extra_body"]["ignore_eos"] = False
    answer = ask(client, model, message_of(STOPPED.case), **options)
    end = load_tokenizer(STOPPED.case.model_dir).convert_tokens_to_ids(EOT)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", end)
    assert answer.token_ids == [*STOPPED.output, end]
    assert answer.usage == (STOPPED.case.meta["prompt_len"], len(STOPPED.output) + 1)
    streamed = ask_streaming(client, model, message_of(STOPPED.case), **options)
    assert (streamed.text, streamed.token_ids, streamed.usage) == (answer.text, answer.token_ids, answer.usage)
    assert (streamed.finish_reason, streamed.stop_reason) == ("stop", end)


def test_client_that_leaves_ends_its_request(server: Server, client: openai.OpenAI, model: str) -> None:
    """That its blocks come back is asserted by the `server` fixture."""
    generated = server.metric("vllm:generation_tokens_total")
    with in_the_middle(client, model, message_of(BLOCKS.case)):
        assert server.metric("vllm:num_requests_running") == 1
        assert server.metric("vllm:kv_cache_usage_perc") > 0
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - generated < LONG
    answer = ask(client, model, message_of(PRUNED.case), **options_of(PRUNED))
    assert answer.token_ids == PRUNED.output
