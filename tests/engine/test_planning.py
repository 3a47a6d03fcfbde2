"""What a request will need: one plan for every process, and each text of it tokenised once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import golden_data
from redvtp.errors import InvalidRequest
from redvtp.kv.blocks import blocks_needed
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.planning import RequestPlan, plan_request
from redvtp.prompt import load_tokenizer

EngineFactory = Callable[..., LocalEngine]
CHECKPOINT = "tiny-llada-v"
CASE = golden_data.Case(CHECKPOINT, "square")
DRAFT = "There is a <mask><mask> on the left."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(golden_data.checkpoint_dir(CHECKPOINT))


def _plan(tokenizer: Any, denoising: DenoisingParams, pruning: PruningParams, max_model_len: int = 4096) -> RequestPlan:
    return plan_request(
        tokenizer,
        denoising,
        pruning,
        mask_id=584,
        num_layers=4,
        prompt_tokens=100,
        group_lengths=(50, 30),
        max_model_len=max_model_len,
    )


def test_tokens_at_admission_are_prompt_canvas_and_suffix(tokenizer: Any) -> None:
    plan = _plan(tokenizer, DenoisingParams(gen_length=16, suffix=" and so on"), PruningParams(keep_ratio=0.25))
    assert plan.suffix_ids == tuple(tokenizer.encode(" and so on", add_special_tokens=False))
    assert plan.canvas_tokens == 16 + len(plan.suffix_ids)
    assert plan.kv_tokens == 100 + plan.canvas_tokens, "what an attention score drops is there at first"


def test_tokens_dropped_before_the_first_forward_need_no_cache(tokenizer: Any) -> None:
    plan = _plan(tokenizer, DenoisingParams(gen_length=16), PruningParams(preset="attention-free", keep_ratio=0.25))
    assert plan.kv_tokens == 100 - 80 + 20 + 16


def test_a_drafts_canvas_is_the_draft(tokenizer: Any) -> None:
    plan = _plan(tokenizer, DenoisingParams(gen_length=64, draft=DRAFT), PruningParams())
    assert plan.denoising.gen_length == len(plan.draft_ids) < 64
    assert plan.denoising.ignore_eos
    assert plan.draft_ids.count(584) == 2


def test_too_long_is_refused_with_all_its_parts(tokenizer: Any) -> None:
    denoising = DenoisingParams(gen_length=16, suffix=" and so on")
    suffix = len(tokenizer.encode(" and so on", add_special_tokens=False))
    longest = 100 + 16 + suffix
    assert _plan(tokenizer, denoising, PruningParams(), longest).kv_tokens == longest
    sentence = (
        rf"prompt \(100 tokens, 80 of them visual\) plus gen_length 16 plus a suffix of {suffix} tokens "
        rf"exceeds max_model_len {longest - 1}; shorten gen_length"
    )
    with pytest.raises(InvalidRequest, match=sentence):
        _plan(tokenizer, denoising, PruningParams(), longest - 1)


class _Counting:
    """A tokenizer that counts how often it is given each text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.seen: Counter[str] = Counter()

    def __call__(self, text: str, **options: Any) -> Any:
        self.seen[text] += 1
        return self._tokenizer(text, **options)

    def encode(self, text: str, **options: Any) -> Any:
        self.seen[text] += 1
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_request_of_the_embedded_engine_tokenises_its_draft_once(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was eight times."""
    local = engine(CHECKPOINT)
    counting = _Counting(local.tokenizer)
    monkeypatch.setattr(local, "tokenizer", counting)
    denoising = DenoisingParams(draft=DRAFT, suffix=" The end.", stop=("never",))
    (generation,) = local.generate([Request(CASE.prompt, tuple(CASE.images()), denoising)])
    assert generation.output_ids
    assert {text: counting.seen[text] for text in ("There is a ", " The end.", "never")} == {
        "There is a ": 1,
        " The end.": 1,
        "never": 1,
    }


def test_the_embedded_engine_takes_what_the_plan_says(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    request = Request(CASE.prompt, tuple(CASE.images()), DenoisingParams(gen_length=32, steps=2, ignore_eos=True))
    free = local.blocks.num_free
    stream = local._run(iter([waiting := local._prepare(0, request)]))
    taken: list[int] = []
    allocate = local.blocks.allocate
    local.blocks.allocate = lambda count: taken.append(count) or allocate(count)  # type: ignore[method-assign, func-returns-value]
    try:
        list(stream)
    finally:
        del local.blocks.allocate
    assert taken == [blocks_needed(waiting.plan.kv_tokens, local.cache.block_size)]
    assert local.blocks.num_free == free
