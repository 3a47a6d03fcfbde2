"""The canvas alone: schedule, commits, stop sequences, what may be streamed."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import golden_data
from redvtp.canvas.canvas import Canvas
from redvtp.canvas.schedule import curve_counts, dream_counts, even_counts, schedule_of, transfer_table
from redvtp.params import SCHEDULE_SHIFTS, SCHEDULES

MASK = 99


def test_even_counts_are_the_references_table() -> None:
    tables = json.loads((golden_data.golden_root() / "schedules" / "lladav_schedules.json").read_text())
    assert tables
    for entry in tables:
        assert even_counts(entry["mask_count"], entry["steps"]) == tuple(entry["table"]), entry


LAVIDA_TABLES = json.loads((golden_data.golden_root() / "schedules" / "lavida_schedules.json").read_text())


@pytest.mark.parametrize("schedule", [None, "linear", "shift", "cosine", "logit_normal"])
def test_curves_are_the_references_tables(schedule: str | None) -> None:
    tables = [entry for entry in LAVIDA_TABLES if entry.get("schedule") == schedule]
    assert len(tables) >= 20
    for entry in tables:
        shift = (entry.get("schedule_kwargs") or {}).get("shift", 3.0)
        counts = schedule_of(schedule or "even", shift)(entry["mask_count"], entry["steps"])
        assert counts == tuple(entry["table"]), entry


def test_dreams_time_steps_are_the_references() -> None:
    """Tokens decided after each step of the golden runs: from an empty canvas, and from one with the first decided."""
    decided = (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 32)
    assert tuple(accumulate(dream_counts(32, 16))) == decided
    assert tuple(1 + count for count in accumulate(dream_counts(31, 16))) == (2, *decided[1:])
    cut_short = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 32)
    assert tuple(1 + count for count in accumulate(dream_counts(31, 16, time_steps=32))) == cut_short


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1.0, 100))
def test_a_shift_of_one_is_the_straight_line_and_a_larger_one_decides_later(
    tokens: int, steps: int, shift: float
) -> None:
    line = curve_counts(tokens, steps, "linear", 1.0)
    assert curve_counts(tokens, steps, "shift", 1.0) == line
    half = len(line) // 2
    assert sum(curve_counts(tokens, steps, "shift", shift)[:half]) <= sum(line[:half])


@given(st.integers(1, 300), st.integers(1, 300), st.floats(*SCHEDULE_SHIFTS))
# In float32 these end a hair below 1.
@example(2, 1, 0.1)
@example(3, 2, 0.05)
def test_a_shift_leaves_nothing_undecided(tokens: int, steps: int, shift: float) -> None:
    counts = curve_counts(tokens, steps, "shift", shift)
    assert sum(counts) == tokens
    assert min(counts) > 0


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.sampled_from(SCHEDULES))
def test_every_table_decides_every_position_once(gen: int, block: int, steps: int, schedule: str) -> None:
    block = min(block, gen)
    blocks = -(-gen // block)
    steps = min(max(steps, blocks), gen)
    table = transfer_table(gen, block, steps, schedule_of(schedule, 3.0))
    assert [sum(counts) for counts in table] == [min(block, gen - start) for start in range(0, gen, block)]
    assert all(count > 0 for counts in table for count in counts)
    if schedule != "dream" and gen % block == 0 and steps % blocks == 0 and steps // blocks <= block:
        assert sum(len(counts) for counts in table) == steps


def _run(canvas: Canvas, order: list[int], tokens: list[int]) -> tuple[list[int], int]:
    """Decide positions in the given preference order; returns what was streamed and the steps taken."""
    streamed: list[int] = []
    steps = 0
    while not canvas.finished:
        allowed = set(canvas.masked_rows().tolist())
        rows = [row for row in order if row in allowed][: canvas.tokens_to_commit()]
        canvas.commit(torch.tensor(rows, dtype=torch.int64), torch.tensor([tokens[row] for row in rows]))
        streamed += canvas.resolved_growth()
        steps += 1
    return streamed, steps


@given(st.data())
def test_the_stream_is_the_answer_whatever_the_order(data: st.DataObject) -> None:
    gen = data.draw(st.integers(1, 24))
    block = data.draw(st.integers(1, gen))
    steps = data.draw(st.integers(-(-gen // block), gen))
    order = data.draw(st.permutations(range(gen)))
    tokens = data.draw(st.lists(st.integers(0, 5), min_size=gen, max_size=gen))
    stop = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=2))
    canvas = Canvas(gen, block, steps, MASK, (tuple(stop),) if stop else ())
    streamed, taken = _run(canvas, order, tokens)
    assert taken <= steps
    answer = canvas.answer()
    assert streamed[: len(answer)] == answer
    assert canvas.stopped == (len(answer) < gen)
    assert streamed == (answer + stop if canvas.stopped else answer)
    if stop:
        assert not any(answer[i : i + len(stop)] == stop for i in range(len(answer)))
    else:
        assert answer == tokens


def test_a_stop_found_behind_undecided_positions_waits_for_them() -> None:
    canvas = Canvas(8, 8, 8, MASK, ((5,),))
    canvas.commit(torch.tensor([4]), torch.tensor([5]))
    assert (canvas.stopped, canvas.finished) == (True, False)
    assert canvas.resolved_growth() == []
    assert canvas.masked_rows().tolist() == [0, 1, 2, 3]
    canvas.commit(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 1]))
    assert canvas.finished
    assert canvas.resolved_growth() == [1, 1, 1, 1, 5]
    assert canvas.answer() == [1, 1, 1, 1]


def test_an_earlier_stop_lowers_a_later_one() -> None:
    canvas = Canvas(8, 8, 8, MASK, ((5,), (6, 7)))
    canvas.commit(torch.tensor([6]), torch.tensor([5]))
    canvas.commit(torch.tensor([1, 2]), torch.tensor([6, 7]))
    canvas.commit(torch.tensor([0]), torch.tensor([1]))
    assert canvas.finished
    assert canvas.answer() == [1]
    assert canvas.resolved_growth() == [1, 6, 7]


def test_a_proposed_mask_id_spends_the_budget_and_the_loop_ends() -> None:
    canvas = Canvas(4, 2, 4, MASK)
    streamed, steps = _run(canvas, [1, 3, 2, 0], [MASK, 1, 2, 3])
    assert steps == 4
    assert canvas.answer() == streamed
    assert canvas.answer().count(MASK) == 1


def test_a_block_that_is_decided_early_ends_early() -> None:
    canvas = Canvas(8, 4, 8, MASK, draft=(1, 2, 3, 4, 5, MASK, MASK, MASK))
    assert canvas.block == 1
    assert canvas.masked_rows().tolist() == [5, 6, 7]
    assert canvas.resolved_growth() == [1, 2, 3, 4, 5]
    _, steps = _run(canvas, [5, 6, 7], [0] * 8)
    assert steps == 3


def test_a_token_decided_from_outside_is_not_counted_again() -> None:
    canvas = Canvas(8, 8, 4, MASK)
    canvas.decide(0, 5)
    canvas.decide(0, 6)
    assert canvas.tokens[0] == 5
    assert canvas.masked_rows().tolist() == [1, 2, 3, 4, 5, 6, 7]
    _, steps = _run(canvas, list(range(8)), [1] * 8)
    assert steps == 4
    assert canvas.answer() == [5, 1, 1, 1, 1, 1, 1, 1]


def test_a_stop_decided_from_outside_ends_the_canvas() -> None:
    canvas = Canvas(8, 8, 4, MASK, ((5,),))
    canvas.decide(0, 5)
    assert canvas.finished
    assert canvas.answer() == []


@pytest.mark.parametrize(("tokens", "steps"), [(4, 0), (-1, 2)])
def test_a_schedule_without_steps_is_refused(tokens: int, steps: int) -> None:
    with pytest.raises(ValueError, match="cannot spread"):
        even_counts(tokens, steps)
