"""Requests of all kinds at the same time: each gets what it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from image_bytes import png

from serving.chat import Answer, ask, ask_streaming, golden_run, message, message_of, options_of
from serving.server import REQUEST_SECONDS

pytestmark = pytest.mark.serving

PLAIN = golden_run("large", "plain_g32_b32_s32")
PRUNED = golden_run("square", "redvtp_k25_g32_b32_s32")
LONG = golden_run("tall", "redvtp_k50_g64_b32_s32")
CACHED = golden_run("wide", "fast_g64_b32_s32_pri4")
TEXT = golden_run("text_only", "plain_g64_b32_s32")


def test_every_pruning_policy_in_one_batch(client: openai.OpenAI, model: str) -> None:
    case = PRUNED.case
    visual = case.meta["num_visual_tokens_total"]
    policies: list[dict[str, Any]] = [
        {"pruning": "redvtp", "score_rows": "response", "score_layers": "1:3"},
        {"pruning": "late", "cache": "prefix"},
        {"pruning": "progressive", "prune_scope": "image"},
        {"pruning": "zipvl", "attention_mass": 0.5, "max_keep_ratio": 0.6},
        {"pruning": "llada-fastv"},
        {"pruning": "fastv", "cache": "prefix"},
        {"pruning": "layer-skip"},
        {"pruning": "attention-free", "cache": "prefix_lm"},
        {"pruning": "external", "importance": [index % 7 + 0.5 for index in range(visual)]},
        {"pruning": "random", "prune_step": 3},
        {"pruning": "uniform", "prune_steps": 2},
        {"pruning": "none"},
    ]

    def send(knobs: dict[str, Any]) -> tuple[list[int], Any]:
        asked = {f"redvtp_{name}": value for name, value in {"keep_ratio": 0.3, "report": "full", **knobs}.items()}
        body = {"ignore_eos": True, "vllm_xargs": asked}
        answer = ask(client, model, message_of(case), max_tokens=24, temperature=0, seed=4, extra_body=body)
        assert answer.report is not None
        return answer.token_ids, [(pruning["step"], pruning["kept"]) for pruning in answer.report["prunings"]]

    alone = [send(knobs) for knobs in policies]
    with ThreadPoolExecutor(len(policies)) as threads:
        assert list(threads.map(send, policies)) == alone
    steps = {
        knobs["pruning"]: [step for step, _ in prunings] for knobs, (_, prunings) in zip(policies, alone, strict=True)
    }
    assert steps == {
        "redvtp": [0], "late": [5], "progressive": [0, 1, 2, 3], "zipvl": [0], "attention-free": [-1],
        "llada-fastv": [0], "fastv": [0], "layer-skip": [], "external": [-1], "random": [3],
        "uniform": [0, 1], "none": [],
    }  # fmt: skip
    for knobs, (_, prunings) in zip(policies, alone, strict=True):
        if knobs["pruning"] not in ("zipvl", "layer-skip", "none"):
            assert len(prunings[-1][1]) == int(0.3 * visual), knobs


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
        start.wait(REQUEST_SECONDS)
        return way(client, model, content, **options).token_ids

    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(send, requests))
    assert together == alone
