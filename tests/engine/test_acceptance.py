"""Decoding by confidence: what a step accepts, and canvases that take as many steps as they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import golden_data
from one_step import encode_prompt, forward
from redvtp.canvas.acceptance import acceptance_of, accepted, confidence_rule, factor_rule
from redvtp.canvas.canvas import Canvas
from redvtp.denoising.commit import candidate_logits, logit_rows
from redvtp.denoising.sequence import Sequence
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.reports import StepReport

EngineFactory = Callable[..., LocalEngine]

MASK = 99
SURE = st.floats(0, 1)
FALLING = st.lists(SURE, min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))
RULES = {
    "threshold": DenoisingParams(threshold=1.0),
    "threshold-rough": DenoisingParams(threshold=2.4),
    "min_confidence": DenoisingParams(min_confidence=0.6),
}


def _by_the_reference(confidence: list[float], masked_in_view: int, factor: float) -> int:
    """The reference's loop: what is masked in later blocks ranks behind all candidates, with confidence -inf."""
    ranked = confidence + [float("-inf")] * (masked_in_view - len(confidence))
    failing = next((rank for rank in range(1, len(ranked)) if not ranked[rank] >= 1 - factor / (rank + 2)), None)
    if failing is None or failing == len(ranked) - 1:
        return len(ranked)
    return failing


@given(FALLING, st.integers(0, 9), st.floats(0.001, 5))
@example([0.9, 0.1], 0, 1.0)
@example([0.9, 0.9, 0.1], 0, 1.0)
def test_factor_rule_is_the_references(confidence: list[float], elsewhere: int, factor: float) -> None:
    # With exactly one undecided position elsewhere the reference fills one at random; we never leave the candidates.
    elsewhere += elsewhere == 1
    expected = _by_the_reference(confidence, len(confidence) + elsewhere, factor)
    assert factor_rule(confidence, elsewhere == 0, factor) == expected


@pytest.mark.parametrize(
    ("confidence", "factor", "count"),
    [
        ([0.0, 0.9, 0.9], 1.0, 3),
        ([0.1, 0.66, 0.9, 0.9], 1.0, 1),
        ([0.9, 0.67, 0.74, 0.9], 1.0, 2),
        ([0.9, 0.67, 0.75, 0.79, 0.7], 1.0, 3),
        ([0.9, 0.69, 0.9, 0.9], 0.9, 1),
        ([0.9, 0.70, 0.77, 0.9], 0.9, 2),
        ([0.9, 0.3, 0.2, 0.1], 3.0, 2),
        ([0.2, 0.2, 0.2, 0.2], 6.0, 4),
    ],
)
def test_each_rank_must_be_surer_than_the_one_before(confidence: list[float], factor: float, count: int) -> None:
    assert factor_rule(confidence, False, factor) == count


def test_the_last_two_of_a_canvas_go_together() -> None:
    assert factor_rule([0.3, 0.1], True, 1.0) == 2
    assert factor_rule([0.3, 0.1], False, 1.0) == 1
    assert factor_rule([0.9, 0.8, 0.1], True, 1.0) == 3
    assert factor_rule([0.9, 0.1, 0.1], True, 1.0) == 1
    assert factor_rule([0.3], True, 1.0) == 1


@given(FALLING, SURE, st.booleans())
def test_plain_rule_accepts_what_reaches_it_and_always_one(confidence: list[float], least: float, last: bool) -> None:
    count = confidence_rule(confidence, last, least)
    assert count >= 1
    assert all(sure >= least for sure in confidence[1:count])
    assert all(sure < least for sure in confidence[count:])


def test_without_a_rule_the_schedule_decides() -> None:
    assert acceptance_of(DenoisingParams()) is None


def test_a_step_that_would_only_accept_the_mask_id_accepts_a_token_too() -> None:
    rule = acceptance_of(RULES["min_confidence"])
    assert rule is not None

    def chosen(tokens: list[int], confidence: list[float]) -> list[int]:
        sure = torch.tensor(confidence, dtype=torch.float64)
        return sorted(accepted(torch.tensor(tokens), sure, False, rule, MASK).tolist())

    assert chosen([1, MASK, 2, 3], [0.1, 0.9, 0.3, 0.2]) == [1, 2]
    assert chosen([1, MASK, 2, 3], [0.1, 0.9, 0.8, 0.2]) == [1, 2]
    assert chosen([MASK, MASK], [0.1, 0.2]) == [1]


