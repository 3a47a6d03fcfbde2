"""Requests of all kinds at the same time: each gets what it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from benchmarks.image_bytes import png
from serving.chat import Answer, ask, ask_streaming, golden_run, message, message_of, options_of

pytestmark = pytest.mark.serving

PLAIN = golden_run("large", "plain_g32_b32_s32")
PRUNED = golden_run("square", "redvtp_k25_g32_b32_s32")
LONG = golden_run("tall", "redvtp_k50_g64_b32_s32")
CACHED = golden_run("wide", "fast_g64_b32_s32_pri4")
TEXT = golden_run("text_only", "plain_g64_b32_s32")


def test_eight_mixed_requests_each_get_what_they_get_alone(client: openai.OpenAI, model: str) -> None:
    two_images = message("What changed?", [png(image) for run in (PRUNED, CACHED) for image in run.case.images()])
    drawn = {"max_tokens": 48, "temperature": 1.0, "seed": 5, "extra_body": {"ignore_eos": True}}
    random = {
        "max_tokens": 40,
        "temperature": 0.7,
        "seed": 6,
        "extra_body": {"vllm_xargs": {"redvtp_remasking": "random", "redvtp_positions": "original"}},
    }
    requests: list[tuple[Callable[..., Answer], Any, dict[str, Any]]] = [
        (ask, message_of(PLAIN.case), options_of(PLAIN)),
        (ask, message_of(PRUNED.case), options_of(PRUNED)),
        (ask_streaming, message_of(LONG.case), options_of(LONG)),
        (ask, message_of(CACHED.case), options_of(CACHED)),
        (ask_streaming, message_of(TEXT.case), options_of(TEXT)),
        (ask, two_images, drawn),
        (ask, message_of(TEXT.case), random),
        (ask, message_of(PLAIN.case), {"max_tokens": 24, "temperature": 0}),
    ]
    alone = [way(client, model, content, **options).token_ids for way, content, options in requests]
    for index, run in enumerate((PLAIN, PRUNED, LONG, CACHED, TEXT)):
        assert alone[index] == run.output, run
    start = threading.Barrier(len(requests))

    def send(request: tuple[Callable[..., Answer], Any, dict[str, Any]]) -> list[int]:
        way, content, options = request
        start.wait(30)
        return way(client, model, content, **options).token_ids

    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(send, requests))
    assert together == alone
