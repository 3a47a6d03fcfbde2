"""Infilling: a draft's own tokens stay what they are, and only its marks are filled in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden_data
from redvtp.canvas.canvas import Canvas
from redvtp.canvas.draft import draft_tokens
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt, load_tokenizer

EngineFactory = Callable[..., LocalEngine]
MASK = 584
DRAFTS = [
    "There is a <mask><mask><mask> on the left.",
    "<mask><mask><mask><mask><mask><mask><mask><mask> and<mask><mask>",
    "The picture<|endoftext|> shows <mask>.",
]


def _request(local: LocalEngine, checkpoint: str, denoising: DenoisingParams) -> Request:
    images = tuple(golden_data.Case(checkpoint, "wide").images())
    template = local.config.family.template
    prompt = chat_prompt(local.tokenizer, "What is shown?", len(images), template=template)
    return Request(prompt, images, denoising, PruningParams(keep_ratio=0.5))


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_tokens_between_the_marks_are_those_of_the_text(draft: str) -> None:
    tokenizer = load_tokenizer(golden_data.checkpoint_dir("tiny-lavida"))
    tokens = draft_tokens(tokenizer, draft, MASK)
    assert tokens.count(MASK) == draft.count("<mask>")
    shown = "".join("<mask>" if token == MASK else str(tokenizer.decode([token])) for token in tokens)
    assert shown == draft


@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida", "tiny-lavida-dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
def test_only_the_marks_are_filled_and_nothing_else_ever_changes(
    engine: EngineFactory, checkpoint: str, cache: str
) -> None:
    local = engine(checkpoint)
    requests = [_request(local, checkpoint, DenoisingParams(draft=draft, cache=cache)) for draft in DRAFTS]
    for draft, answer in zip(DRAFTS, local.generate(requests), strict=True):
        laid_out = draft_tokens(local.tokenizer, draft, MASK)
        for step in answer.steps:
            assert len(step.canvas) == len(laid_out)
            assert all(ours == fixed for ours, fixed in zip(step.canvas, laid_out, strict=True) if fixed != MASK)
        # End tokens end nothing, whether they were filled in or stand in the draft.
        assert answer.output_ids == answer.steps[-1].canvas
        assert answer.finish_reason == "length"
        assert len(answer.steps) <= draft.count("<mask>")
        # The model may choose the mask itself; other than that everything is decided.
        streamed = [token for step in answer.steps for token in step.new_tokens]
        assert streamed == answer.output_ids
    assert local.blocks.num_free == local.blocks.num_blocks


def test_a_draft_longer_than_the_canvas_is_refused(engine: EngineFactory) -> None:
    local = engine("tiny-lavida")
    request = _request(local, "tiny-lavida", DenoisingParams(gen_length=4, draft="<mask>" * 5))
    with pytest.raises(ValueError, match="draft has 5 tokens, more than gen_length 4; raise gen_length"):
        local.generate([request])


def test_a_stop_string_still_ends_a_draft(engine: EngineFactory) -> None:
    local = engine("tiny-lavida")
    draft = "one <mask>\ntwo <mask>"
    (answer,) = local.generate([_request(local, "tiny-lavida", DenoisingParams(draft=draft, stop=("\n",)))])
    assert answer.finish_reason == "stop"
    assert answer.output_ids == answer.steps[-1].canvas[: len(answer.output_ids)]
    assert len(answer.output_ids) == len(draft_tokens(local.tokenizer, "one <mask>", MASK))


@given(st.lists(st.sampled_from([MASK, 1, 2, 3]), min_size=1, max_size=24).filter(lambda ids: MASK in ids), st.data())
def test_a_canvas_decides_every_mask_of_a_draft_within_its_steps(draft: list[int], data: st.DataObject) -> None:
    block = data.draw(st.integers(1, len(draft)))
    steps = data.draw(st.integers(-(-len(draft) // block), len(draft)))
    canvas = Canvas(len(draft), block, steps, MASK, draft=tuple(draft))
    taken = 0
    while not canvas.finished:
        rows = canvas.masked_rows()[: canvas.tokens_to_commit()]
        canvas.commit(rows, 10 + rows)
        taken += 1
    assert taken <= steps
    assert canvas.answer() == [10 + row if token == MASK else token for row, token in enumerate(draft)]
