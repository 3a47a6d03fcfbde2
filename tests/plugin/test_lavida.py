"""What only LaViDa has, through vLLM: chat formats, drafts, blocks back from a prompt that stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import golden_data
from golden_data import Run
from plugin.requests import free_blocks, prompt_of, report_of, sampling_of, usable_blocks
from redvtp.canvas.draft import draft_tokens
from redvtp.kv.blocks import blocks_needed

pytestmark = pytest.mark.slow

LlmFactory = Callable[..., LLM]
CHECKPOINTS = ("tiny-lavida", "tiny-lavida-dream")
# In both cache modes, pruned and not, with one image of another shape each.
RUNS = [
    run
    for run in golden_data.runs(checkpoints=CHECKPOINTS)
    if f"{run.case.checkpoint}/{run.case.name}/{run.name}"
    in {
        "tiny-lavida/square/prefix_shift_r100_lowconf_g32b32",
        "tiny-lavida/wide/full_None_r50_margin_g32b32",
        "tiny-lavida/wide/redvtp_k25_g32_s16",
        "tiny-lavida-dream/square/prefix_margin_s16",
        "tiny-lavida-dream/wide/full_maskgit_s16",
    }
]


def _message(case: golden_data.Case) -> Any:
    (image,) = case.images()
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": case.question}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_chat_message_becomes_the_references_prompt(run: Run, llm_factory: LlmFactory) -> None:
    """The template has the system message the model was trained with, in the format of its language model."""
    llm = llm_factory(run.case.checkpoint)
    (output,) = llm.chat([_message(run.case)], sampling_of(run))
    assert list(output.outputs[0].token_ids) == run.output


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_pruned_blocks_of_a_prompt_encoded_once_come_back(checkpoint: str, llm_factory: LlmFactory) -> None:
    llm = llm_factory(checkpoint, block_size=16)
    case = golden_data.Case(checkpoint, "square")
    knobs = {"cache": "prefix_lm", "keep_ratio": 0.25, "steps": 8, "report": "full"}
    sampling = SamplingParams(
        max_tokens=16, ignore_eos=True, extra_args={f"redvtp_{name}": value for name, value in knobs.items()}
    )
    (output,) = llm.generate([prompt_of(case)], sampling)
    report = report_of(output)
    prompt, visual = report["prompt_tokens"], report["visual_tokens"]
    kept = max(1, int(visual * 0.25))
    assert report["visual_tokens_kept"] == kept
    freed = blocks_needed(prompt + 16, 16) - blocks_needed(prompt - visual + kept + 16, 16)
    assert report["blocks_freed"] == freed > 0
    assert [step["tokens_computed"] for step in report["trace"]] == [prompt + 16, *[16] * (len(report["trace"]) - 1)]
    assert free_blocks(llm) == usable_blocks(llm)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("max_tokens", [None, 40])
def test_only_the_marks_of_a_draft_are_filled(checkpoint: str, max_tokens: int | None, llm_factory: LlmFactory) -> None:
    llm = llm_factory(checkpoint)
    draft = "There is a <mask><mask> on the<mask> side<|endoftext|>, and <mask>."
    sampling = SamplingParams(max_tokens=max_tokens, extra_args={"redvtp_draft": draft, "redvtp_report": "full"})
    (output,) = llm.generate([prompt_of(golden_data.Case(checkpoint, "wide"))], sampling)
    mask_id = 584
    laid_out = draft_tokens(cast(Any, llm.get_tokenizer()), draft, mask_id)
    (answer,) = output.outputs
    assert len(answer.token_ids) == len(laid_out)
    assert answer.finish_reason == "length"
    canvases = [step["canvas"] for step in report_of(output)["trace"]]
    assert canvases[-1] == list(answer.token_ids)
    for canvas in canvases:
        assert all(ours == fixed for ours, fixed in zip(canvas, laid_out, strict=True) if fixed != mask_id)


def test_a_draft_over_the_limit_the_client_named_is_refused(llm_factory: LlmFactory) -> None:
    llm = llm_factory("tiny-lavida")
    sampling = SamplingParams(max_tokens=3, extra_args={"redvtp_draft": "<mask>" * 4})
    with pytest.raises(VLLMValidationError, match="redvtp_draft has 4 tokens, more than max_tokens 3; raise"):
        llm.generate([prompt_of(golden_data.Case("tiny-lavida", "wide"))], sampling)
