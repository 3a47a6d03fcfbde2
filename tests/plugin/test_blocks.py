"""KV blocks: taken once at admission, given back by the prune within a request, all back after every ending."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from golden_data import Case
from plugin.requests import free_blocks, prompt_of, report_of, scheduler_of, step_of, usable_blocks

SQUARE = Case("tiny-llada-v", "square")
LARGE = Case("tiny-llada-v", "large")
BLOCK = 32
GEN = 32


def _sampling(**knobs: object) -> SamplingParams:
    return SamplingParams(
        max_tokens=GEN, temperature=0.0, ignore_eos=True, extra_args={f"redvtp_{name}": knobs[name] for name in knobs}
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _add(llm: LLM, name: str, case: Case = SQUARE, **knobs: object) -> str:
    """Queue a request without running it; returns the id the engine knows it by."""
    llm.llm_engine.add_request(name, prompt_of(case), _sampling(**knobs))
    return next(str(rid) for rid in scheduler_of(llm).requests if rid.startswith(name))


def _finish_all(llm: LLM) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in step_of(llm):
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    return tokens


@pytest.mark.parametrize("case", [SQUARE, LARGE], ids=str)
@pytest.mark.parametrize("keep_ratio", [1.0, 0.5, 0.25])
def test_prune_frees_the_blocks_of_the_dropped_tokens_while_the_request_runs(
    llm: LLM, case: Case, keep_ratio: float
) -> None:
    visual, prompt = case.meta["num_visual_tokens_total"], case.meta["prompt_len"]
    before = prompt + GEN
    after = before - visual + max(1, int(visual * keep_ratio))
    request_id = _add(llm, f"prune-{keep_ratio}", case, keep_ratio=keep_ratio)
    llm.llm_engine.step()
    assert scheduler_of(llm).requests[request_id].num_output_tokens < GEN, "the request is still running"
    assert usable_blocks(llm) - free_blocks(llm) == _blocks(after)
    _finish_all(llm)


def test_summary_tells_the_freed_blocks(llm: LLM) -> None:
    visual, prompt = LARGE.meta["num_visual_tokens_total"], LARGE.meta["prompt_len"]
    (output,) = llm.generate([prompt_of(LARGE)], _sampling(keep_ratio=0.25, steps=8), use_tqdm=False)
    kept = int(visual * 0.25)
    before, after = _blocks(prompt + GEN), _blocks(prompt + GEN - visual + kept)
    assert output.kv_transfer_params == {
        "redvtp": {
            "steps": 8,
            "prompt_tokens": prompt,
            "visual_tokens": visual,
            "visual_tokens_kept": kept,
            "images": [
                {
                    "visual_tokens": visual,
                    "visual_tokens_kept": kept,
                    "kept_share": pytest.approx(kept / visual, abs=1e-4),
                }
            ],
            "kv_blocks_admitted": before,
            "blocks_freed": before - after,
        }
    }


def test_full_report_has_every_step(llm: LLM) -> None:
    (output,) = llm.generate([prompt_of(SQUARE)], _sampling(steps=4, report="full"), use_tqdm=False)
    told = report_of(output)
    assert [step["step"] for step in told["trace"]] == [0, 1, 2, 3]
    assert told["trace"][-1]["canvas"] == list(output.outputs[0].token_ids)
    (pruning,) = told["prunings"]
    assert len(pruning["kept"]) == told["visual_tokens_kept"]
    assert told["kept"] == pruning["kept"]
    assert len(pruning["importance"]) == told["visual_tokens"]


def test_no_report_when_none_is_wanted(llm: LLM) -> None:
    (output,) = llm.generate([prompt_of(SQUARE)], _sampling(report="none"), use_tqdm=False)
    assert output.kv_transfer_params is None


def test_abort_returns_all_blocks(llm: LLM) -> None:
    request_id = _add(llm, "aborted")
    llm.llm_engine.step()
    assert free_blocks(llm) < usable_blocks(llm)
    llm.llm_engine.abort_request([request_id], internal=True)
    llm.llm_engine.step()
    assert free_blocks(llm) == usable_blocks(llm)


def test_longest_request_fits_the_smallest_pool(llm_factory: Callable[..., LLM]) -> None:
    """vLLM starts with no fewer blocks than max_model_len needs, so what fits the model fits the cache."""
    need = SQUARE.meta["prompt_len"] + GEN
    llm = llm_factory("tiny-llada-v", num_gpu_blocks_override=_blocks(need) + 1, max_model_len=need)
    (output,) = llm.generate([prompt_of(SQUARE)], _sampling(), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == GEN
    with pytest.raises(VLLMValidationError, match="exceeds max_model_len"):
        llm.generate([prompt_of(SQUARE)], SamplingParams(max_tokens=GEN + 1), use_tqdm=False)
    assert free_blocks(llm) == usable_blocks(llm)


def test_more_requests_than_the_pool_holds_all_get_their_own_answer(llm_factory: Callable[..., LLM]) -> None:
    one = _blocks(SQUARE.meta["prompt_len"] + GEN)
    llm = llm_factory("tiny-llada-v", num_gpu_blocks_override=2 * one + 1, max_model_len=256)
    (alone,) = llm.generate([prompt_of(SQUARE)], _sampling(), use_tqdm=False)
    outputs = llm.generate([prompt_of(SQUARE)] * 7, _sampling(), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [alone.outputs[0].token_ids] * 7
    assert free_blocks(llm) == usable_blocks(llm)


def test_blocks_of_a_prune_admit_the_next_request(llm_factory: Callable[..., LLM]) -> None:
    """Two unpruned requests do not fit together: the second starts one step after the first has pruned."""
    visual = SQUARE.meta["num_visual_tokens_total"]
    before = SQUARE.meta["prompt_len"] + GEN
    pruned = _blocks(before - visual + int(visual * 0.25))
    llm = llm_factory("tiny-llada-v", num_gpu_blocks_override=_blocks(before) + pruned + 1, max_model_len=256)
    for name in ("first", "second"):
        _add(llm, name, keep_ratio=0.25)
    llm.llm_engine.step()
    assert len(scheduler_of(llm).running) == 1
    llm.llm_engine.step()
    assert len(scheduler_of(llm).running) == 2
    first, second = _finish_all(llm).values()
    assert first == second
    assert free_blocks(llm) == usable_blocks(llm)
