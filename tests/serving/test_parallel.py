"""Two engines behind one front-end, and one engine over two ranks: the tokens of one of each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from devices import needs_two_ranks
from golden_data import Run, checkpoint_dir
from serving.chat import CHECKPOINT, Answer, ask, golden_run, in_the_middle, message_of, options_of
from serving.server import Server, running_server

pytestmark = [pytest.mark.serving, pytest.mark.slow, needs_two_ranks]

RUNS = (
    golden_run("square", "redvtp_k25_g32_b32_s32"),
    golden_run("tall", "redvtp_k50_g64_b32_s32"),
    golden_run("large", "plain_g32_b32_s32"),
    golden_run("wide", "fast_g64_b32_s32_pri4"),
    golden_run("text_only", "plain_g64_b32_s32"),
)


def _server(log: Path, *flags: str) -> Iterator[Server]:
    with running_server(log, checkpoint_dir(CHECKPOINT), "--plugin", "redvtp", "--dtype", "float32", *flags) as server:
        yield server


@pytest.fixture
def two_engines(tmp_path: Path) -> Iterator[Server]:
    yield from _server(tmp_path / "server.log", "--data-parallel-size", "2")


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[Server]:
    yield from _server(tmp_path / "server.log", "--tensor-parallel-size", "2")


def _ask_all(server: Server, runs: tuple[Run, ...]) -> list[Answer]:
    """All at once, so that engines share them out and ranks step them in batches."""
    model = server.model()

    def answer(run: Run) -> Answer:
        with _patient(server) as client:
            return ask(client, model, message_of(run.case), **options_of(run))

    with ThreadPoolExecutor(len(runs)) as threads:
        return list(threads.map(answer, runs))


def _tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def _patient(server: Server) -> openai.OpenAI:
    # Two engines on the cores of one; a rank that waits for the other spins meanwhile.
    return server.client().with_options(timeout=600)


def test_two_engines_give_the_references_tokens_and_share_the_requests(two_engines: Server) -> None:
    # A request that stays: the engine that has it is never again the idle one of the two.
    with _patient(two_engines) as client, in_the_middle(client, two_engines.model(), message_of(RUNS[0].case)):
        answers = _ask_all(two_engines, RUNS * 2)
    assert _tokens(answers) == [run.output for run in RUNS] * 2
    two_engines.wait_until_idle()
    seen = "vllm:redvtp_visual_tokens_seen_total"
    by_engine = [two_engines.metric(seen, f'engine="{engine}"') for engine in (0, 1)]
    assert all(by_engine), "each engine has had some"
    # Every request is counted by the engine that had it, and by no other.
    stayed = RUNS[0].case.meta["num_visual_tokens_total"]
    assert sum(by_engine) == stayed + sum(answer.report["visual_tokens"] for answer in answers if answer.report)


def test_two_ranks_give_the_references_tokens_over_http(two_ranks: Server) -> None:
    assert _tokens(_ask_all(two_ranks, RUNS)) == [run.output for run in RUNS]
    two_ranks.wait_until_idle()
    assert two_ranks.metric("vllm:kv_cache_usage_perc") == 0
