"""Conversations of every shape over every endpoint: the engine's tokens, whole and streamed.

What is expected comes from the embedded engine, given the conversation as text written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from golden_data import Case
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from serving.chat import CHECKPOINT, ask, ask_in_pieces, data_url, in_pieces, message

pytestmark = pytest.mark.serving
EngineFactory = Callable[..., LocalEngine]

SQUARE, TALL = (Case(CHECKPOINT, name) for name in ("square", "tall"))
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _photo(case: Case) -> bytes:
    return case.image_files[0].read_bytes()


def _text(*turns: tuple[str, str]) -> str:
    """LLaDA's conversation, up to where the assistant speaks."""
    said = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{words}<|eot_id|>" for role, words in turns)
    return f"<|startoftext|>{said}<|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Conversation:
    """messages as a client sends them; the same as text, with the cases whose images it shows."""

    name: str
    messages: tuple[Any, ...]
    text: str
    cases: tuple[Case, ...] = ()

    def __str__(self) -> str:
        return self.name


ANSWER = {"role": "assistant", "content": "A square."}
CONVERSATIONS = [
    Conversation("one turn", (message("Hello"),), _text(("system", SYSTEM), ("user", "Hello"))),
    Conversation(
        "system prompt",
        ({"role": "system", "content": "Answer in one word."}, message("What?", [_photo(SQUARE)])),
        _text(("system", "Answer in one word."), ("user", "<image>\nWhat?")),
        (SQUARE,),
    ),
    Conversation(
        "image in the first of two turns",
        (message("What?", [_photo(SQUARE)]), ANSWER, message("Are you sure?")),
        _text(("system", SYSTEM), ("user", "<image>\nWhat?"), ("assistant", "A square."), ("user", "Are you sure?")),
        (SQUARE,),
    ),
    Conversation(
        "an image in each turn",
        (message("What?", [_photo(SQUARE)]), ANSWER, message("And this?", [_photo(TALL)])),
        _text(
            ("system", SYSTEM),
            ("user", "<image>\nWhat?"),
            ("assistant", "A square."),
            ("user", "<image>\nAnd this?"),
        ),
        (SQUARE, TALL),
    ),
    Conversation(
        "three images at once",
        (message("Which is tall?", [_photo(SQUARE), _photo(TALL), _photo(SQUARE)]),),
        _text(("system", SYSTEM), ("user", "<image>\n<image>\n<image>\nWhich is tall?")),
        (SQUARE, TALL, SQUARE),
    ),
]


def _expected(
    engine: EngineFactory, conversation: Conversation, pruning: PruningParams | None = None, **denoising: Any
) -> Any:
    images = tuple(case.images()[0] for case in conversation.cases)
    params = DenoisingParams(ignore_eos=True, **denoising)
    request = Request(conversation.text, images, params, pruning or PruningParams())
    (generation,) = engine(CHECKPOINT).generate([request])
    return generation


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=str)
def test_chat_answers_as_the_engine_whole_and_streamed(
    client: openai.OpenAI, model: str, engine: EngineFactory, conversation: Conversation
) -> None:
    expected = _expected(engine, conversation, gen_length=40, block_length=16, steps=21)
    options: dict[str, Any] = {
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "vllm_xargs": {"redvtp_block_length": 16, "redvtp_steps": 21}},
    }
    whole = ask(client, model, *conversation.messages, **options)
    assert whole.token_ids == expected.output_ids
    assert whole.usage == (expected.prompt_tokens, 40)
    streamed = ask_in_pieces(client, model, *conversation.messages, least=3, **options)
    assert (streamed.text, streamed.token_ids, streamed.usage) == (whole.text, whole.token_ids, whole.usage)
    assert streamed.finish_reason == whole.finish_reason == "length"


@pytest.mark.parametrize(
    "knobs", [{"block_length": 32}, {"block_length": 7}, {"block_length": 1, "steps": 37}], ids=str
)
def test_canvas_need_not_be_a_multiple_of_the_block_length(
    client: openai.OpenAI, model: str, engine: EngineFactory, knobs: dict[str, Any]
) -> None:
    conversation = CONVERSATIONS[1]
    expected = _expected(engine, conversation, gen_length=37, **knobs)
    xargs = {f"redvtp_{name}": value for name, value in knobs.items()}
    extra = {"ignore_eos": True, "vllm_xargs": xargs}
    answer = ask(client, model, *conversation.messages, max_tokens=37, temperature=0, extra_body=extra)
    assert answer.token_ids == expected.output_ids
    assert len(answer.token_ids) == 37


