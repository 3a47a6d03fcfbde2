"""LaViDa over HTTP: chat with an image, streams, eight at once, its knobs, pruning in both cache modes, infilling."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import golden_data
from golden_data import Case, Run
from redvtp.kv.blocks import blocks_needed
from serving.chat import ask, ask_in_pieces, ask_streaming, message_of, options_of
from serving.server import Server, running_server

pytestmark = pytest.mark.serving

CHECKPOINT = "tiny-lavida"
BLOCK = 16
NAMES = {
    "square/prefix_None_r50_lowconf_g32b32",
    "square/prefix_shift033_r50_lowconf_g64b64",
    "wide/prefix_cosine_r50_lowconf_g32b32",
    "wide/full_None_r50_entrophy_g32b32",
    "wide/full_None_spb8_lowconf_g32b16",
    "square/redvtp_k25_g32_s16",
    "wide/redvtp_k75_g32_s16",
    "text_only/prefix_None_r50_lowconf_g32b32",
}
RUNS = [
    run for run in golden_data.runs(checkpoints=(CHECKPOINT,)) if run.robust and f"{run.case.name}/{run.name}" in NAMES
]


@pytest.fixture(scope="module")
def lavida(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("lavida-server") / "server.log"
    arguments = ("--plugin", "redvtp", "--dtype", "float32", "--block-size", str(BLOCK))
    with running_server(log, golden_data.checkpoint_dir(CHECKPOINT), *arguments) as server:
        yield server
        server.wait_until_idle()
        assert server.metric("vllm:kv_cache_usage_perc") == 0


@pytest.fixture
def client(lavida: Server) -> Iterator[openai.OpenAI]:
    with lavida.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(lavida: Server) -> str:
    return lavida.model()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_chat_gives_the_references_tokens_whole_and_streamed(client: openai.OpenAI, model: str, run: Run) -> None:
    whole = ask(client, model, message_of(run.case), **options_of(run))
    assert whole.token_ids == run.output
    streamed = ask_in_pieces(client, model, message_of(run.case), least=2, **options_of(run))
    assert (streamed.token_ids, streamed.text) == (whole.token_ids, whole.text)


def test_eight_at_once_answer_as_if_alone(client: openai.OpenAI, model: str) -> None:
    assert len(RUNS) == len(NAMES) == 8
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda run: ask(client, model, message_of(run.case), **options_of(run)), RUNS)
        assert [answer.token_ids for answer in answers] == [run.output for run in RUNS]


def _options(max_tokens: int | None, **knobs: Any) -> dict[str, Any]:
    xargs = {f"redvtp_{name}": value for name, value in knobs.items()}
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {**limit, "temperature": 0, "extra_body": {"ignore_eos": True, "vllm_xargs": xargs}}


@pytest.mark.parametrize("cache", ["none", "prefix_lm"])
def test_pruning_gives_blocks_back_in_both_cache_modes(client: openai.OpenAI, model: str, cache: str) -> None:
    case = Case(CHECKPOINT, "square")
    answer = ask(client, model, message_of(case), **_options(16, cache=cache, keep_ratio=0.25, steps=8))
    assert answer.report is not None
    prompt, visual = case.meta["prompt_len"], case.meta["num_visual_tokens_total"]
    kept = int(visual * 0.25)
    admitted = blocks_needed(prompt + 16, BLOCK)
    freed = admitted - blocks_needed(prompt - visual + kept + 16, BLOCK)
    assert freed > 0
    assert answer.report["visual_tokens_kept"] == kept
    assert (answer.report["kv_blocks_admitted"], answer.report["blocks_freed"]) == (admitted, freed)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"schedule": "steep"}, "redvtp_schedule must be one of even, linear, shift"),
        ({"schedule_shift": 0}, r"redvtp_schedule_shift must be a number in \[0.001, 1000\], got 0"),
        ({"remasking": "best"}, "redvtp_remasking must be one of low_confidence, entropy"),
        ({"draft": "all said"}, "redvtp_draft must be text with at least one <mask>"),
        ({"draft": "<mask>" * 9}, "redvtp_draft has 9 tokens, more than max_tokens 8; raise max_tokens"),
    ],
)
def test_knobs_out_of_range_are_refused(client: openai.OpenAI, model: str, knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(client, model, message_of(Case(CHECKPOINT, "wide")), **_options(8, **knobs))


@pytest.mark.parametrize("cache", ["none", "prefix_lm"])
def test_a_draft_is_filled_in_and_otherwise_returned_as_it_was(client: openai.OpenAI, model: str, cache: str) -> None:
    draft = "There are <mask><mask> squares on the<mask> side."
    options = _options(None, draft=draft, cache=cache)
    whole = ask(client, model, message_of(Case(CHECKPOINT, "wide")), **options)
    start, middle, end = "There are ", " squares on the", " side."
    assert whole.text.startswith(start)
    assert whole.text.endswith(end)
    assert middle in whole.text
    streamed = ask_streaming(client, model, message_of(Case(CHECKPOINT, "wide")), **options)
    assert (streamed.token_ids, streamed.text) == (whole.token_ids, whole.text)
