"""Exact match, and the intervals beside it, against published values and plain counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redvtp.evaluation.statistics import paired_difference, share
from redvtp.evaluation.tasks import is_right, normalize


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" Red:7  blue:3\n", "red:7 blue:3"),
        ("Yes.", "yes"),
        ("yes ?!", "yes"),
        ("3.5", "3.5"),
        ("STRASSE", "strasse"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_case_space_and_final_punctuation_do_not_count(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_everything_else_does_count() -> None:
    assert is_right(" Seven. ", ["7", "seven"])
    assert not is_right("seven 7", ["7", "seven"])
    assert not is_right("1,000", ["1000"])
    assert not is_right("", ["7"])


def test_wilsons_interval_is_the_published_one() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    for correct, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = share(correct, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def _table(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    now = [True] * (both + gained) + [False] * (lost + neither)
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return now, before


def test_the_paired_interval_is_the_published_one() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10."""
    found = paired_difference(*_table(36, 12, 2, 0))
    assert (found.pairs, found.gained, found.lost) == (50, 12, 2)
    assert found.difference == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)
    # McNemar's exact test: 14 coins, at most 2 or at least 12 heads.
    assert found.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)


def test_a_few_questions_that_agree_are_no_proof_of_no_difference() -> None:
    found = paired_difference(*_table(54, 0, 0, 0))
    assert (round(found.low, 4), round(found.high, 4)) == (-0.0664, 0.0664)
    assert found.p_value == 1.0


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    """0.78 against 0.72 of the same 150 questions; 600 draws cover 95 % within three standard errors."""
    random = np.random.default_rng(0)
    draws = random.multinomial(150, [0.68, 0.10, 0.04, 0.18], size=600)
    covered = sum(found.low <= 0.06 <= found.high for found in (paired_difference(*_table(*draw)) for draw in draws))
    assert 0.95 - 3 * 0.0089 <= covered / 600 <= 0.95 + 3 * 0.0089


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_the_paired_interval_holds_its_estimate_and_turns_with_the_sides(table: tuple[int, int, int, int]) -> None:
    now, before = _table(*table)
    found, turned = paired_difference(now, before), paired_difference(before, now)
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.difference == pytest.approx(np.mean(now) - np.mean(before))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert turned.p_value == pytest.approx(found.p_value)
