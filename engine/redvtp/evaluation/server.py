"""A running `vllm serve` as a backend, over the OpenAI chat API with `concurrency` clients at a time.

Every parameter with a value is sent with every request, so the server's defaults do not change the answers.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from redvtp.errors import BadInput
from redvtp.evaluation.backends import Answer, Take
from redvtp.evaluation.grid import Question
from redvtp.params import DenoisingParams, PruningParams

# An answer comes whole; a long one on a busy CPU takes minutes.
TIMEOUT_SECONDS = 1800
# Refusals of one request. All others concern the server or the account, and would meet the next request too.
_ABOUT_THE_REQUEST = {400, 413, 422}
# Sent under the API's names; `redvtp eval` refuses a suffix.
_NO_KNOBS = {"gen_length", "temperature", "seed", "stop", "ignore_eos", "suffix"}


class ServerBackend:
    """A server's OpenAI API.

    url: of the server, with or without /v1.
    model: the served name; None takes the first one the server has.
    concurrency: clients at a time.

    `OPENAI_API_KEY` is sent if it is set. Raises BadInput when the server cannot be reached or has no such model.
    """

    def __init__(self, url: str, model: str | None, concurrency: int) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        self._concurrency = concurrency
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "api_key": os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": TIMEOUT_SECONDS,
        }
        try:
            with openai.OpenAI(**self._options) as client:
                names = [served.id for served in client.models.list()]
        except openai.OpenAIError as error:
            raise BadInput(f"the server at {self.url} cannot be asked: {_reason(error)}") from error
        if not names or (model is not None and model not in names):
            raise BadInput(f"the server at {self.url} serves {', '.join(names) or 'no model'}, not {model}")
        self.model = model or names[0]

    def answer(self, questions: Sequence[Question], take: Take) -> None:
        try:
            asyncio.run(self._answer(questions, take))
        except ExceptionGroup as group:
            # One client's failure cancels the others; a group leaves cancellations out.
            raise group.exceptions[0] from group

    async def _answer(self, questions: Sequence[Question], take: Take) -> None:
        waiting = iter(questions)
        async with openai.AsyncOpenAI(**self._options) as api, asyncio.TaskGroup() as clients:
            for _ in range(self._concurrency):
                clients.create_task(self._client(api, waiting, take))

    async def _client(self, api: openai.AsyncOpenAI, waiting: Iterator[Question], take: Take) -> None:
        for question in waiting:
            take(question, await self._ask(api, question))

    async def _ask(self, api: openai.AsyncOpenAI, question: Question) -> Answer:
        request = chat_request(question)
        began = time.perf_counter()
        try:
            response = await api.chat.completions.create(model=self.model, **request)
        except openai.APIStatusError as error:
            if error.status_code in _ABOUT_THE_REQUEST:
                return Answer(error=_reason(error))
            raise self._lost(error) from error
        except openai.OpenAIError as error:
            raise self._lost(error) from error
        seconds = time.perf_counter() - began
        report = ((response.model_extra or {}).get("kv_transfer_params") or {}).get("redvtp")
        if report is None:
            raise BadInput(f"the server at {self.url} sent no redvtp report; start it with --plugin redvtp")
        return Answer(
            text=response.choices[0].message.content or "",
            tokens=response.usage.completion_tokens if response.usage else 0,
            steps=report["steps"],
            latency_s=seconds,
            visual_tokens=report["visual_tokens"],
            visual_tokens_kept=report["visual_tokens_kept"],
            kv_blocks=report["kv_blocks_admitted"],
            kv_blocks_freed=report["blocks_freed"],
        )

    def _lost(self, error: openai.OpenAIError) -> BadInput:
        return BadInput(f"the server at {self.url} failed: {_reason(error)}; what it has answered is kept")


def chat_request(question: Question) -> dict[str, Any]:
    """The question as keywords of `chat.completions.create`, without the model."""
    denoising, pruning = question.denoising, question.pruning
    given = {field.name: getattr(denoising, field.name) for field in fields(DenoisingParams)}
    given |= {"block_length": denoising.resolved_block_length, "steps": denoising.resolved_steps}
    knobs = {name: value for name, value in given.items() if name not in _NO_KNOBS}
    knobs |= {field.name: getattr(pruning, field.name) for field in fields(PruningParams)}
    knobs["pruning"] = knobs.pop("preset")
    # JSON has a null, but vLLM takes none here. Sending `steps` switches a server's confidence rule off.
    knobs = {name: value for name, value in knobs.items() if value not in (None, ())}
    knobs["report"] = "summary"
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(path)}} for path in question.task.images
    ]
    content.append({"type": "text", "text": question.task.question})
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": denoising.gen_length,
        "temperature": denoising.temperature,
        "seed": denoising.seed,
        "stop": list(denoising.stop),
        "extra_body": {
            "ignore_eos": denoising.ignore_eos,
            "vllm_xargs": {f"redvtp_{name}": value for name, value in knobs.items()},
        },
    }


def data_url(path: Path) -> str:
    """The unchanged bytes of an image file, as a data URL."""
    with Image.open(path) as image:
        kind = image.get_format_mimetype() or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _reason(error: openai.OpenAIError) -> str:
    """The server's message if it sent one."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return f"{error}{cause}"
