"""Every pruning policy through vLLM, as the engine answers by itself, and all of them in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from golden_data import Case
from plugin.requests import free_blocks, prompt_of, report_of, runner_of, scheduler_of, step_of, usable_blocks
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams

EngineFactory = Callable[..., LocalEngine]
SQUARE = Case("tiny-llada-v", "square")
VISUAL = 88
IMPORTANCE = [(37 * index) % VISUAL for index in range(VISUAL)]
# Knobs of one request each.
ASKED: list[dict[str, Any]] = [
    {"pruning": "redvtp"},
    {"pruning": "redvtp", "score_rows": "prompt", "score_layers": "1:3"},
    {"pruning": "late", "cache": "dual"},
    {"pruning": "progressive", "cache": "prefix_lm"},
    {"pruning": "zipvl", "attention_mass": 0.5, "min_keep_ratio": 0.1},
    {"pruning": "attention-free", "cache": "prefix"},
    {"pruning": "external", "importance": IMPORTANCE},
    {"pruning": "redvtp", "cache": "dual"},
    {"pruning": "random", "prune_step": 2, "prune_steps": 2},
    {"pruning": "uniform", "prune_scope": "image"},
    {"pruning": "none"},
    {"pruning": "llada-fastv"},
    {"pruning": "fastv", "cache": "prefix", "prune_steps": 2},
    {"pruning": "llada-fastv", "cache": "prefix_lm", "prune_layer": 0, "positions": "original"},
    {"pruning": "llada-fastv", "cache": "prefix", "prune_step": 5, "prune_layer": 2},
    {"pruning": "layer-skip", "cache": "prefix"},
    {"pruning": "layer-skip", "cache": "prefix_lm", "prune_layer": 0},
]


def _sampling(**knobs: Any) -> SamplingParams:
    knobs = {"keep_ratio": 0.3, "steps": 12, "block_length": 8, "report": "full", **knobs}
    return SamplingParams(
        max_tokens=24,
        temperature=0.0,
        seed=5,
        ignore_eos=True,
        extra_args={f"redvtp_{name}": value for name, value in knobs.items()},
    )


def _request(knobs: dict[str, Any]) -> Request:
    denoising = DenoisingParams(
        gen_length=24, steps=12, block_length=8, seed=5, ignore_eos=True, cache=knobs.get("cache", "none")
    )
    given = {name: value for name, value in knobs.items() if name not in ("pruning", "cache")}
    given["importance"] = tuple(given.get("importance", ()))
    pruning = PruningParams(preset=knobs["pruning"], **{"keep_ratio": 0.3, **given})
    return Request(SQUARE.prompt, tuple(SQUARE.images()), denoising, pruning)


def _run(llm: LLM, preempted_before: frozenset[int] = frozenset()) -> list[Any]:
    for number, knobs in enumerate(ASKED):
        llm.llm_engine.add_request(str(number), prompt_of(SQUARE), _sampling(**knobs))
    finished: dict[str, Any] = {}
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step in preempted_before:
            assert llm.reset_prefix_cache(reset_running_requests=True)
            cache = runner_of(llm)._engine.context.pages
            for pages in (*cache.keys, *cache.values):
                pages.fill_(float("nan"))
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
    return [finished[str(number)] for number in range(len(ASKED))]


@pytest.mark.parametrize("preempted_before", [frozenset(), frozenset({2, 5, 9})], ids=["undisturbed", "preempted"])
def test_all_policies_in_one_batch_answer_as_the_engine_does(
    llm: LLM, engine: EngineFactory, preempted_before: frozenset[int]
) -> None:
    expected = [engine("tiny-llada-v").generate([_request(knobs)])[0] for knobs in ASKED]
    for knobs, ours, theirs in zip(ASKED, _run(llm, preempted_before), expected, strict=True):
        assert list(ours.outputs[0].token_ids) == theirs.output_ids, knobs
        report = ours.kv_transfer_params["redvtp"]
        prunings = [step.pruning for step in theirs.steps if step.pruning is not None]
        assert [(each["step"], each["kept"]) for each in report["prunings"]] == [
            (each.step, each.kept) for each in prunings
        ]
        assert report["visual_tokens_kept"] == (prunings[-1].visual_after if prunings else VISUAL)


@pytest.mark.parametrize("pruning", ["attention-free", "external"])
def test_what_is_dropped_before_the_first_step_takes_no_blocks(llm: LLM, pruning: str) -> None:
    knobs = {"pruning": pruning} | ({"importance": IMPORTANCE} if pruning == "external" else {})
    llm.llm_engine.add_request("early", prompt_of(SQUARE), _sampling(**knobs))
    llm.llm_engine.step()
    held = SQUARE.meta["prompt_len"] - VISUAL + int(VISUAL * 0.3) + 24
    assert usable_blocks(llm) - free_blocks(llm) == -(-held // 32)
    assert -(-held // 32) < -(-(SQUARE.meta["prompt_len"] + 24) // 32)
    while llm.llm_engine.has_unfinished_requests():
        outputs = step_of(llm)
    report = report_of(outputs[0])
    assert report["kv_blocks_admitted"] == -(-held // 32)
    assert report["blocks_freed"] == 0
    assert [each["step"] for each in report["prunings"]] == [-1]
    assert report["visual_tokens_kept"] == int(VISUAL * 0.3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"pruning": "external", "importance": [1.0, 2.0]},
            "one number for each of the 88 visual tokens of the request, got 2",
        ),
        ({"pruning": "external"}, "one number for each of the 88 visual tokens of the request, got 0"),
        ({"pruning": "external", "importance": [float("nan")] * 88}, "redvtp_importance must be finite numbers"),
        ({"pruning": "external", "importance": ["1"] * 88}, "redvtp_importance must be finite numbers"),
        ({"importance": IMPORTANCE}, "redvtp_importance has no meaning with redvtp_pruning redvtp"),
        (
            {"pruning": "attention-free", "attention_mass": 0.5},
            "redvtp_attention_mass has no meaning with redvtp_pruning attention-f",
        ),
        ({"pruning": "attention-free", "prune_step": 1}, "redvtp_prune_step has no meaning with redvtp_pruning att"),
        ({"pruning": "external", "prune_steps": 2}, "redvtp_prune_steps has no meaning with redvtp_pruning external"),
        ({"pruning": "random", "attention_mass": 0.5}, "_attention_mass has no meaning with redvtp_pruning random"),
        ({"pruning": "uniform", "score_rows": "prompt"}, "_score_rows has no meaning with redvtp_pruning uniform"),
        ({"prune_step": 11}, r"redvtp_prune_step must be an integer in \[0, 10\] with 12 denoising steps, got 11"),
        ({"prune_step": 9, "prune_steps": 3}, r"_prune_steps must be an integer in \[1, 2\] from step 9 on .*, got 3"),
        ({"score_layers": "2:9"}, "redvtp_score_layers must be layers N or a range A:B within 0:4, got '2:9'"),
        (
            {"score_rows": "prompt", "cache": "prefix_lm"},
            "prompt needs steps .*, and with redvtp_cache prefix_lm none does",
        ),
        ({"prune_layer": 9}, r"redvtp_prune_layer must be an integer in \[0, 3\] for a model of 4 layers, got 9"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_policy_that_cannot_be_is_refused(llm: LLM, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([prompt_of(SQUARE)], _sampling(**knobs), use_tqdm=False)
    assert not scheduler_of(llm).requests


def test_a_servers_policy_is_its_own_and_bends_to_short_canvases(llm_factory: Callable[..., LLM]) -> None:
    """What it says of its preset does not follow a request to another one."""
    defaults = {"pruning": "zipvl", "attention_mass": 0.9, "prune_step": 6, "prune_steps": 3}
    llm = llm_factory("tiny-llada-v", additional_config={"redvtp": defaults}, max_model_len=1024)

    def prunings(max_tokens: int, **knobs: Any) -> list[int]:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            extra_args={f"redvtp_{name}": value for name, value in {"report": "full", **knobs}.items()},
        )
        (output,) = llm.generate([prompt_of(SQUARE)], sampling, use_tqdm=False)
        return [each["step"] for each in report_of(output)["prunings"]]

    assert prunings(32) == [6, 7, 8]
    assert prunings(8) == [2]
    assert prunings(8, pruning="uniform") == [0]


def test_a_server_does_not_start_with_a_policy_that_fits_no_request() -> None:
    from plugin.conftest import in_process_llm

    with pytest.raises(ValueError, match=r"-config: redvtp\.score_layers must be layers N or a range .* within 0:4"):
        in_process_llm(str(SQUARE.model_dir), additional_config={"redvtp": {"score_layers": "7"}})