@given(st.data())
def test_every_canvas_ends_within_a_step_for_each_token(data: st.DataObject) -> None:
    """Whatever is proposed, the mask id included; only where that was proposed to the end is anything left."""
    gen = data.draw(st.integers(1, 24))
    rule = acceptance_of(data.draw(st.sampled_from(list(RULES.values()))))
    start_at_block = data.draw(st.booleans())
    draft = tuple(data.draw(st.lists(st.sampled_from([7, MASK]), max_size=gen)))
    canvas = Canvas(gen, data.draw(st.integers(1, gen)), 1, MASK, ((5, 6),), draft=draft, acceptance=rule)
    proposals = torch.tensor(data.draw(st.lists(st.sampled_from([4, 5, 6, MASK]), min_size=gen, max_size=gen)))
    streamed = canvas.resolved_growth()
    steps = 0
    while not canvas.finished:
        before = canvas.masked()
        start = canvas.block_start if start_at_block else 0
        rows = canvas.masked_rows(start)
        sure = torch.tensor(data.draw(st.lists(SURE, min_size=len(rows), max_size=len(rows))), dtype=torch.float64)
        chosen = canvas.choose(proposals[rows], sure, start)
        canvas.commit(rows[chosen], proposals[rows[chosen]])
        streamed += canvas.resolved_growth()
        steps += 1
        if bool((proposals[rows] != MASK).any()):
            assert int(canvas.masked().sum()) < int(before.sum()), "a step decides something where it can"
    assert steps <= gen
    answer = canvas.answer()
    assert streamed[: len(answer)] == answer
    left = canvas.masked()[: canvas.answer_length]
    assert bool((proposals[: canvas.answer_length][left] == MASK).all())


CASE = golden_data.Case("tiny-llada-v", "wide")
# Unequal blocks, a stop, a suffix, a draft; every cache.
MODES = {
    "none": DenoisingParams(gen_length=20, block_length=8),
    "prefix": DenoisingParams(gen_length=20, block_length=8, cache="prefix"),
    "prefix-refreshed": DenoisingParams(gen_length=24, cache="prefix", refresh_interval=3),
    "prefix_lm": DenoisingParams(gen_length=20, block_length=8, cache="prefix_lm"),
    "stop": DenoisingParams(gen_length=40, block_length=16, cache="prefix", stop=("<|eot_id|>",)),
    "suffix": DenoisingParams(gen_length=17, block_length=16, suffix=" yes"),
    "draft": DenoisingParams(gen_length=64, block_length=5, draft="<mask> is<mask><mask> not <mask><mask>."),
    "margin": DenoisingParams(gen_length=20, block_length=8, cache="prefix", remasking="margin"),
    "single": DenoisingParams(gen_length=1),
}
PRUNINGS = {"dense": PruningParams(preset="none"), "pruned": PruningParams(keep_ratio=0.3)}
CHECKPOINTS = ["tiny-llada-v", "tiny-lavida", "tiny-lavida-dream"]


def _request(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams) -> Request:
    images = tuple(CASE.images())
    prompt = chat_prompt(local.tokenizer, "What is shown?", len(images), template=local.config.family.template)
    return Request(prompt, images, replace(denoising, ignore_eos=True), pruning)


def _sequence(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams) -> Sequence:
    request = _request(local, denoising, pruning)
    return local.sequence(request, local.tokenize(request), list(range(local.cache.num_blocks)))


def _asking(mode: str, rule: str) -> DenoisingParams:
    return replace(MODES[mode], threshold=RULES[rule].threshold, min_confidence=RULES[rule].min_confidence)


@torch.inference_mode()
def _expected_canvas(local: LocalEngine, sequence: Sequence, denoising: DenoisingParams) -> list[int]:
    """The canvas after the next step, worked out token by token from the logits of its forward."""
    encode_prompt(local, sequence)
    canvas, (step, output) = sequence.canvas, forward(local, sequence)
    rows = canvas.masked_rows(step.plan.first_candidate)
    ranked = []
    logits = candidate_logits(local.runner.context, output.hidden[logit_rows(step, output.spans[0], rows)])
    for row, line in zip(rows.tolist(), logits.double(), strict=True):
        shares = line.softmax(-1)
        best = shares.topk(2).values.tolist()
        sure = best[0] - best[1] if denoising.remasking == "margin" else best[0]
        ranked.append((sure, row, int(line[: local.special.vocab].argmax())))
    ranked.sort(reverse=True)
    undecided = sum(token == canvas.mask_id for token in canvas.tokens[step.plan.first_candidate :].tolist())
    sures = [sure for sure, _, _ in ranked]
    if denoising.threshold is not None:
        # A single undecided position elsewhere never goes with them, see above.
        undecided += undecided == len(ranked) + 1
        count = _by_the_reference(sures, undecided, denoising.threshold)
    else:
        assert denoising.min_confidence is not None
        count = max(1, len([sure for sure in sures if sure >= denoising.min_confidence]))
    tokens: list[int] = canvas.tokens.tolist()
    for _, row, token in ranked[:count]:
        tokens[row] = token
    return tokens