def test_report_says_what_is_left_of_each_image(client: openai.OpenAI, model: str, engine: EngineFactory) -> None:
    conversation = CONVERSATIONS[3]
    expected = _expected(engine, conversation, PruningParams(keep_ratio=0.3), gen_length=16)
    (pruning,) = (step.pruning for step in expected.steps if step.pruning is not None)
    extra = {"ignore_eos": True, "vllm_xargs": {"redvtp_keep_ratio": 0.3, "redvtp_report": "full"}}
    answer = ask(client, model, *conversation.messages, max_tokens=16, temperature=0, extra_body=extra)
    assert answer.report is not None
    assert answer.report["kept"] == pruning.kept
    counts = [end - start for start, end in expected.visual_spans]
    kept = [sum(index < counts[0] for index in pruning.kept), sum(index >= counts[0] for index in pruning.kept)]
    # All images are ranked together, so the shares differ.
    assert kept[0] / counts[0] != kept[1] / counts[1]
    assert answer.report["images"] == [
        {"visual_tokens": count, "visual_tokens_kept": left, "kept_share": pytest.approx(left / count, abs=1e-4)}
        for count, left in zip(counts, kept, strict=True)
    ]


def test_responses_endpoint_answers_as_chat_does(client: openai.OpenAI, model: str) -> None:
    """With its own words for the same conversation, whole and as a stream of events."""
    system, user = CONVERSATIONS[1].messages
    extra: dict[str, Any] = {"ignore_eos": True, "vllm_xargs": {"redvtp_keep_ratio": 0.25}}
    chat = ask(client, model, system, user, max_tokens=24, temperature=0, extra_body=extra)
    image = {"type": "input_image", "image_url": data_url(_photo(SQUARE)), "detail": "auto"}
    request: dict[str, Any] = {
        "model": model,
        "instructions": "Answer in one word.",
        "input": [{"role": "user", "content": [image, {"type": "input_text", "text": "What?"}]}],
        "max_output_tokens": 24,
        "temperature": 0,
        "extra_body": extra,
    }
    whole = client.responses.create(**request)
    assert whole.output_text == chat.text
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == chat.usage
    assert (whole.model_extra or {})["kv_transfer_params"]["redvtp"] == chat.report
    events = in_pieces(
        3, lambda events: len(_texts(events)), lambda: list(client.responses.create(**request, stream=True))
    )
    assert "".join(_texts(events)) == chat.text
    (end,) = (event.response for event in events if event.type in ("response.completed", "response.incomplete"))
    assert end.usage is not None
    assert (end.usage.input_tokens, end.usage.output_tokens) == chat.usage


def _texts(events: list[Any]) -> list[str]:
    return [event.delta for event in events if event.type == "response.output_text.delta"]


def test_completions_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {
        "model": model,
        "prompt": CONVERSATIONS[0].text,
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "vllm_xargs": {"redvtp_block_length": 8}},
    }
    whole = client.completions.create(**request)
    chat = ask(
        client, model, *CONVERSATIONS[0].messages, max_tokens=40, temperature=0, extra_body=request["extra_body"]
    )
    assert whole.choices[0].text == chat.text
    usage_too: Any = {"include_usage": True}
    chunks = in_pieces(
        4, len, lambda: list(client.completions.create(**request, stream=True, stream_options=usage_too))
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    (usage,) = (chunk.usage for chunk in chunks if chunk.usage is not None)
    assert usage == whole.usage
    (reason,) = (choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason)
    assert reason == whole.choices[0].finish_reason == "length"


def test_each_of_several_answers_has_its_own_noise(client: openai.OpenAI, model: str) -> None:
    """`n` with a temperature: as many different answers, the same ones for the same seed."""

    def texts() -> list[str | None]:
        response = client.chat.completions.create(
            model=model,
            messages=[message("Hello")],
            n=3,
            temperature=1,
            seed=7,
            max_tokens=24,
            extra_body={"ignore_eos": True},
        )
        return [choice.message.content for choice in response.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first
