"""What version 2 is trained and evaluated on: answers follow from the pictures, nothing held out is trained on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from training.scenes import is_held_out
from training.v2.batches import language_batch
from training.v2.draw import render
from training.v2.evaluate import held_out
from training.v2.makers import make
from training.v2.pictures import COLUMNS, HINTS, IGNORE, cell_hints, visual_tokens
from training.v2.plan import PLAN, Phase
from training.v2.questions import LONG, Question, questions, steps_for
from training.v2.vocab import COLORS, DIRECTIONS, SHAPES, WORDS, encode, tokenizer
from training.v2.world import Cell, Family, Item, Sample, Scene, base_labels, labels

pytestmark = pytest.mark.slow

FAMILIES: tuple[Family, ...] = ("sparse", "objects", "form", "table", "page", "signs", "pair", "clip")
DENSE: tuple[Family, ...] = ("objects", "form", "table", "page", "signs")


def _text(question: Question) -> str:
    return str(tokenizer().decode(list(question.answer)))


def _answers(sample: Sample) -> dict[str, str]:
    return {question.text: _text(question) for question in questions(sample)}


def _box(row: int, col: int, color: str, digit: str) -> Item:
    number = COLORS.index(color) + 1
    return Item("box", (Cell(row, col, color=number, glyph=int(digit) + 1, part=1),), color=number, text=digit)


def _shape(row: int, col: int, color: str, shape: str) -> Item:
    hue, form = COLORS.index(color) + 1, SHAPES.index(shape) + 1
    return Item("shape", (Cell(row, col, color=hue, shape=form, part=1),), color=hue, shape=form)


def _field(row: int, name: str, value: str) -> Item:
    number = WORDS.index(name) + 1
    return Item(
        "field", (Cell(row, 0, name=number, part=2), Cell(row, 1, name=number, part=4)), name=number, text=value
    )


def test_a_scene_answers_what_it_shows() -> None:
    items = (_box(0, 0, "red", "7"), _box(1, 0, "blue", "2"), _box(2, 0, "blue", "4"), _shape(3, 1, "red", "star"))
    answers = _answers(Sample("objects", (Scene(8, 8, items, (1,), "train"),)))

    assert answers["Which digit is in the red box?"] == "7"
    assert "Which digit is in the blue box?" not in answers, "two boxes are blue"
    assert answers["What color is the box with the digit 4?"] == "blue"
    assert answers["What color is the star?"] == "red"
    assert answers["How many boxes are there?"] == "3"
    assert answers["How many red things are there?"] == "2"
    assert answers["List all boxes row by row."] == "red:7 blue:2 blue:4"
    assert answers["List all shapes row by row."] == "red star"


def test_a_form_is_also_given_as_json() -> None:
    items = (_field(0, "desk", "513"), _field(1, "fee", "204"))
    answers = _answers(Sample("form", (Scene(8, 8, items, (1,), "train"),)))

    assert answers["What is the fee?"] == "204"
    assert answers["Transcribe the form."] == "desk:513 fee:204"
    assert answers["Give the form as JSON."] == '{"desk":513,"fee":204}'


def test_table_answers_follow_rows_and_columns() -> None:
    for seed in range(20):
        sample = make("table", 2, (5, seed), "train")
        (scene,) = sample.scenes
        answers = _answers(sample)
        for item in scene.of("entry"):
            assert answers[f"What is the {WORDS[item.column - 1]} of {WORDS[item.name - 1]}?"] == item.text
            # The column's name stands above the number, the row's name to its left.
            row, col = item.at
            (head,) = (head for head in scene.of("head") if head.name == item.column)
            (side,) = (side for side in scene.of("side") if side.name == item.name)
            assert head.at[1] == col
            assert side.at[0] == row


def test_page_words_are_read_line_by_line() -> None:
    sample = make("page", 2, (5, 1), "train")
    (scene,) = sample.scenes
    answers = _answers(sample)
    lines = [
        answers[text] for text in sorted(answers, key=lambda text: (len(text), text)) if text.startswith("Read line")
    ]
    assert " ".join(lines) == answers["Read the page."]
    assert answers["Read the page."].split() == [
        WORDS[item.name - 1] for item in sorted(scene.items, key=lambda i: i.at)
    ]


def test_questions_about_one_of_two_pictures_are_answered_by_that_picture() -> None:
    first = Scene(4, 4, (_shape(0, 0, "red", "star"), _shape(1, 0, "blue", "circle")), (1,), "train")
    second = Scene(4, 4, (_shape(0, 0, "green", "star"),), (2,), "train")
    answers = _answers(Sample("pair", (first, second)))

    assert answers["What color is the star in the first picture?"] == "red"
    assert answers["What color is the star in the second picture?"] == "green"
    assert answers["Which picture has the circle?"] == "first"
    assert "Which picture has the star?" not in answers


def test_the_moving_box_moves_where_the_answer_says() -> None:
    seen = set()
    for seed in range(60):
        sample = make("clip", 2, (6, seed), "train")
        if sample.motion < 0:
            continue
        places = [scene.of("box")[0].at for scene in sample.scenes]
        steps = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)}
        direction = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[steps.pop()]
        assert not steps, "one direction, one cell a frame"
        assert DIRECTIONS[sample.motion] == direction
        assert _answers(sample)["Which way does the box move?"] == direction
        # Shapes stand still, and nothing covers them.
        assert len({tuple(item.at for item in scene.of("shape")) for scene in sample.scenes}) == 1
        assert all(item.at not in places for item in sample.scenes[0].of("shape"))
        seen.add(direction)
    assert seen == set(DIRECTIONS)


def test_a_changing_clip_is_described_frame_by_frame() -> None:
    for seed in range(40):
        sample = make("clip", 2, (7, seed), "train")
        if sample.motion >= 0:
            continue
        shown = [(COLORS[scene.of("box")[0].color - 1], scene.of("box")[0].text) for scene in sample.scenes]
        answers = _answers(sample)
        assert 3 <= len(shown) <= 8
        assert answers["Describe the clip."] == " ".join(f"{color}:{digit}" for color, digit in shown)
        assert answers["What color is the box in the last picture?"] == shown[-1][0]
        assert answers[f"Which color comes after {shown[0][0]}?"] == shown[1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_pictures_and_questions(family: Family) -> None:
    one, other = make(family, 2, (3, 4), "train"), make(family, 2, (3, 4), "train")
    assert one == other
    assert questions(one) == questions(other)
    for scene, again in zip(one.scenes, other.scenes, strict=True):
        assert np.array_equal(render(scene), render(again))
    assert make(family, 2, (3, 5), "train") != one


@pytest.mark.parametrize("family", FAMILIES)
def test_items_lie_within_the_picture_and_never_overlap(family: Family) -> None:
    for level in range(3):
        for seed in range(25):
            for scene in make(family, level, (8, level, seed), "train").scenes:
                places = [(cell.row, cell.col) for item in scene.items for cell in item.cells]
                assert len(set(places)) == len(places)
                assert all(0 <= row < scene.rows and 0 <= col < scene.cols for row, col in places)


def test_codes_and_values_of_the_two_splits_are_disjoint() -> None:
    for split in ("train", "test"):
        for family in ("form", "signs", "sparse"):
            for seed in range(30):
                for scene in make(family, 2, (9, seed), split).scenes:
                    texts = [item.text for item in scene.items if item.kind in ("field", "sign")]
                    assert all(is_held_out(text) == (split == "test") for text in texts)


def test_about_half_of_the_visual_tokens_of_dense_scenes_show_something() -> None:
    shares = {
        family: np.mean(
            [scene.content / scene.visual for seed in range(60) for scene in make(family, 2, (1, seed), "test").scenes]
        )
        for family in DENSE
    }
    assert min(shares.values()) > 0.25, shares
    assert 0.35 < np.mean(list(shares.values())) < 0.6, shares


def test_long_answers_have_thirty_to_sixty_tokens() -> None:
    lengths = [len(question.answer) for _, question in held_out(12) if question.group == "long"]
    assert len(lengths) >= 60
    assert min(lengths) >= LONG[0]
    assert max(lengths) <= LONG[1]
    assert 35 <= np.median(lengths) <= 50


def test_counts_are_spread_so_that_guessing_does_not_pay() -> None:
    counted: dict[str, Counter[str]] = {}
    for sample, question in held_out(80):
        if question.group == "count" and sample.family == "objects":
            counted.setdefault(question.task, Counter())[_text(question)] += 1
    assert set(counted) == {"count_boxes", "count_shape", "count_color"}
    for task, answers in counted.items():
        commonest = answers.most_common(1)[0][1] / answers.total()
        assert commonest < 0.6, (task, answers)


def test_every_answer_fits_its_canvas_and_is_text_the_tokenizer_gives_back() -> None:
    for sample, question in held_out(6):
        assert len(question.answer) < question.canvas
        assert steps_for(question.canvas) <= question.canvas
        text = _text(question)
        assert (
            encode(text if question.group == "json" or text[0].isdigit() or text[0].isupper() else f" {text}")
            == question.answer
        )
        assert len(question.items) == len(question.slots) == len(question.answer)
        assert sample.scenes


def test_every_visual_token_is_always_in_the_sequence() -> None:
    """No picture loses tokens in training, in any phase."""
    for phase in PLAN:
        if phase.part == "tower":
            continue
        small = Phase(phase.name, "language", 1, batch=4, tokens=phase.tokens, levels=phase.levels)
        batch = language_batch(small, (1, 2, 0, 3), "train")
        tiles = len(batch.patches)
        for row in range(4):
            sources = batch.source[row][batch.source[row] >= 0].tolist()
            cells = [source for source in sources if source < 16 * tiles]
            assert len(set(cells)) == len(cells)
            assert len(cells) % 16 == 0
        everything = [source for source in batch.source.flatten().tolist() if 0 <= source < 16 * tiles]
        assert sorted(everything) == list(range(16 * tiles))


@pytest.mark.parametrize("family", FAMILIES)
def test_hints_are_asked_of_item_tokens_only(family: Family) -> None:
    """A hint on an empty token would say that it is empty, which is what a pruner has to find out."""
    sample = make(family, 2, (4, 4), "train")
    tokens = visual_tokens(sample)
    hinted = (tokens.hints != IGNORE).any(1)
    assert not (hinted & ~tokens.shown).any()
    assert hinted[tokens.shown].all()
    for column, name in enumerate(HINTS):
        known = tokens.hints[:, column][tokens.hints[:, column] != IGNORE]
        assert ((known >= 0) & (known < HINTS[name])).all(), name


def test_count_hints_are_the_answers_to_the_counting_questions() -> None:
    items = (_shape(0, 0, "red", "star"), _shape(0, 2, "blue", "star"), _shape(2, 2, "red", "cross"))
    (grid,) = cell_hints(Sample("objects", (Scene(8, 8, items, (1,), "train"),)))
    star = grid[0, 0]
    assert star[COLUMNS["same_value"]] == 2
    assert star[COLUMNS["same_color"]] == 2
    assert star[COLUMNS["same_kind"]] == 3


def test_the_squashed_picture_says_colors_and_that_it_is_the_squashed_picture() -> None:
    scene = Scene(8, 8, (_box(0, 0, "green", "3"), _box(0, 1, "green", "4"), _box(1, 0, "red", "4")), (1,), "train")
    base = base_labels(scene)
    assert base[0].tolist() == [COLORS.index("green") + 1, 0, 0, 0, 9]
    assert (base[1:, 0] == 0).all()
    assert labels(scene)[1, 0].tolist() == [COLORS.index("red") + 1, 5, 0, 0, 1]
