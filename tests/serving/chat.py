"""Golden cases as chats over HTTP: the request as the official `openai` client sends it, the answer in plain values."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import openai

from golden_data import Case, Run, runs
from plugin.requests import sampling_of

CHECKPOINT = "tiny-llada-v"
# Knobs the second server has as its own defaults (test_defaults.py).
SERVER_DEFAULTS = {"keep_ratio": 0.25, "steps": 32}
# Tokens of a request to look at, or to leave, in the middle: thousands of steps of a tenth of a second.
LONG = 2048


@dataclass(frozen=True)
class Answer:
    """report: `kv_transfer_params["redvtp"]`; not in streamed answers. usage: (prompt tokens, completion tokens)."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    usage: tuple[int, int]
    report: dict[str, Any] | None
    chunks: int = 1


def golden_run(case: str, name: str) -> Run:
    (run,) = (run for run in runs(checkpoints=(CHECKPOINT,)) if (run.case.name, run.name) == (case, name))
    assert run.robust, f"{run}: an independent implementation may differ"
    return run


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def message(question: str, images: Sequence[bytes] = ()) -> Any:
    """One user turn; images, as bytes of PNG files, go as data URLs."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def message_of(case: Case) -> Any:
    return message(case.question, [file.read_bytes() for file in case.image_files])


def options_of(run: Run) -> dict[str, Any]:
    """What a golden run asks for, as keywords of `chat.completions.create`."""
    sampling = sampling_of(run)
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stop": sampling.stop,
        "extra_body": {"ignore_eos": sampling.ignore_eos, "vllm_xargs": sampling.extra_args},
    }


def ask(client: openai.OpenAI, model: str, *messages: Any, **options: Any) -> Answer:
    """A whole answer."""
    response = client.chat.completions.create(model=model, messages=list(messages), **_with_token_ids(options))
    (choice,) = response.choices
    assert response.usage is not None
    fields = choice.model_extra or {}
    transferred = (response.model_extra or {}).get("kv_transfer_params")
    return Answer(
        text=choice.message.content or "",
        token_ids=fields["token_ids"],
        finish_reason=choice.finish_reason,
        stop_reason=fields["stop_reason"],
        usage=(response.usage.prompt_tokens, response.usage.completion_tokens),
        report=transferred["redvtp"] if transferred else None,
    )


def ask_in_pieces(client: openai.OpenAI, model: str, *messages: Any, least: int, **options: Any) -> Answer:
    """The same from a stream of at least so many chunks with new tokens."""
    answer: Answer = in_pieces(least, attrgetter("chunks"), lambda: ask_streaming(client, model, *messages, **options))
    return answer


def ask_streaming(client: openai.OpenAI, model: str, *messages: Any, **options: Any) -> Answer:
    """The same put together from a stream; `chunks` counts those with new tokens."""
    stream = client.chat.completions.create(
        model=model,
        messages=list(messages),
        stream=True,
        stream_options={"include_usage": True},
        **_with_token_ids(options),
    )
    texts: list[str] = []
    token_ids: list[int] = []
    ends: list[tuple[str, int | str | None]] = []
    usages: list[tuple[int, int]] = []
    chunks = 0
    for chunk in stream:
        if chunk.usage is not None:
            usages.append((chunk.usage.prompt_tokens, chunk.usage.completion_tokens))
        for choice in chunk.choices:
            fields = choice.model_extra or {}
            texts.append(choice.delta.content or "")
            token_ids += fields.get("token_ids") or []
            chunks += bool(fields.get("token_ids"))
            if choice.finish_reason is not None:
                ends.append((choice.finish_reason, fields.get("stop_reason")))
    # Once each, and at the end.
    (usage,), ((finish_reason, stop_reason),) = usages, ends
    return Answer("".join(texts), token_ids, finish_reason, stop_reason, usage, None, chunks)


def in_pieces(least: int, pieces: Callable[[Any], int], ask_once: Callable[[], Any]) -> Any:
    """A streamed answer of at least so many pieces; vLLM joins those that come while its front-end is kept waiting."""
    seen: list[int] = []
    while len(seen) < 20:
        streamed = ask_once()
        seen.append(pieces(streamed))
        if seen[-1] >= least:
            return streamed
    raise AssertionError(f"never in {least} pieces, but in {seen}")


@contextmanager
def in_the_middle(client: openai.OpenAI, model: str, *messages: Any, **knobs: Any) -> Iterator[Iterator[str]]:
    """A request for `LONG` tokens after its first ones, yielding the pieces of text that follow.

    The client leaves it at the end of the block.
    """
    asked = {"redvtp_block_length": 8} | {f"redvtp_{name}": value for name, value in knobs.items()}
    stream = client.chat.completions.create(
        model=model,
        messages=list(messages),
        stream=True,
        max_tokens=LONG,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": asked},
    )
    with stream:
        pieces = (text for chunk in stream if (text := chunk.choices[0].delta.content))
        next(pieces)
        yield pieces


def _with_token_ids(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "extra_body": {**options.get("extra_body", {}), "return_token_ids": True}}
