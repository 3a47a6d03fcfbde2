"""How answers arrive and end: streams, stop strings, end tokens, usage, a client that leaves."""

from __future__ import annotations

import openai
import pytest

from golden_data import Run
from redvtp.prompt import EOT, load_tokenizer
from serving.chat import ask, ask_streaming, golden_run, message_of, options_of
from serving.server import Server

pytestmark = pytest.mark.serving

# Two canvas blocks and 20 steps: the resolved prefix grows in many pieces.
BLOCKS = golden_run("tall", "plain_g64_b16_s20")
PRUNED = golden_run("square", "redvtp_k25_g32_b32_s16")
STOPPED = golden_run("wide", "stop_g32_b32_s16")


@pytest.mark.parametrize("run", [BLOCKS, PRUNED], ids=str)
def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: str, run: Run) -> None:
    whole = ask(client, model, message_of(run.case), **options_of(run))
    streamed = ask_streaming(client, model, message_of(run.case), **options_of(run))
    assert streamed.text == whole.text
    assert streamed.token_ids == whole.token_ids == run.output
    assert streamed.chunks > 2
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


def test_end_token_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    """The golden run that stops at <|eot_id|>, with the model's own end tokens in the stop string's place."""
    options = options_of(STOPPED) | {"stop": None}
    options["extra_body"]["ignore_eos"] = False
    answer = ask(client, model, message_of(STOPPED.case), **options)
    end = load_tokenizer(STOPPED.case.model_dir).convert_tokens_to_ids(EOT)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", end)
    assert answer.token_ids == [*STOPPED.output, end]
    assert answer.usage == (STOPPED.case.meta["prompt_len"], len(STOPPED.output) + 1)


def test_client_that_leaves_ends_its_request(server: Server, client: openai.OpenAI, model: str) -> None:
    """That its blocks come back is asserted by the `server` fixture."""
    length = 2048
    generated = server.metric("vllm:generation_tokens_total")
    stream = client.chat.completions.create(
        model=model,
        messages=[message_of(BLOCKS.case)],
        stream=True,
        max_tokens=length,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"redvtp_block_length": 8}},
    )
    next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    assert server.metric("vllm:num_requests_running") == 1
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    stream.close()
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - generated < length
    answer = ask(client, model, message_of(PRUNED.case), **options_of(PRUNED))
    assert answer.token_ids == PRUNED.output
