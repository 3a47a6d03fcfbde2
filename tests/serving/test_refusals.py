"""What a client can get wrong: HTTP 400 with the reason, and the next request is answered as if nothing had been.

The `server` fixture adds that nothing was logged as a crash and no KV block was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from image_bytes import claimed_png, png
from PIL import Image

from golden_data import Case
from serving.chat import CHECKPOINT, ask, message
from serving.server import Server
from vllm_redvtp.knob_names import KNOBS

pytestmark = pytest.mark.serving

SQUARE = Case(CHECKPOINT, "square")
PHOTO = SQUARE.image_files[0].read_bytes()
LONGEST = 4096  # max_position_embeddings of the checkpoint


@pytest.fixture
def answering(client: openai.OpenAI, model: str) -> Iterator[openai.OpenAI]:
    """A client of a server that must still answer after the test."""
    yield client
    answer = ask(client, model, message("Hello"), max_tokens=4, temperature=0, extra_body={"ignore_eos": True})
    assert len(answer.token_ids) == 4


def _refused(client: openai.OpenAI, model: str, *messages: Any, match: str, **options: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=match) as refusal:
        ask(client, model, *messages, **{"max_tokens": 8, "temperature": 0, **options})
    assert refusal.value.status_code == 400


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"pruning": "external", "importance": [0.5] * 3}, "one number for each of the 88 visual tokens .* got 3"),
        ({"pruning": "external", "importance": ["high"] * 88}, "redvtp_importance must be finite numbers"),
        ({"pruning": "attention-free", "prune_step": 0}, "redvtp_prune_step has no meaning with redvtp_pruning att"),
        ({"score_layers": "3:9"}, "redvtp_score_layers must be layers N or a range A:B within 0:4, got '3:9'"),
    ],
)
def test_impossible_policy_is_refused(answering: openai.OpenAI, model: str, knobs: dict[str, Any], reason: str) -> None:
    body = {"vllm_xargs": {f"redvtp_{name}": value for name, value in knobs.items()}}
    _refused(answering, model, message("What?", [PHOTO]), match=reason, extra_body=body)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        pytest.param([b"no image at all"], "cannot identify image file", id="text"),
        pytest.param([b""], "cannot identify image file", id="empty"),
        pytest.param([PHOTO[: len(PHOTO) // 2]], "image file is truncated", id="truncated"),
        pytest.param([claimed_png(30_000, 30_000)], "900000000 pixels.*decompression bomb", id="bomb"),
        # Below PIL's own limit for errors, and all its pixels are there.
        pytest.param([png(Image.new("L", (10_000, 9_000)))], "10000x9000 has more than 89,478,485 pixels", id="huge"),
        pytest.param([png(Image.new("RGB", (70_000, 8)))], "70000x8 is longer than 65535 pixels", id="longest"),
        pytest.param([png(Image.new("RGB", (20_000, 64))), PHOTO], "20000x64 is longer than 16384 pixels", id="padded"),
    ],
)
def test_bad_image_is_refused(answering: openai.OpenAI, model: str, images: list[bytes], reason: str) -> None:
    _refused(answering, model, message("What?", images), match=reason)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png,%89PNG", "Only base64 data URLs are supported"),
        ("data:image/png;base64", "missing ',' separator"),
        ("photo.png", "must be either a HTTP, data or file URL"),
        ("file:///etc/hostname", "Cannot load local files without `--allowed-local-media-path`"),
        ("http://[::1/a.png", "Failed to parse"),
    ],
)
def test_bad_image_url_is_refused(answering: openai.OpenAI, model: str, url: str, reason: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    _refused(answering, model, {"role": "user", "content": content}, match=reason)
    image = {"type": "input_image", "image_url": url, "detail": "auto"}
    turns: Any = [{"role": "user", "content": [image]}]
    with pytest.raises(openai.BadRequestError, match=reason):
        answering.responses.create(model=model, input=turns)


def test_image_of_a_host_that_cannot_be_reached_is_refused(answering: openai.OpenAI, model: str) -> None:
    """As vLLM refuses a URL that is answered with 404, and not with an HTTP 500 that looks like our fault."""
    # Nobody listens on port 1.
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]
    with pytest.raises(openai.UnprocessableEntityError, match="image could not be fetched: Cannot connect to host"):
        ask(answering, model, {"role": "user", "content": content}, max_tokens=8)


def test_wrong_type_in_a_data_url_does_not_matter(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    content = message("What?", [PHOTO])["content"]
    expected = ask(client, model, {"role": "user", "content": content}, **options)
    content[0]["image_url"]["url"] = content[0]["image_url"]["url"].replace("image/png", "text/html")
    assert ask(client, model, {"role": "user", "content": content}, **options).token_ids == expected.token_ids


@pytest.mark.parametrize("size", [(1, 1), (20_000, 64), (64, 20_000)], ids=str)
def test_extreme_image_is_answered(answering: openai.OpenAI, model: str, size: tuple[int, int]) -> None:
    image = png(Image.new("RGB", size, (10, 20, 30)))
    options = {"max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    assert len(ask(answering, model, message("What?", [image]), **options).token_ids) == 4


@pytest.mark.parametrize(
    ("marks", "images", "reason"),
    [
        (2, 1, "more '<image>' placeholders in input prompt than actual multimodal data"),
        (3, 2, "more '<image>' placeholders in input prompt than actual multimodal data"),
        (1, 0, "the prompt has 1 <image> mark but 0 images were given"),
    ],
)
def test_more_marks_than_images_are_refused(
    answering: openai.OpenAI, model: str, marks: int, images: int, reason: str
) -> None:
    _refused(answering, model, message("<image> " * marks + "\nWhat?", [PHOTO] * images), match=reason)


def test_completions_refuse_a_mark(answering: openai.OpenAI, model: str) -> None:
    """This endpoint has no field for images."""
    with pytest.raises(openai.BadRequestError, match="the prompt has 1 <image> mark but 0 images were given"):
        answering.completions.create(model=model, prompt=SQUARE.prompt, max_tokens=8)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"keep_ratio": 0}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 1.5"),
        ({"keep_ratio": "x"}, r"redvtp_keep_ratio must be a number in \(0, 1\], got 'x'"),
        ({"keep_ratio": None}, r"redvtp_keep_ratio"),
        ({"gen_length": 0}, r"redvtp_gen_length must be an integer in \[1, 65536\], got 0"),
        ({"gen_length": 10**6}, r"redvtp_gen_length must be an integer in \[1, 65536\], got 1000000"),
        ({"block_length": 65}, r"redvtp_block_length must be an integer in \[1, 64\], got 65"),
        (
            {"pruning": "redvpt"},
            r"redvtp_pruning must be one of redvtp, .*, none, got 'redvpt'; did you mean 'redvtp'\?",
        ),
        ({"threshold": 0}, r"redvtp_threshold must be a number in \(0, 1000\], got 0"),
        ({"min_confidence": 1.5}, r"redvtp_min_confidence must be a number in \[0, 1\], got 1.5"),
        ({"threshold": 1, "min_confidence": 0.9}, "redvtp_threshold and redvtp_min_confidence exclude each other"),
        ({"threshold": 1, "remasking": "entropy"}, "redvtp_threshold needs redvtp_remasking low_confidence or margin"),
        ({"keepratio": 0.5}, r"unknown knob 'redvtp_keepratio'; did you mean redvtp_keep_ratio\?"),
        ({"keep-ratio": 0.5}, r"unknown knob 'redvtp_keep-ratio'; did you mean redvtp_keep_ratio\?"),
        ({"suffix": "long " * 40_000}, "redvtp_suffix must have at most 65,536 characters, got 200,000"),
    ],
    ids=str,
)
def test_bad_knob_is_refused(answering: openai.OpenAI, model: str, knobs: dict[str, Any], reason: str) -> None:
    xargs = {f"redvtp_{name}": value for name, value in knobs.items()}
    # max_tokens left out: it would contradict gen_length.
    options = {"max_tokens": openai.omit, "extra_body": {"vllm_xargs": xargs}}
    _refused(answering, model, message("What?", [PHOTO]), match=reason, **options)


@pytest.mark.parametrize("name", ["keep_ratio", "Redvtp_keep_ratio", "keep-ratio", "block_length"])
def test_knob_without_its_prefix_is_refused(answering: openai.OpenAI, model: str, name: str) -> None:
    """Not a knob and not an error for vLLM: it would be without effect, silently."""
    reason = f"unknown knob '{name}'; did you mean redvtp_"
    _refused(answering, model, message("What?"), match=reason, extra_body={"vllm_xargs": {name: 0.5}})


# As JSON: what Python has no value for included. Infinity is what 1e999 becomes.
HOSTILE = {
    "NaN": "NaN",
    "infinity": "1e999",
    "negative": "-1",
    "huge": "1" + "0" * 30,
    "list": "[1]",
    "object": '{"a": 1}',
    "null": "null",
    "text": '"?"',
    "half a surrogate pair": '"\\ud800"',
    "deep": "[" * 50 + "]" * 50,
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_refuses_every_hostile_value_by_name(server: Server, model: str, knob: str) -> None:
    start = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What?"}}], "vllm_xargs": '
    for kind, value in HOSTILE.items():
        if (knob, kind) == ("suffix", "text"):
            continue
        status, said = server.post("/v1/chat/completions", f'{start}{{"redvtp_{knob}": {value}}}}}'.encode())
        assert status == 400, (kind, said)
        # vLLM itself refuses integers that do not fit its messages, before it tells anybody their names.
        assert knob in said or (kind == "huge" and "extra_args integers must be between" in said), (kind, said)


def test_half_a_surrogate_pair_is_refused_anywhere(server: Server, model: str) -> None:
    start = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What?"}}], '
    for part in (
        '"stop": ["\\ud800"]',
        '"vllm_xargs": {"other": "\\ud800"}',
        '"kv_transfer_params": {"a": ["\\ud800"]}',
    ):
        status, said = server.post("/v1/chat/completions", f"{start}{part}}}".encode())
        assert status == 400, (part, said)
        assert "must be valid Unicode" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": LONGEST + 1}, "max_tokens"),
        ({"logprobs": True}, "logprobs .* is not supported by diffusion decoding"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs .* is not supported by diffusion decoding"),
        ({"response_format": {"type": "json_object"}}, "response_format .* not supported"),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "response_format .* is not supported"),
        ({"extra_body": {"use_beam_search": True}}, "beam search, which needs them.* is not supported"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs .* is not supported"),
        ({"extra_body": {"echo": True}}, "echo in a chat, which asks for them.* is not supported"),
        ({"logit_bias": {"5": 10}}, "logit_bias is not supported"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens is not supported"),
        ({"extra_body": {"allowed_token_ids": [5]}}, "allowed_token_ids is not supported"),
        ({"extra_body": {"bad_words": ["no"]}}, "bad_words is not supported"),
        ({"presence_penalty": 1}, "presence_penalty is not supported"),
        ({"frequency_penalty": 1}, "frequency_penalty is not supported"),
        ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty is not supported"),
        ({"temperature": 1, "extra_body": {"top_k": 5}}, "top_k with a temperature is not supported"),
        ({"temperature": 1, "extra_body": {"min_p": 0.1}}, "min_p with a temperature is not supported"),
        ({"n": 2}, "n must be 1 when using greedy sampling"),
        ({"temperature": 1, "top_p": 0.5}, "top_p below 1 with a temperature is not supported by diffusion decoding"),
    ],
    ids=str,
)
def test_bad_option_is_refused(answering: openai.OpenAI, model: str, options: dict[str, Any], reason: str) -> None:
    _refused(answering, model, message("What?", [PHOTO]), match=reason, **options)


def test_prompt_and_canvas_must_fit_the_model(answering: openai.OpenAI, model: str) -> None:
    prompt = SQUARE.meta["prompt_len"]
    room = LONGEST - prompt
    reason = (
        rf"prompt \({prompt} tokens, 88 of them visual\) plus max_tokens {room + 1} exceeds max_model_len {LONGEST}"
    )
    _refused(answering, model, message(SQUARE.question, [PHOTO]), match=reason, max_tokens=room + 1)
    _refused(answering, model, message("long " * LONGEST), match=f"maximum context length is {LONGEST}")
