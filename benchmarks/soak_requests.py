"""What a soak sends: good requests with one right answer, and wrong and hostile ones that must be refused.

`good_requests()` are few and fixed, so that each can be sent alone beforehand. `hostile_request(random)` is a new one
each time. Bodies are bytes: no client library sends most of the hostile ones.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from image_bytes import claimed_png, png
from PIL import Image

from redvtp.params import DenoisingParams, PruningParams

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
KNOBS = sorted(
    {field.name for field in (*fields(DenoisingParams), *fields(PruningParams))}
    - {"preset", "stop", "seed", "temperature", "ignore_eos", "suffix"}
)


@dataclass(frozen=True)
class Sent:
    """A request. kind: its name in the table."""

    kind: str
    path: str
    body: bytes
    stream: bool = False


def picture(width: int, height: int, seed: int) -> bytes:
    """A PNG of noise in large squares."""
    noise = Image.frombytes("RGB", (8, 8), Random(seed).randbytes(8 * 8 * 3))
    return png(noise.resize((width, height), Image.Resampling.NEAREST))


def _url(image: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def _chat(model: str, urls: list[str], text: str, **options: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
    return body | {"return_token_ids": True} | options


def _knobs(**knobs: Any) -> dict[str, Any]:
    return {"vllm_xargs": {f"redvtp_{name}": value for name, value in knobs.items()}}


def good_requests(model: str) -> list[Sent]:
    """Greedy or seeded, so each has one right answer."""
    wide, tall, small = (_url(picture(*size, seed)) for seed, size in enumerate([(200, 90), (60, 180), (30, 30)]))
    fill = {"ignore_eos": True}
    chats: dict[str, dict[str, Any]] = {
        "text only": _chat(model, [], "Hello", max_tokens=24, **fill),
        "defaults": _chat(model, [wide], "What is it?"),
        "keep a quarter": _chat(model, [tall], "What?", max_tokens=32, **fill, **_knobs(keep_ratio=0.25)),
        "prefix cache": _chat(model, [wide], "Why?", max_tokens=40, **fill, **_knobs(cache="prefix")),
        "dual cache": _chat(model, [tall], "Why?", max_tokens=40, **fill, **_knobs(cache="dual", block_length=16)),
        "prefix-LM": _chat(model, [tall], "Why?", max_tokens=32, **fill, **_knobs(cache="prefix_lm")),
        "random remasking": _chat(model, [small], "Who?", seed=3, **fill, **_knobs(remasking="random")),
        "a temperature": _chat(model, [wide], "Who?", temperature=0.8, seed=4, max_tokens=24, **fill),
        "three images": _chat(model, [wide, tall, small], "Which?", **fill, **_knobs(positions="original")),
        "fifty images": _chat(model, [small] * 50, "How many?", max_tokens=4, **fill),
        "wrong MIME type": _chat(model, [_url(picture(50, 50, 9), "text/html")], "What?", **fill),
        "a draft": _chat(model, [small], "What?", max_tokens=64, **_knobs(draft="It is <mask><mask> and <mask>.")),
        "a stop string": _chat(model, [wide], "Stop.", max_tokens=48, stop=["e"], **fill),
        "a full report": _chat(model, [wide], "What?", **fill, **_knobs(report="full")),
        "uneven blocks": _chat(model, [tall], "When?", max_tokens=37, **fill, **_knobs(block_length=8)),
    }
    sent = [Sent(name, CHAT, json.dumps(body).encode()) for name, body in chats.items()]
    sent += [
        Sent(f"{name}, streamed", CHAT, json.dumps(chats[name] | {"stream": True}).encode(), stream=True)
        for name in ("keep a quarter", "text only", "a stop string")
    ]
    text = {"model": model, "prompt": "Once", "max_tokens": 20, "temperature": 0, "return_token_ids": True, **fill}
    sent.append(Sent("completions", COMPLETIONS, json.dumps(text).encode()))
    return sent


def long_request(model: str, random: Random) -> Sent:
    """A request for the client to abandon."""
    image = [_url(picture(120, 120, 5))] if random.random() < 0.5 else []
    body = _chat(model, image, "Tell all.", max_tokens=512, ignore_eos=True, **_knobs(block_length=16))
    stream = random.random() < 0.5
    return Sent("left early", CHAT, json.dumps(body | {"stream": stream}).encode(), stream)


# JSON values that every knob refuses; Python cannot express some of them.
_HOSTILE_VALUES = [
    "NaN",
    "1e999",
    "-Infinity",
    "-1",
    "1" + "0" * 40,
    "[[1]]",
    '{"a": {"b": 1}}',
    "null",
    '"\\ud800"',
    '"?"',
]


def hostile_request(model: str, random: Random) -> Sent:
    """A wrong or malicious request, to be answered with 4xx."""
    kind, make = random.choice(list(_HOSTILE.items()))
    made = make(model, random)
    path, body = made if isinstance(made, tuple) else (CHAT, made)
    return Sent(kind, path, body if isinstance(body, bytes) else json.dumps(body).encode())


def _image(make: Callable[[Random], bytes | str]) -> Callable[[str, Random], dict[str, Any]]:
    """A chat about bytes or a URL that are no image. make: bytes for a data URL, or a whole URL."""

    def chat(model: str, random: Random) -> dict[str, Any]:
        made = make(random)
        return _chat(model, [made if isinstance(made, str) else _url(made)], "What?")

    return chat


def _truncated(random: Random) -> bytes:
    image = picture(64, 64, 7)
    return image[: random.randrange(len(image) * 3 // 4)]


def _knob_as_text(model: str, random: Random) -> bytes:
    body = json.dumps(_chat(model, [], "Hello") | {"vllm_xargs": {f"redvtp_{random.choice(KNOBS)}": "VALUE"}})
    return body.replace('"VALUE"', random.choice(_HOSTILE_VALUES)).encode()


_OPTIONS: list[dict[str, Any]] = [
    {"logprobs": True},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {"5": 1}},
    {"min_tokens": 2},
    {"n": 0},
    {"n": 2},
    {"max_tokens": 0},
    {"max_tokens": 10**9},
    {"temperature": -1},
    {"stop": [""]},
    {"stop_token_ids": [10**9]},
    {"seed": 2**70},
    {"use_beam_search": True},
    {"messages": []},
    {"messages": "Hello"},
    {"messages": [{"role": "user", "content": 5}]},
    {"model": "nosuch"},
]
_HOSTILE: dict[str, Callable[[str, Random], Any]] = {
    "bad base64": _image(lambda random: "data:image/png;base64,@@" + "A" * random.randrange(99)),
    "data URL without base64": _image(lambda random: "data:image/png,abc"),
    "local file": _image(lambda random: random.choice(["file:///etc/passwd", "file:///nosuch.png", "file://"])),
    "unreachable host": _image(lambda random: "http://127.0.0.1:1/a.png"),
    "no URL": _image(lambda random: random.choice(["photo.png", "ftp://a/b", "http://[::1", "javascript:1"])),
    "truncated PNG": _image(_truncated),
    "noise for an image": _image(lambda random: random.randbytes(random.randrange(1, 4000))),
    "30k x 30k PNG": _image(lambda random: claimed_png(30_000, 30_000)),
    "image too long": _image(lambda random: png(Image.new("1", (70_000, 4)))),
    "megabytes of text": lambda model, random: _chat(model, [], "word " * random.randrange(200_000, 800_000)),
    "megabytes of suffix": lambda model, random: _chat(model, [], "Hello", **_knobs(suffix="word " * 400_000)),
    "hostile knob": _knob_as_text,
    "unknown knob": lambda model, random: _chat(model, [], "Hello", **_knobs(**{f"keep_{random.random()}": 1})),
    "knob without prefix": lambda model, random: _chat(model, [], "Hello", vllm_xargs={"keep_ratio": 0.5}),
    "bad option": lambda model, random: _chat(model, [], "Hello") | random.choice(_OPTIONS),
    "marks without images": lambda model, random: _chat(model, [], "<image>" * random.randrange(1, 40)),
    "not JSON": lambda model, random: random.randbytes(random.randrange(1, 2000)),
    "nested 5,000 deep": lambda model, random: b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no such path": lambda model, random: (f"/v1/nosuch/{random.random()}", {"model": model}),
    "bad completion": lambda model, random: (COMPLETIONS, {"model": model, "prompt": [10**9], "max_tokens": 4}),
    "bad response": lambda model, random: (RESPONSES, {"model": model, "input": "Hi", "max_output_tokens": -5}),
}
