"""/metrics before and after known requests: the counters grow by exactly what the requests' reports say."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from redvtp.kv.blocks import blocks_needed
from serving.chat import LONG, Answer, ask, ask_streaming, golden_run, in_the_middle, message_of, options_of
from serving.server import Server

pytestmark = pytest.mark.serving

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "redvtp.json"
PRUNED = golden_run("square", "redvtp_k25_g32_b32_s32")
HALVED = golden_run("tall", "redvtp_k50_g64_b32_s32")
DENSE = golden_run("large", "plain_g32_b32_s32")
CACHED = golden_run("wide", "fast_g64_b32_s32_pri4")
BY_CONFIDENCE = golden_run("square", "fast_g64_b32_t09_pri4")
TEXT = golden_run("text_only", "plain_g64_b32_s32")
SECONDS = ("step_seconds", "score_seconds", "compaction_seconds")
BLOCK = 32


@contextmanager
def growth(server: Server, *names: str) -> Iterator[dict[str, float]]:
    """How much each of the metrics grows within the block; `name{label}` restricts it to one label."""
    grown: dict[str, float] = {}
    before = {name: _value(server, name) for name in names}
    yield grown
    # A request's last numbers come with the engine step after it, its latencies with its last token.
    server.wait_until_idle()
    deadline = time.monotonic() + 60
    while True:
        now = {name: _value(server, name) - before[name] for name in names}
        if now == grown or time.monotonic() > deadline:
            return
        grown.update(now)
        time.sleep(0.3)


def _value(server: Server, name: str) -> float:
    name, _, label = name.partition("{")
    return server.metric(name, label.rstrip("}"))


def ours(*names: str) -> list[str]:
    return [f"vllm:redvtp_{name}_total" for name in names]


def full_report(client: openai.OpenAI, model: str, run: Any, **knobs: Any) -> tuple[Answer, dict[str, Any]]:
    options = options_of(run)
    options["extra_body"]["vllm_xargs"] |= {"redvtp_report": "full", **knobs}
    answer = ask(client, model, message_of(run.case), **options)
    assert answer.report is not None
    return answer, answer.report


def told(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What /metrics should have grown by after requests with these full reports."""
    steps = [step for report in reports for step in report["trace"]]
    kinds = Counter(step["kind"] for step in steps)
    return {
        "vllm:redvtp_visual_tokens_seen_total": sum(report["visual_tokens"] for report in reports),
        "vllm:redvtp_visual_tokens_kept_total": sum(report["visual_tokens_kept"] for report in reports),
        "vllm:redvtp_prunings_total": sum(len(report["prunings"]) for report in reports),
        "vllm:redvtp_kv_blocks_freed_total": sum(report["blocks_freed"] for report in reports),
        'vllm:redvtp_denoising_steps_total{kind="full"}': kinds["full"],
        'vllm:redvtp_denoising_steps_total{kind="response"}': kinds["response"],
        "vllm:redvtp_tokens_computed_total": sum(step["tokens_computed"] for step in steps),
        "vllm:diffusion_num_denoising_steps_total": len(steps),
        "vllm:diffusion_num_canvas_positions_total": sum(
            len(step["canvas"]) if step["kind"] == "full" else step["tokens_computed"] for step in steps
        ),
        "vllm:diffusion_num_committed_tokens_total": sum(len(step["new_tokens"]) for step in steps),
    }


def test_counters_grow_by_what_the_reports_say(server: Server, client: openai.OpenAI, model: str) -> None:
    runs = (PRUNED, HALVED, DENSE, CACHED, BY_CONFIDENCE, TEXT)
    with growth(server, *told([])) as grown:
        answered = [full_report(client, model, run) for run in runs]
    for run, (answer, _) in zip(runs, answered, strict=True):
        assert answer.token_ids == run.output, run
    expected = told([report for _, report in answered])
    assert grown == expected
    # The reports are right (test_golden.py); these are not zero, or the test would say little.
    assert all(expected.values())
    assert expected["vllm:redvtp_prunings_total"] == 2
    assert expected["vllm:diffusion_num_committed_tokens_total"] == sum(len(answer.token_ids) for answer, _ in answered)


def test_canvas_positions_are_those_that_were_computed(server: Server, client: openai.OpenAI, model: str) -> None:
    knobs = {"cache": "dual", "block_length": 8, "steps": 16, "keep_ratio": 0.25, "suffix": " yes"}
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 32}
    options["extra_body"] = {
        "ignore_eos": True,
        "vllm_xargs": {f"redvtp_{name}": value for name, value in knobs.items()},
    }
    with growth(server, "vllm:diffusion_num_canvas_positions_total") as grown:
        ask(client, model, message_of(PRUNED.case), **options)
    # Four blocks of four steps: all of the canvas in the full step, after the pruning and at the start of each block.
    (positions,) = grown.values()
    assert positions == (32 + 32 + 2 * 8) + 3 * (32 + 3 * 8)


