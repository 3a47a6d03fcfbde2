"""Questions about a sample, with their answers as the tokens the model should write.

Only what the pictures determine is asked: a question about "the red box" needs exactly one red box. The canvas is the
smallest of CANVAS_LENGTHS that holds the answer and its end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from training.tasks import CANVAS_LENGTHS, canvas_for, steps_for
from training.v2.vocab import COLORS, DIRECTIONS, GLYPHS, SHAPES, WORDS, encode, single
from training.v2.world import Item, Sample, Scene

__all__ = ["CANVAS_LENGTHS", "steps_for"]

Group = Literal["short", "count", "list", "long", "json", "pair", "clip"]

SHORT_TASKS = (
    *("digit_of_color", "color_of_digit", "color_of_shape", "shape_of_color", "field_value", "sign_code"),
    *("table_entry", "word_after"),
)
COUNT_TASKS = ("count_boxes", "count_shape", "count_color", "count_fields", "count_signs", "count_rows")
# Of one picture; "long" when the answer has LONG tokens, "list" when it has fewer.
LIST_TASKS = (
    *("list_boxes", "list_shapes", "transcribe_form", "transcribe_signs", "transcribe_table", "read_page"),
    "read_line",
)
JSON_TASKS = ("json_form", "json_row")
PAIR_TASKS = ("pair_lookup", "pair_which", "pair_list", "pair_forms")
CLIP_TASKS = ("clip_direction", "clip_last", "clip_after", "clip_colors", "clip_describe")
TASKS = SHORT_TASKS + COUNT_TASKS + LIST_TASKS + JSON_TASKS + PAIR_TASKS + CLIP_TASKS
# Tokens of a long answer, fewest and most.
LONG = (30, 62)

# What a question may look up, and the numbers of these words in the hints.
KEYS = (*COLORS, *GLYPHS, *SHAPES, *WORDS)
# Parts of an item in an answer: its key, the signs between, its characters one by one; then the answer's end.
KEY, BETWEEN, VALUE, END = 0, 1, 2, 15


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
    def group(self) -> Group:
        if self.task in SHORT_TASKS:
            return "short"
        if self.task in COUNT_TASKS:
            return "count"
        if self.task in JSON_TASKS:
            return "json"
        if self.task in PAIR_TASKS:
            return "pair"
        if self.task in CLIP_TASKS:
            return "clip"
        return "long" if len(self.answer) >= LONG[0] else "list"

    @property
    def lists(self) -> bool:
        """Whether the answer is a sequence of items."""
        return self.items[0] >= 0


@dataclass
class _Answer:
    """An answer under construction, item by item."""

    tokens: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def add(
        self, item: int, key: Sequence[int], between: Sequence[int], value: Sequence[int], slot: int = VALUE
    ) -> None:
        parts = [KEY] * len(key) + [BETWEEN] * len(between) + [min(slot + i, END - 1) for i in range(len(value))]
        self.tokens += [*key, *between, *value]
        self.slots += parts
        self.items += [item] * len(parts)


@dataclass
class _Asked:
    """The questions found so far."""

    found: list[Question] = field(default_factory=list)

    def lookup(self, task: str, text: str, key: str, answer: Sequence[int], slot: int = VALUE) -> None:
        number = KEYS.index(key) + 1 if key else 0
        slots = tuple(range(slot, slot + len(answer)))
        self.found.append(
            Question(task, text, tuple(answer), canvas_for(len(answer)), number, (-1,) * len(answer), slots)
        )

    def listing(self, task: str, text: str, answer: _Answer) -> None:
        if 0 < len(answer.tokens) <= LONG[1]:
            canvas = canvas_for(len(answer.tokens))
            parts = (tuple(answer.items), tuple(answer.slots))
            self.found.append(Question(task, text, tuple(answer.tokens), canvas, 0, *parts))

    def pairs(self, task: str, text: str, items: Sequence[tuple[str, str, str]]) -> None:
        """A listing of (key, sign between, value)."""
        answer = _Answer()
        for number, (key, between, value) in enumerate(items):
            answer.add(number, [single(f" {key}")], encode(between), encode(value))
        self.listing(task, text, answer)


def _color(item: Item) -> str:
    return COLORS[item.color - 1]


def _shape(item: Item) -> str:
    return SHAPES[item.shape - 1]


def _name(item: Item) -> str:
    return WORDS[item.name - 1]


def _unique(items: list[Item], key: Callable[[Item], object]) -> list[Item]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def questions(sample: Sample) -> list[Question]:
    """Every question the sample answers."""
    asked = _Asked()
    if sample.family == "clip":
        _about_clip(sample, asked)
    elif sample.family == "pair":
        _about_pair(sample, asked)
    else:
        (scene,) = sample.scenes
        _about_things(scene, asked)
        _about_signs(scene, asked)
        _about_form(scene, asked)
        _about_table(scene, asked)
        _about_page(scene, asked)
    return asked.found


def _about_things(scene: Scene, asked: _Asked) -> None:
    boxes, shapes = scene.of("box"), scene.of("shape")
    _look_up_things(boxes, shapes, "", None, asked)
    if boxes:
        asked.lookup("count_boxes", "How many boxes are there?", "", encode(str(len(boxes))))
        asked.pairs("list_boxes", "List all boxes row by row.", [(_color(item), ":", item.text) for item in boxes])
    for shape, count in Counter(map(_shape, shapes)).items():
        asked.lookup("count_shape", f"How many {_plural(shape)} are there?", shape, encode(str(count)))
    if shapes:
        items = [(_color(item), "", f" {_shape(item)}") for item in shapes]
        asked.pairs("list_shapes", "List all shapes row by row.", items)
    for color, count in Counter(map(_color, [*boxes, *shapes])).items():
        asked.lookup("count_color", f"How many {color} things are there?", color, encode(str(count)))


def _look_up_things(boxes: list[Item], shapes: list[Item], where: str, task: str | None, asked: _Asked) -> None:
    """where: which of several pictures is meant. task: for all of these, instead of their names."""
    for item in _unique(boxes, _color):
        color = _color(item)
        asked.lookup(task or "digit_of_color", f"Which digit is in the {color} box{where}?", color, encode(item.text))
    for item in _unique(boxes, lambda item: item.text):
        text = f"What color is the box with the digit {item.text}{where}?"
        asked.lookup(task or "color_of_digit", text, item.text, [single(f" {_color(item)}")], KEY)
    for item in _unique(shapes, _shape):
        shape = _shape(item)
        text = f"What color is the {shape}{where}?"
        asked.lookup(task or "color_of_shape", text, shape, [single(f" {_color(item)}")], KEY)
    for item in _unique(shapes, _color):
        color = _color(item)
        asked.lookup(task or "shape_of_color", f"Which shape is {color}{where}?", color, [single(f" {_shape(item)}")])


def _about_signs(scene: Scene, asked: _Asked) -> None:
    signs = scene.of("sign")
    for item in signs:
        asked.lookup("sign_code", f"Read the {_color(item)} sign.", _color(item), encode(item.text))
    if signs:
        asked.lookup("count_signs", "How many signs are there?", "", encode(str(len(signs))))
        items = [(_color(item), ":", item.text) for item in signs]
        asked.pairs("transcribe_signs", "Transcribe all signs row by row.", items)


def _about_form(scene: Scene, asked: _Asked) -> None:
    fields = scene.of("field")
    for item in fields:
        asked.lookup("field_value", f"What is the {_name(item)}?", _name(item), encode(item.text))
    if fields:
        asked.lookup("count_fields", "How many lines does the form have?", "", encode(str(len(fields))))
        asked.pairs("transcribe_form", "Transcribe the form.", [(_name(item), ":", item.text) for item in fields])
        asked.listing("json_form", "Give the form as JSON.", _json([(_name(item), item.text) for item in fields]))


def _json(pairs: Sequence[tuple[str, str]]) -> _Answer:
    answer = _Answer()
    for number, (key, value) in enumerate(pairs):
        answer.add(number, [], [single('{"' if number == 0 else ',"')], [])
        answer.add(number, [single(key)], [single('":')], encode(value))
    answer.add(len(pairs) - 1, [], [single("}")], [])
    return answer


def _about_table(scene: Scene, asked: _Asked) -> None:
    heads, sides, entries = scene.of("head"), scene.of("side"), scene.of("entry")
    for item in entries:
        row, column = _name(item), WORDS[item.column - 1]
        asked.lookup("table_entry", f"What is the {column} of {row}?", row, encode(item.text))
    if not entries:
        return
    asked.lookup("count_rows", "How many rows does the table have?", "", encode(str(len(sides))))
    answer = _Answer()
    for side in sides:
        values = ",".join(item.text for item in entries if item.line == side.line)
        answer.add(side.line, [single(f" {_name(side)}")], [single(":")], encode(values))
        pairs = [
            (_name(head), item.text)
            for head in heads
            for item in entries
            if (item.line, item.place) == (side.line, head.place)
        ]
        asked.listing("json_row", f"Give the row {_name(side)} as JSON.", _json(pairs))
    asked.listing("transcribe_table", "Transcribe the table.", answer)


def _about_page(scene: Scene, asked: _Asked) -> None:
    words = scene.of("word")
    for item, following in pairwise(words):
        asked.lookup("word_after", f"Which word follows {_name(item)}?", _name(item), [single(f" {_name(following)}")])
    if not words:
        return
    asked.listing("read_page", "Read the page.", _words(words))
    for line in range(words[-1].line + 1):
        text = f"Read line {line + 1} of the page."
        asked.listing("read_line", text, _words([item for item in words if item.line == line]))


def _words(words: list[Item]) -> _Answer:
    answer = _Answer()
    for number, item in enumerate(words):
        answer.add(number, [single(f" {_name(item)}")], [], [])
    return answer


def _about_pair(sample: Sample, asked: _Asked) -> None:
    for scene, ordinal in zip(sample.scenes, ("first", "second"), strict=True):
        boxes, shapes, fields, words = scene.of("box"), scene.of("shape"), scene.of("field"), scene.of("word")
        _look_up_things(boxes, shapes, f" in the {ordinal} picture", "pair_lookup", asked)
        for item in fields:
            text = f"What is the {_name(item)} in the {ordinal} picture?"
            asked.lookup("pair_lookup", text, _name(item), encode(item.text))
        if words:
            asked.listing("pair_list", f"Read the page in the {ordinal} picture.", _words(words))
        if fields:
            answer = [(_name(item), ":", item.text) for item in fields]
            asked.pairs("pair_list", f"Transcribe the form in the {ordinal} picture.", answer)
        others = {shape for other in sample.scenes if other is not scene for shape in map(_shape, other.of("shape"))}
        for shape in dict.fromkeys(map(_shape, shapes)):
            if shape not in others:
                asked.lookup("pair_which", f"Which picture has the {shape}?", shape, [single(f" {ordinal}")])
    fields = [item for scene in sample.scenes for item in scene.of("field")]
    if fields:
        answer = [(_name(item), ":", item.text) for item in fields]
        asked.pairs("pair_forms", "Transcribe both forms.", answer)


def _about_clip(sample: Sample, asked: _Asked) -> None:
    boxes = [scene.of("box")[0] for scene in sample.scenes]
    if sample.motion >= 0:
        answer = [single(f" {DIRECTIONS[sample.motion]}")]
        asked.lookup("clip_direction", "Which way does the box move?", "", answer)
        return
    colors = [_color(item) for item in boxes]
    for before, after in pairwise(colors):
        asked.lookup("clip_after", f"Which color comes after {before}?", before, [single(f" {after}")])
    asked.lookup("clip_last", "What color is the box in the last picture?", "", [single(f" {colors[-1]}")])
    asked.pairs("clip_colors", "List the colors in order.", [(color, "", "") for color in colors])
    asked.pairs("clip_describe", "Describe the clip.", [(_color(item), ":", item.text) for item in boxes])
