"""Over HTTP, from a PNG and a question to the reference's tokens and the numbers of its pruning."""

from __future__ import annotations

import openai
import pytest
from image_bytes import png

from golden_data import Run
from plugin.requests import answer_of
from redvtp.prompt import load_tokenizer
from serving.chat import Answer, ask, golden_run, message, message_of, options_of

pytestmark = pytest.mark.serving

BLOCK = 32
# Images of many shapes, presets, caches, stops, steps by confidence; tests/plugin/test_golden.py runs all there are.
RUNS = [
    golden_run("square", "plain_g32_b32_s16"),
    golden_run("tall", "plain_g64_b16_s20"),
    golden_run("text_only", "plain_g32_b32_s16"),
    golden_run("wide", "stop_g32_b32_s16"),
    golden_run("large", "suffix_g16_b16_s8"),
    golden_run("square", "redvtp_k25_g32_b32_s16"),
    golden_run("large", "redvtp_k50_g64_b32_s32"),
    golden_run("wide", "redvtp_k75_g16_b16_s16"),
    golden_run("tall", "redvtp_k50_stop_g64_b32_s32"),
    golden_run("wide", "fast_g32_b32_s16_pri32"),
    golden_run("square", "fast_g64_b32_s32_pri4"),
    golden_run("large", "fast_g64_b32_t09_pri4"),
    golden_run("tall", "fast_stop_g64_b32_t1_pri32"),
]
PRUNED = [run for run in RUNS if run.keep_ratio is not None and "stopping_criteria" not in run.params]

_ANSWERS: dict[str, Answer] = {}


def _answer(run: Run, client: openai.OpenAI, model: str) -> Answer:
    if str(run) not in _ANSWERS:
        _ANSWERS[str(run)] = ask(client, model, message_of(run.case), **options_of(run))
    return _ANSWERS[str(run)]


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_chat_gives_the_references_tokens(client: openai.OpenAI, model: str, run: Run) -> None:
    answer = _answer(run, client, model)
    assert answer_of(run, answer.token_ids, load_tokenizer(run.case.model_dir)) == run.output


@pytest.mark.parametrize("run", PRUNED, ids=str)
def test_report_tells_what_the_pruning_dropped_and_freed(client: openai.OpenAI, model: str, run: Run) -> None:
    visual, prune = run.case.meta["num_visual_tokens_total"], run.data["prune"]
    gen, prompt = run.params["gen_length"], run.case.meta["prompt_len"]
    admitted = _blocks(prompt + gen)
    assert _answer(run, client, model).report == {
        "steps": run.params["steps"],
        "prompt_tokens": prompt,
        "visual_tokens": visual,
        "visual_tokens_kept": visual - prune["pruned"],
        "images": [
            {
                "visual_tokens": visual,
                "visual_tokens_kept": prune["keep_n"],
                "kept_share": pytest.approx(prune["keep_n"] / visual, abs=1e-4),
            }
        ],
        "kv_blocks_admitted": admitted,
        "blocks_freed": admitted - _blocks(prune["seq_len_after"]),
    }


def test_a_pruning_of_the_sample_frees_blocks() -> None:
    """Otherwise the test above would be satisfied by a server that frees none."""
    assert any(
        _blocks(run.data["prune"]["seq_len_after"]) < _blocks(run.case.meta["prompt_len"] + run.params["gen_length"])
        for run in PRUNED
    )


def test_completions_take_the_templated_text(client: openai.OpenAI, model: str) -> None:
    run = golden_run("text_only", "plain_g32_b32_s16")
    options = options_of(run)
    options["extra_body"] |= {"return_token_ids": True}
    response = client.completions.create(model=model, prompt=run.case.prompt, **options)
    assert (response.choices[0].model_extra or {})["token_ids"] == run.output


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_picture_of_any_mode_is_read_as_the_engine_reads_it(client: openai.OpenAI, model: str, mode: str) -> None:
    """By `convert("RGB")`, which drops alpha; vLLM by itself would lay the picture on white."""
    run = golden_run("square", "redvtp_k25_g32_b32_s16")
    (picture,) = run.case.images()
    drawn = picture.convert("L" if mode == "I;16" else mode).convert(mode)
    if "A" in mode:
        drawn.putalpha(100)
    messages = (message(run.case.question, [png(image)]) for image in (drawn, drawn.convert("RGB")))
    as_drawn, as_rgb = (ask(client, model, each, **options_of(run)).token_ids for each in messages)
    assert as_drawn == as_rgb
    if mode == "RGBA":
        assert as_drawn == run.output
