"""A `vllm serve` under load: the server's process, closed-loop clients, and what /metrics shows meanwhile.

`serving` starts the server, `alone` asks every question by itself, `under_load` lets a number of clients ask them again
and again, each with one request at a time. What `serve.py` measures its settings with.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

HOST = "127.0.0.1"
START_SECONDS = 900
ANSWER_SECONDS = 3600
SAMPLE_SECONDS = 0.1
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}


@dataclass(frozen=True, slots=True)
class Question:
    """messages: of the chat API. key: which question it is, for comparing answers."""

    key: str
    messages: list[Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request. Seconds: when it was sent, since the load began; until its first token; until its last."""

    key: str
    sent: float
    first_token: float
    latency: float
    tokens: list[int]


@dataclass(slots=True)
class Load:
    """samples: (seconds since the load began, gauge by name), as often as they were read."""

    answers: list[Answered] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[str]:
    """The address of `vllm serve model flags...`, once it is healthy; gone afterwards, with all its processes."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    # The plugin may be run from a checkout: its entry point is installed, whatever Python path it comes from.
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--plugin", "redvtp"]
    with tempfile.NamedTemporaryFile(prefix="vllm-serve-", suffix=".log") as log:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port), *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, f"http://{HOST}:{port}", Path(log.name))
            yield f"http://{HOST}:{port}"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                # Engine and workers outlive a server that was killed: the whole group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise RuntimeError(f"vllm serve did not come up (exit status {process.poll()}):\n{end}")
        time.sleep(0.5)


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

        async with _sampling(http, url, load, began), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        load.seconds = time.perf_counter() - began
        after = await _metrics(http, url)
    load.counters = {name: value - before.get(name, 0) for name, value in after.items() if name.endswith("_total")}
    return load


async def _ask(api: openai.AsyncOpenAI, question: Question, request: dict[str, Any], began: float) -> Answered:
    sent = time.perf_counter()
    first: float | None = None
    tokens: list[int] = []
    # Options that are a dictionary hide from the type checker which kind of answer comes.
    stream: Any = await api.chat.completions.create(messages=question.messages, stream=True, **request)
    async for chunk in stream:
        new = (chunk.choices[0].model_extra or {}).get("token_ids") if chunk.choices else None
        if new:
            first = first or time.perf_counter()
            tokens += new
    ended = time.perf_counter()
    return Answered(question.key, sent - began, (first or ended) - sent, ended - sent, tokens)


@contextlib.asynccontextmanager
async def _sampling(http: openai.DefaultAsyncHttpxClient, url: str, load: Load, began: float) -> AsyncIterator[None]:
    async def sample() -> None:
        while True:
            metrics = await _metrics(http, url)
            load.samples.append(
                (time.perf_counter() - began, {name: metrics[metric] for name, metric in GAUGES.items()})
            )
            await asyncio.sleep(SAMPLE_SECONDS)

    task = asyncio.create_task(sample())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _metrics(http: openai.DefaultAsyncHttpxClient, url: str) -> dict[str, float]:
    """Counters and gauges, summed over their labels."""
    text = (await http.get(f"{url}/metrics", timeout=60)).text
    values: dict[str, float] = {}
    for name, value in re.findall(r"^(vllm:[a-z0-9_]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def _client_options(url: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": ANSWER_SECONDS}


def _request_options(client: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    extra = {"return_token_ids": True, **options.get("extra_body", {})}
    request = {**options, "temperature": 0, "extra_body": extra}
    if isinstance(client, openai.OpenAI):
        request["model"] = client.models.list().data[0].id
    return request
