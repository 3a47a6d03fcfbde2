"""A `vllm serve` under load: closed-loop clients, and what /metrics shows meanwhile.

`alone` asks every question by itself. `under_load` lets several clients ask them again and again, each with one request
at a time. `serve.py` measures its settings with both.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
from server import metric_values

ANSWER_SECONDS = 3600
SAMPLE_SECONDS = 0.04
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    key: names it, for comparing answers.
    messages: of the chat API.
    """

    key: str
    messages: list[Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request.

    key: of its question.
    sent: seconds since the load began.
    first_token, latency: seconds from sending until the first and the last token.
    tokens: ids.
    """

    key: str
    sent: float
    first_token: float
    latency: float
    tokens: list[int]


@dataclass(slots=True)
class Load:
    """Everything measured under load.

    samples: (seconds since the load began, gauge by name), as often as they were read.
    counters: how much each grew.
    """

    answers: list[Answered] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def alone(
    url: str, questions: Sequence[Question], options: Mapping[str, Any]
) -> tuple[dict[str, list[int]], dict[str, dict[str, Any]]]:
    """Each question by itself: its tokens, and its report."""
    tokens: dict[str, list[int]] = {}
    reports: dict[str, dict[str, Any]] = {}
    with openai.OpenAI(http_client=openai.DefaultHttpxClient(trust_env=False), **_client_options(url)) as client:
        for question in questions:
            answer = client.chat.completions.create(messages=question.messages, **_request_options(client, options))
            tokens[question.key] = (answer.choices[0].model_extra or {})["token_ids"]
            reports[question.key] = (answer.model_extra or {})["kv_transfer_params"]["redvtp"]
    return tokens, reports


def under_load(
    url: str, questions: Sequence[Question], options: Mapping[str, Any], clients: int, done: Callable[[], object]
) -> Load:
    """`clients` at once ask `questions` in order until all are answered. done: called after each answer."""
    return asyncio.run(_under_load(url, questions, options, clients, done))


async def _under_load(
    url: str, questions: Sequence[Question], options: Mapping[str, Any], clients: int, done: Callable[[], object]
) -> Load:
    load = Load()
    waiting = iter(questions)
    # One connection for each client, and no limit that would queue requests here instead of in the server.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=clients + 4)
    http = openai.DefaultAsyncHttpxClient(trust_env=False, limits=limits)
    async with openai.AsyncOpenAI(http_client=http, **_client_options(url)) as api:
        before = await _metrics(http, url)
        request = _request_options(api, options) | {"model": (await api.models.list()).data[0].id}
        began = time.perf_counter()

        async def client() -> None:
            for question in waiting:
                load.answers.append(await _ask(api, question, request, began))
                done()

        pages: list[tuple[float, str]] = []
        async with _sampling(http, url, pages, began), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        load.seconds = time.perf_counter() - began
        load.samples = [(at, _gauges(page)) for at, page in pages]
        after = await _metrics(http, url)
    load.counters = {name: value - before.get(name, 0) for name, value in after.items() if name.endswith("_total")}
    return load


async def _ask(api: openai.AsyncOpenAI, question: Question, request: dict[str, Any], began: float) -> Answered:
    sent = time.perf_counter()
    first: float | None = None
    tokens: list[int] = []
    # The type checker cannot see in a dictionary which kind of answer comes.
    stream: Any = await api.chat.completions.create(messages=question.messages, stream=True, **request)
    async for chunk in stream:
        new = (chunk.choices[0].model_extra or {}).get("token_ids") if chunk.choices else None
        if new:
            first = first or time.perf_counter()
            tokens += new
    ended = time.perf_counter()
    return Answered(question.key, sent - began, (first or ended) - sent, ended - sent, tokens)


@contextlib.asynccontextmanager
async def _sampling(
    http: openai.DefaultAsyncHttpxClient, url: str, pages: list[tuple[float, str]], began: float
) -> AsyncIterator[None]:
    """Meanwhile `pages` gets the /metrics page again and again. To be parsed later: that would hold up the clients."""

    async def sample() -> None:
        while True:
            page = (await http.get(f"{url}/metrics", timeout=60)).text
            pages.append((time.perf_counter() - began, page))
            await asyncio.sleep(SAMPLE_SECONDS)

    task = asyncio.create_task(sample())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _gauges(page: str) -> dict[str, float]:
    values = metric_values(page)
    return {name: values[metric] for name, metric in GAUGES.items()}


async def _metrics(http: openai.DefaultAsyncHttpxClient, url: str) -> Mapping[str, float]:
    return metric_values((await http.get(f"{url}/metrics", timeout=60)).text)


def _client_options(url: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": ANSWER_SECONDS}


def _request_options(client: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    extra = {"return_token_ids": True, **options.get("extra_body", {})}
    request = {**options, "temperature": 0, "extra_body": extra}
    if isinstance(client, openai.OpenAI):
        request["model"] = client.models.list().data[0].id
    return request