def test_seconds_are_the_workers(server: Server, client: openai.OpenAI, model: str) -> None:
    with growth(server, *ours(*SECONDS)) as grown:
        _, report = full_report(client, model, PRUNED)
    step, score, compaction = (grown[name] for name in ours(*SECONDS))
    # Alone on the server, so every step was this request's.
    assert step == pytest.approx(sum(entry["ms"] for entry in report["trace"]) / 1e3, rel=1e-6)
    assert 0 < score < step
    assert 0 < compaction < step
    assert score + compaction < report["trace"][0]["ms"] / 1e3, "both happen in the first step only"


def test_without_pruning_there_is_nothing_to_score_or_move(server: Server, client: openai.OpenAI, model: str) -> None:
    pruning = ours("prunings", "kv_blocks_freed", "score_seconds", "compaction_seconds")
    with growth(server, *pruning, *ours("visual_tokens_seen", "visual_tokens_kept")) as grown:
        ask(client, model, message_of(DENSE.case), **options_of(DENSE))
        ask(client, model, message_of(TEXT.case), **options_of(TEXT))
    assert [grown[name] for name in pruning] == [0, 0, 0, 0]
    seen, kept = (grown[name] for name in ours("visual_tokens_seen", "visual_tokens_kept"))
    assert seen == kept > 0


def test_a_control_prunes_without_scoring(server: Server, client: openai.OpenAI, model: str) -> None:
    with growth(server, *ours("prunings", "score_seconds", "compaction_seconds")) as grown:
        full_report(client, model, PRUNED, redvtp_pruning="uniform")
    prunings, score, compaction = grown.values()
    assert (prunings, score) == (1, 0)
    assert compaction > 0


def test_a_client_that_leaves_is_counted_once(server: Server, client: openai.OpenAI, model: str) -> None:
    """Its visual tokens too, though it never gets its report."""
    names = ours("visual_tokens_seen", "visual_tokens_kept", "prunings")
    generated = "vllm:generation_tokens_total"
    leaving = in_the_middle(client, model, message_of(PRUNED.case), keep_ratio=0.25)
    with growth(server, *names, generated) as grown, leaving:
        pass
    _, report = full_report(client, model, PRUNED)
    assert [grown[name] for name in names] == [report["visual_tokens"], report["visual_tokens_kept"], 1]
    assert 0 < grown[generated] < LONG, "it did leave in the middle"


def test_a_refused_request_counts_nothing(server: Server, client: openai.OpenAI, model: str) -> None:
    with growth(server, *told([])) as grown, pytest.raises(openai.BadRequestError):
        ask(client, model, message_of(PRUNED.case), max_tokens=8, extra_body={"vllm_xargs": {"redvtp_keep_ratio": 2}})
    assert not any(grown.values())


def test_vllms_own_counters_stay_right(server: Server, client: openai.OpenAI, model: str) -> None:
    latencies = [
        f"vllm:{name}_{part}"
        for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds")
        for part in ("count", "sum")
    ]
    counts = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total"]
    length = 'vllm:request_success_total{finished_reason="length"}'
    with growth(server, *latencies, *counts, length) as grown:
        answers = [
            ask(client, model, message_of(PRUNED.case), **options_of(PRUNED)),
            ask_streaming(client, model, message_of(DENSE.case), **options_of(DENSE)),
        ]
    first_count, first, queue_count, queue, whole_count, whole = (grown[name] for name in latencies)
    assert (first_count, queue_count, whole_count) == (2, 2, 2)
    assert 0 <= queue < first < whole
    prompts, generated = (sum(answer.usage[index] for answer in answers) for index in (0, 1))
    assert [grown[name] for name in counts] == [prompts, generated, 0]
    assert grown[length] == 2


@pytest.mark.parametrize("keep_ratio", [1.0, 0.25])
def test_kv_usage_is_what_is_left_after_pruning(
    keep_ratio: float, server: Server, client: openai.OpenAI, model: str
) -> None:
    """While the request runs, not only after it."""
    prompt, visual = HALVED.case.meta["prompt_len"], HALVED.case.meta["num_visual_tokens_total"]
    admitted = blocks_needed(prompt + LONG, BLOCK)
    held = blocks_needed(prompt - visual + int(visual * keep_ratio) + LONG, BLOCK)
    assert (held < admitted) == (keep_ratio < 1)
    with in_the_middle(client, model, message_of(HALVED.case), keep_ratio=keep_ratio) as pieces:
        for _ in range(3):
            assert server.metric("vllm:num_requests_running") == 1
            assert server.metric("vllm:kv_cache_usage_perc") == pytest.approx(held / _blocks(server))
            next(pieces)


def _blocks(server: Server) -> int:
    """All blocks of the cache but the one that vLLM keeps for itself."""
    found = re.search(r'num_gpu_blocks="(\d+)"', server.metrics())
    assert found is not None
    return int(found.group(1)) - 1


def test_the_dashboard_shows_only_what_is_exported(server: Server) -> None:
    exported = set(re.findall(r"^([a-z0-9_:]+)(?:\{| )", server.metrics(), re.MULTILINE))
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    for panel in panels:
        asked = [name for target in panel["targets"] for name in re.findall(r"vllm:[a-z0-9_]+", target["expr"])]
        assert asked, panel["title"]
        assert set(asked) <= exported, panel["title"]
    everything = DASHBOARD.read_text()
    assert all(name in everything for name in exported if name.startswith("vllm:redvtp_") and name.endswith("_total"))