def _steps(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams) -> Iterator[StepReport]:
    sequence = _sequence(local, denoising, pruning)
    while not sequence.finished:
        expected = _expected_canvas(local, sequence, denoising)
        (report,) = local.runner.step([sequence])
        assert report.canvas == expected, report.step
        yield report


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "checkpoint", [CHECKPOINTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS[1:])]
)
def test_every_step_commits_what_the_rule_says(engine: EngineFactory, checkpoint: str, mode: str, rule: str) -> None:
    local = engine(checkpoint, num_blocks=31, max_model_len=512)
    pruning = PRUNINGS["pruned" if rule == "threshold" else "dense"]
    reports = list(_steps(local, _asking(mode, rule), pruning))
    assert 1 <= len(reports) <= len(reports[-1].canvas)
    answer = reports[-1].canvas[: reports[-1].answer_length]
    assert local.special.mask_id not in answer
    assert [token for report in reports for token in report.new_tokens][: len(answer)] == answer


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_the_rule_accepts_saves_steps(engine: EngineFactory, checkpoint: str) -> None:
    """Otherwise the tests above would be satisfied by one token a step."""
    local = engine(checkpoint, num_blocks=31, max_model_len=512)
    steps = [
        len(list(_steps(local, replace(_asking("none", rule), gen_length=32, block_length=None), PRUNINGS["dense"])))
        for rule in ("threshold", "threshold-rough")
    ]
    assert steps[1] < steps[0] <= 32


SETTLED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("one block at a step", {"min_confidence": 0.0}, {"steps": 3}),
    ("one token at a step", {"min_confidence": 1.0}, {"steps": 24}),
]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(("what", "rule", "schedule"), SETTLED, ids=[entry[0] for entry in SETTLED])
def test_extremes_are_the_schedules(
    engine: EngineFactory, checkpoint: str, cache: str, what: str, rule: dict[str, Any], schedule: dict[str, Any]
) -> None:
    local = engine(checkpoint)
    usual = DenoisingParams(gen_length=24, block_length=8, cache=cache, refresh_interval=3)
    asked = [_request(local, replace(usual, **own), PRUNINGS["pruned"]) for own in (rule, schedule)]
    by_rule, by_schedule = local.generate(asked)
    assert [step.canvas for step in by_rule.steps] == [step.canvas for step in by_schedule.steps], what


@pytest.mark.parametrize("rule", RULES)
def test_refreshing_at_every_step_is_no_cache(engine: EngineFactory, rule: str) -> None:
    local = engine("tiny-llada-v")
    refreshed = replace(_asking("prefix", rule), refresh_interval=1)
    asked = [_request(local, params, PRUNINGS["pruned"]) for params in (refreshed, _asking("none", rule))]
    first, second = local.generate(asked)
    assert [step.canvas for step in first.steps] == [step.canvas for step in second.steps]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
def test_late_waits_for_half_of_the_canvas(engine: EngineFactory, cache: str) -> None:
    """Nobody knows beforehand after how many steps that is."""
    local = engine("tiny-llada-v")
    # Some three tokens at a step, however unsure the model is.
    denoising = DenoisingParams(gen_length=24, block_length=8, cache=cache, threshold=4)
    late = PruningParams(preset="late", keep_ratio=0.3)
    (generation,) = local.generate([_request(local, denoising, late)])
    mask = local.special.mask_id
    decided = [sum(token != mask for token in step.canvas) for step in generation.steps]
    (pruned,) = [step.step for step in generation.steps if step.pruning is not None]
    assert 1 < pruned < len(decided) - 1 < 12
    assert decided[pruned - 1] >= 12 > decided[pruned - 2]
    # Two in a row, and the request's own step.
    twice, own = local.generate(
        [
            _request(local, denoising, replace(late, prune_steps=2)),
            _request(local, denoising, replace(late, prune_step=1)),
        ]
    )
    assert [step.step for step in twice.steps if step.pruning is not None] == [pruned, pruned + 1]
    assert [step.step for step in own.steps if step.pruning is not None] == [1]


def test_steps_and_schedule_have_no_part_in_it(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    plain = _asking("prefix", "threshold")
    asked = [_request(local, each, PRUNINGS["pruned"]) for each in (plain, replace(plain, steps=3, schedule="cosine"))]
    first, second = local.generate(asked)
    assert [step.canvas for step in first.steps] == [step.canvas for step in second.steps]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["none", "prefix", "prefix_lm", "draft"])
@pytest.mark.parametrize("bias", [30.0, 6.0])
def test_a_model_that_proposes_the_mask_id_comes_to_an_end(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, mode: str, rule: str, bias: float
) -> None:
    """Everywhere, or in some places: the reference would go on for ever."""
    local = engine("tiny-llada-v")
    logits, mask = local.model.language_model.logits, local.special.mask_id

    def leaning(hidden: torch.Tensor, vocab: int) -> torch.Tensor:
        found = logits(hidden, vocab)
        found[:, mask] += bias
        return found

    monkeypatch.setattr(local.model.language_model, "logits", leaning)
    free = local.blocks.num_free
    (generation,) = local.generate([_request(local, _asking(mode, rule), PRUNINGS["pruned"])])
    canvas = generation.steps[-1].canvas
    assert generation.steps[-1].finished
    assert len(generation.steps) <= len(canvas)
    assert local.blocks.num_free == free
    if bias == 30.0:
        assert mask in canvas
    if mode == "none":
        left = canvas.count(mask)
        assert (left == len(canvas)) if bias == 30.0 else (left < len(canvas))
