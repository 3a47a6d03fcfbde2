"""Questions about a scene, with their answers as the tokens the model should write.

Only what the scene determines is asked: a question about "the red box" needs exactly one red box. A task's canvas
length is the smallest of CANVAS_LENGTHS from 4 on that holds the answer and its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.scenes import Item, Scene
from training.vocab import COLORS, GLYPHS, NAMES, SHAPES, encode, single

# Canvas lengths of training and evaluation: 2, 16, 32 and 96 are those of LLaDA-V's published evaluations.
CANVAS_LENGTHS = (2, 4, 8, 16, 32, 48, 64, 96)
SHORT_TASKS = ("digit_of_color", "color_of_digit", "color_of_shape", "shape_of_color", "field_value", "sign_code")
COUNT_TASKS = ("count_boxes", "count_shape")
LONG_TASKS = ("list_boxes", "list_shapes", "transcribe_form", "transcribe_signs")
TASKS = SHORT_TASKS + COUNT_TASKS + LONG_TASKS

KEYS = (*COLORS, *GLYPHS, *SHAPES, *NAMES)
# Parts of an item in an answer: its key, the sign between, its first to fifth character; then the answer's end.
KEY, BETWEEN, VALUE, END = 0, 1, 2, 7


@dataclass(frozen=True, slots=True)
class Question:
    """text: what the user asks. answer: token ids without the end token. canvas: tokens to generate.

    key: the word that is looked up, numbered from 1 over KEYS, or 0. items, slots: for each answer token, the number of
    the listed item it belongs to (-1 where nothing is listed) and its part of it.
    """

    task: str
    text: str
    answer: tuple[int, ...]
    canvas: int
    key: int
    items: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def group(self) -> str:
        return "long" if self.is_long else "count" if self.task in COUNT_TASKS else "short"

    @property
    def is_long(self) -> bool:
        return self.task in LONG_TASKS


def canvas_for(answer: int) -> int:
    """The smallest canvas for an answer of that many tokens and its end, but no single-step one.

    By default a server takes half as many steps as tokens: on a canvas of 2 everything would be decided at once, before
    any visual token can be dropped.
    """
    return next(length for length in CANVAS_LENGTHS if length > max(answer, 2))


def steps_for(canvas: int) -> int:
    """One token a step up to 16 tokens, two on longer canvases, as in LLaDA-V's published evaluations."""
    return canvas if canvas <= 16 else canvas // 2


def _color(item: Item) -> str:
    return COLORS[item.color - 1]


def _shape(item: Item) -> str:
    return SHAPES[item.shape - 1]


def _name(item: Item) -> str:
    return NAMES[item.name - 1]


def _unique(items: list[Item], key: Callable[[Item], object]) -> list[Item]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def questions(scene: Scene) -> list[Question]:
    """Every question the scene answers."""
    asked: list[Question] = []

    def ask(task: str, text: str, key: str, answer: tuple[int, ...], first_slot: int = VALUE) -> None:
        slots = tuple(range(first_slot, first_slot + len(answer)))
        number = KEYS.index(key) + 1 if key else 0
        asked.append(Question(task, text, answer, canvas_for(len(answer)), number, (-1,) * len(answer), slots))

    def ask_list(task: str, text: str, items: list[tuple[str, str, str]]) -> None:
        """items: key, sign between, value."""
        answer: list[int] = []
        numbers: list[int] = []
        slots: list[int] = []
        for number, (key, between, value) in enumerate(items):
            tokens = encode(value)
            answer += [single(f" {key}"), *encode(between), *tokens]
            slots += [KEY, *[BETWEEN] * len(between), *range(VALUE, VALUE + len(tokens))]
            numbers += [number] * (len(answer) - len(numbers))
        canvas = canvas_for(len(answer))
        asked.append(Question(task, text, tuple(answer), canvas, 0, tuple(numbers), tuple(slots)))

    boxes, shapes, signs, fields = scene.of("box"), scene.of("shape"), scene.of("sign"), scene.of("field")
    for item in _unique(boxes, lambda item: item.color):
        color = _color(item)
        ask("digit_of_color", f"Which digit is in the {color} box?", color, encode(item.text))
    for item in _unique(boxes, lambda item: item.text):
        text = f"What color is the box with the digit {item.text}?"
        ask("color_of_digit", text, item.text, (single(f" {_color(item)}"),), KEY)
    if boxes:
        ask("count_boxes", "How many boxes are there?", "", encode(str(len(boxes))))
        ask_list("list_boxes", "List all boxes row by row.", [(_color(item), ":", item.text) for item in boxes])
    for item in _unique(shapes, lambda item: item.shape):
        shape = _shape(item)
        ask("color_of_shape", f"What color is the {shape}?", shape, (single(f" {_color(item)}"),), KEY)
    for item in _unique(shapes, lambda item: item.color):
        color = _color(item)
        ask("shape_of_color", f"Which shape is {color}?", color, (single(f" {_shape(item)}"),))
    if shapes:
        for shape, count in Counter(_shape(item) for item in shapes).items():
            ask("count_shape", f"How many {_plural(shape)} are there?", shape, encode(str(count)))
        ask_list(
            "list_shapes", "List all shapes row by row.", [(_color(item), "", f" {_shape(item)}") for item in shapes]
        )
    for item in fields:
        ask("field_value", f"What is the {_name(item)}?", _name(item), encode(item.text))
    if fields:
        ask_list("transcribe_form", "Transcribe the form.", [(_name(item), ":", item.text) for item in fields])
    for item in signs:
        ask("sign_code", f"Read the {_color(item)} sign.", _color(item), encode(item.text))
    if signs:
        items = [(_color(item), ":", item.text) for item in signs]
        ask_list("transcribe_signs", "Transcribe all signs row by row.", items)
    return asked


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def choose(asked: list[Question], share_long: float, share_count: float, rng: np.random.Generator) -> list[Question]:
    """All questions in random order, long and counting ones brought forward with the given probabilities."""
    order = rng.random(len(asked))
    for i, question in enumerate(asked):
        if question.is_long:
            order[i] = -rng.random() if rng.random() < share_long else 2.0
        elif question.task in COUNT_TASKS:
            order[i] = -rng.random() if rng.random() < share_count else 1.5
    return [asked[int(i)] for i in np.argsort(order) if order[i] < 1.2]
