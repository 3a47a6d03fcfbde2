"""Knobs: what is refused, with which sentence."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest

from redvtp.errors import BadInput, InvalidRequest, refusing
from redvtp.params import REMASKINGS, DenoisingParams, PruningParams
from redvtp.pruning.resolve import policy_of

BAD_DENOISING: list[tuple[dict[str, Any], str]] = [
    ({"gen_length": 0}, r"gen_length must be an integer in \[1, 65536\], got 0"),
    ({"gen_length": 10**9}, "gen_length must be"),
    ({"gen_length": True}, "gen_length must be"),
    ({"gen_length": 2.0}, "gen_length must be"),
    ({"gen_length": 8, "block_length": 9}, r"block_length must be an integer in \[1, 8\], got 9"),
    ({"gen_length": 8, "steps": 9}, r"steps must be an integer in \[1, 8\], got 9"),
    ({"gen_length": 8, "block_length": 2, "steps": 3}, "steps must be at least the number of canvas blocks"),
    ({"temperature": -0.1}, "temperature must be a number >= 0, got -0.1"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"seed": "x"}, "seed must be an integer"),
    ({"schedule": "square"}, "schedule must be one of even, linear, shift, cosine, logit_normal, dream, got 'square'"),
    ({"schedule_shift": 0}, r"schedule_shift must be a number in \[0.001, 1000\], got 0"),
    ({"schedule_shift": 1e30}, "schedule_shift must be"),
    ({"schedule_shift": float("inf")}, "schedule_shift must be"),
    ({"schedule_shift": 10**400}, "schedule_shift must be"),
    ({"schedule_shift": True}, "schedule_shift must be"),
    ({"remasking": "best"}, f"remasking must be one of {', '.join(REMASKINGS)}, got 'best'"),
    ({"threshold": 0}, r"threshold must be a number in \(0, 1000\], got 0"),
    ({"threshold": -1.0}, "threshold must be"),
    ({"threshold": float("nan")}, "threshold must be"),
    ({"threshold": 10**400}, "threshold must be"),
    ({"threshold": True}, "threshold must be"),
    ({"threshold": "0.9"}, r"threshold must be a number in \(0, 1000\], got '0.9'"),
    ({"min_confidence": 1.1}, r"min_confidence must be a number in \[0, 1\], got 1.1"),
    ({"min_confidence": -0.1}, "min_confidence must be"),
    ({"min_confidence": [0.5]}, "min_confidence must be"),
    (
        {"threshold": 1, "min_confidence": 0.9},
        "threshold and min_confidence exclude each other, got 1 and 0.9; leave one of them out",
    ),
    ({"threshold": 1, "remasking": "entropy"}, "threshold needs remasking low_confidence or margin .*, got entropy"),
    ({"min_confidence": 0, "remasking": "random"}, "min_confidence needs remasking .*, got random"),
    ({"stop": ("",)}, "stop must be non-empty strings"),
    ({"stop": "eot"}, "stop must be non-empty strings"),
    ({"stop": ("\ud800",)}, r"stop must be valid Unicode, got '\\ud800'"),
    ({"stop": ("x" * 70_000,)}, "stop must have at most 65,536 characters, got 70,000"),
    ({"suffix": 3}, "suffix must be a string"),
    ({"suffix": "a\udfff"}, r"suffix must be valid Unicode, got 'a\\udfff'"),
    ({"suffix": "x" * 70_000}, "suffix must have at most 65,536 characters, got 70,000"),
    ({"draft": 3}, "draft must be text with at least one <mask> to fill in, got 3"),
    ({"draft": "all said"}, "draft must be text with at least one <mask> to fill in, got 'all said'"),
    ({"draft": "<mask>\ud800"}, "draft must be valid Unicode"),
    ({"draft": "<mask>" * 20_000}, "draft must have at most 65,536 characters, got 120,000"),
    ({"ignore_eos": 1}, "ignore_eos must be true or false"),
    ({"cache": "suffix"}, "cache must be one of none, prefix, dual, prefix_lm, got 'suffix'"),
    ({"refresh_interval": 0}, "refresh_interval must be an integer >= 1, got 0"),
]
BAD_PRUNING: list[tuple[dict[str, Any], str]] = [
    ({"keep_ratio": 0}, r"keep_ratio must be a number in \(0, 1\], got 0"),
    ({"keep_ratio": 1.5}, r"keep_ratio must be a number in \(0, 1\], got 1.5"),
    ({"keep_ratio": "x"}, r"keep_ratio must be a number in \(0, 1\], got 'x'"),
    ({"keep_ratio": float("nan")}, "keep_ratio must be"),
    ({"keep_ratio": 10**400}, "keep_ratio must be"),
    ({"keep_ratio": [0.5]}, r"keep_ratio must be a number in \(0, 1\], got \[0.5\]"),
    ({"preset": "magic"}, "preset must be one of redvtp, .*, random, uniform, none, got 'magic'$"),
    ({"score_rows": "all"}, "score_rows must be one of masked, response, prompt, prompt_response, committed, got"),
    ({"score_layers": "3:"}, "score_layers must be a layer N or a range A:B, got '3:'"),
    ({"attention_mass": 1.2}, r"attention_mass must be a number in \(0, 1\], got 1.2"),
    ({"min_keep_ratio": 0}, r"min_keep_ratio must be a number in \(0, 1\], got 0"),
    ({"min_keep_ratio": 0.5, "max_keep_ratio": 0.4}, r"min_keep_ratio must be at most max_keep_ratio \(0.4\), got 0.5"),
    ({"prune_step": -1}, "prune_step must be an integer >= 0, got -1"),
    ({"prune_steps": 0}, "prune_steps must be an integer >= 1, got 0"),
    ({"prune_layer": 1.5}, "prune_layer must be an integer >= 0, got 1.5"),
    ({"prune_scope": "tile"}, "prune_scope must be one of all, image, got 'tile'"),
    ({"importance": (1.0, float("nan"))}, r"importance must be finite numbers, got \(1.0, nan\)"),
    ({"importance": ("1",)}, "importance must be finite numbers"),
    ({"positions": "shuffled"}, "positions must be one of compact, original, got 'shuffled'"),
]


@pytest.mark.parametrize(("knobs", "message"), BAD_DENOISING, ids=lambda value: str(value))
def test_bad_denoising_knobs_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingParams(**knobs)


@pytest.mark.parametrize(("knobs", "message"), BAD_PRUNING, ids=lambda value: str(value))
def test_bad_pruning_knobs_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningParams(**knobs)


@pytest.mark.parametrize(("knobs", "message"), BAD_DENOISING + BAD_PRUNING, ids=lambda value: str(value))
def test_a_refusal_holds_its_knobs_as_parts(knobs: dict[str, Any], message: str) -> None:
    """Each boundary writes them as its user typed them, so no name of a knob may stand in the text."""
    params = PruningParams if (knobs, message) in BAD_PRUNING else DenoisingParams
    with pytest.raises(InvalidRequest) as refusal:
        params(**knobs)
    shown = refusal.value.spelled(lambda name: f"<{name.upper()}>")
    names = {field.name for field in fields(params)}
    said = shown.partition(" got ")[0]
    assert any(said.startswith(f"<{name.upper()}> ") for name in knobs)
    assert not {word for word in names if word in said.split()}
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


@pytest.mark.parametrize(
    ("params", "knobs", "meant"),
    [
        (PruningParams, {"preset": "redvpt"}, "redvtp"),
        (PruningParams, {"preset": "llada_fastv"}, "llada-fastv"),
        (PruningParams, {"positions": "Compact"}, "compact"),
        (DenoisingParams, {"cache": "prefix-lm"}, "prefix_lm"),
        (DenoisingParams, {"cache": "duel"}, "dual"),
        (DenoisingParams, {"remasking": "low_confidenc"}, "low_confidence"),
        (DenoisingParams, {"schedule": "evenn"}, "even"),
    ],
)
def test_a_misspelt_choice_is_answered_with_the_right_one(params: Any, knobs: dict[str, Any], meant: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"; did you mean '{meant}'\?$"):
        params(**knobs)


@pytest.mark.parametrize("value", ["magic", "", 3, None, ["redvtp"], "redvtp" * 10**6])
def test_a_choice_like_no_other_gets_no_suggestion(value: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        PruningParams(preset=value)
    assert "did you mean" not in str(refusal.value)


def test_a_preset_adapts_to_few_steps_and_a_request_does_not() -> None:
    def shares(steps: int, **knobs: Any) -> dict[int, float]:
        denoising = DenoisingParams(gen_length=steps, steps=steps, block_length=steps)
        policy = policy_of(PruningParams(**{"keep_ratio": 0.25, **knobs}), 4, denoising)
        assert policy is not None
        return policy.shares

    assert shares(16, preset="late") == {7: 0.25}
    assert [list(shares(steps, preset="late")) for steps in (1, 2, 3, 4)] == [[0], [0], [0], [1]]
    assert list(shares(16, preset="progressive")) == [0, 1, 2, 3]
    assert [list(shares(steps, preset="progressive")) for steps in (1, 2, 3)] == [[0], [0], [0, 1]]
    assert shares(3, preset="progressive") == {0: 0.5, 1: 0.25}
    assert shares(9, prune_step=4, prune_steps=2) == {4: 0.5, 5: 0.25}
    with pytest.raises(ValueError, match=r"prune_step must be an integer in \[0, 2\] with 4 denoising steps, got 3"):
        shares(4, prune_step=3)
    with pytest.raises(ValueError, match=r"prune_steps must be an integer in \[1, 3\] from step 0 on with 4 .*, got 4"):
        shares(4, prune_steps=4)


def test_refused_value_is_not_echoed_at_length() -> None:
    """It came from a client, who may have sent megabytes."""
    for knobs in ({"cache": "x" * 10**6}, {"suffix": ["x" * 10**6]}, {"gen_length": list(range(10**5))}):
        with pytest.raises(ValueError, match=r"got .*\.\.\.$") as refusal:
            DenoisingParams(**knobs)
        assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(("gen", "block", "steps"), [(1, 1, 1), (2, 2, 1), (16, 16, 8), (96, 32, 48), (100, 32, 50)])
def test_defaults_scale_with_the_canvas(gen: int, block: int, steps: int) -> None:
    params = DenoisingParams(gen_length=gen)
    assert (params.resolved_block_length, params.resolved_steps) == (block, steps)


@pytest.mark.parametrize("rule", [{"threshold": 0.9}, {"min_confidence": 0.9, "steps": 8}])
def test_steps_by_confidence_are_as_many_as_there_can_be(rule: dict[str, Any]) -> None:
    assert DenoisingParams(gen_length=40, **rule).resolved_steps == 40


@pytest.mark.parametrize("make", [DenoisingParams, PruningParams])
def test_a_refused_value_is_an_invalid_request(make: Any) -> None:
    """A server answers these with HTTP 400; any other ValueError is a bug and keeps its traceback."""
    name = "gen_length" if make is DenoisingParams else "keep_ratio"
    with pytest.raises(InvalidRequest, match=f"{name} must be"):
        make(**{name: 0})


def test_the_command_shows_a_refused_value_in_one_line() -> None:
    with pytest.raises(BadInput, match=r"gen_length must be an integer in \[1, 65536\], got 0"), refusing():
        DenoisingParams(gen_length=0)
