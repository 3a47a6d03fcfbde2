"""Batches: pictures cut into tiles, and token sequences in which many questions share one picture.

A sequence is `[prompt head][visual tokens][question 1][canvas 1][question 2][canvas 2]...`. Every question's positions
follow the picture's directly, and it sees the picture and itself only; the picture sees itself and the first question,
which so stands exactly as it will be served. All visual tokens are always there.

A batch depends on (seed, phase, step, shard) alone, so a resumed training sees what an uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from redvtp.prompt import EOT, MASK, PLACEHOLDER, chat_prompt, split_prompt
from training.glyphs import Split
from training.pictures import picture_patches
from training.v2.draw import render
from training.v2.makers import crowded, make
from training.v2.pictures import COLUMNS, HINTS, IGNORE, PATCHES, by_tile, visual_tokens
from training.v2.plan import Phase
from training.v2.questions import CANVAS_LENGTHS, END, KEY, TASKS, VALUE, Question, questions
from training.v2.vocab import COLORS, GLYPHS, SHAPES, WORDS, single, special_id, tokenizer
from training.v2.world import Sample, base_labels, labels

TEXT, PAD = -1, -1
_NEWLINE = -2


@dataclass
class TowerBatch:
    """patches: [tiles, 16, 768] bytes. labels: [tiles, 16, attributes] label numbers."""

    patches: Tensor
    labels: Tensor


@dataclass
class LanguageBatch:
    """Sequences padded to one length.

    patches: [tiles, 16, 768] bytes, of all pictures. source: index of a visual token into the tiles' patches,
    `16 * tiles` for a newline token, TEXT for text. group: 0 head and picture, n the n-th question, PAD. target: the
    answer's token at masked places, else IGNORE. task: its number in TASKS. weight: of its loss. hints: see
    `pictures.HINTS`. All but the patches are [batch, tokens], hints [batch, tokens, hints].
    """

    patches: Tensor
    ids: Tensor
    source: Tensor
    positions: Tensor
    group: Tensor
    target: Tensor
    task: Tensor
    weight: Tensor
    hints: Tensor


def tower_batch(phase: Phase, seed: tuple[int, ...], split: Split) -> TowerBatch:
    """Crowded pictures without a base tile, and every fourth one a sample of any family, as the model gets it."""
    patches, shown = [], []
    rng = np.random.default_rng((*seed, 8))
    for i in range(phase.batch):
        if i % 4 == 3:
            family = list(phase.families)[int(rng.integers(len(phase.families)))]
            sample = make(family, 2, (*seed, i), split)
            for scene in sample.scenes:
                cut, tiles = picture_patches(render(scene)), by_tile(labels(scene))
                alone = len(sample.scenes) == 1
                patches.append(cut if alone else cut[1:])
                shown.append(np.concatenate((base_labels(scene)[None], tiles)) if alone else tiles)
        else:
            scene = crowded((*seed, i), split)
            patches.append(picture_patches(render(scene))[1:])
            shown.append(by_tile(labels(scene)))
    return TowerBatch(torch.from_numpy(np.concatenate(patches)), torch.from_numpy(np.concatenate(shown)))


@cache
def prompt_pieces(question: str, images: int, system: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the pictures, as the engine splits them. Nothing stands between two pictures."""
    text = chat_prompt(tokenizer(), question, images, system=system)
    before, *between, after = split_prompt(tokenizer(), text, images)
    assert not any(between)
    return tuple(before), tuple(after)


def canvas_ids(question: Question) -> NDArray[np.int64]:
    """The finished canvas: the answer, then end tokens."""
    canvas = np.full(question.canvas, special_id(EOT), dtype=np.int64)
    canvas[: len(question.answer)] = question.answer
    return canvas


def hidden_places(question: Question, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which canvas places are masked: everything (the first step), a random share, or all after a decided start."""
    length = len(question.answer)
    kind = rng.random()
    if kind < 0.3:
        return np.ones(question.canvas, dtype=bool)
    hidden: NDArray[np.bool_] = rng.random(question.canvas) < rng.random()
    if kind > 0.5 and length > 4:
        hidden = np.arange(question.canvas) >= rng.integers(0, length)
        hidden &= rng.random(question.canvas) < (1.0 if kind > 0.8 else 0.9)
        if rng.random() < 0.4:
            # End tokens at the far end are often decided early.
            hidden[int(rng.integers(length, question.canvas + 1)) :] = False
    if not hidden.any():
        hidden[int(rng.integers(0, length + 1))] = True
    return hidden


def _canvas_weights(question: Question, hidden: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Long answers count for more than short ones, but not in proportion; the end tokens after the first for little."""
    weights = np.full(question.canvas, 0.08, dtype=np.float32)
    weights[: len(question.answer)] = 1.0
    weights[len(question.answer)] = 0.5
    weights *= hidden
    weights /= max(1.0, float(weights.sum())) ** 0.5
    return weights


@cache
def _answer_classes() -> tuple[dict[int, int], dict[int, int]]:
    """Token ids of keys and of values to the classes of the hints "previous_key" and "previous_value"."""
    keys = {single(f" {word}"): i + 1 for i, word in enumerate((*COLORS, *WORDS))}
    keys |= {single(word): len(COLORS) + i + 1 for i, word in enumerate(WORDS)}
    values = {single(glyph): i + 1 for i, glyph in enumerate(GLYPHS)}
    values |= {single(f" {shape}"): len(GLYPHS) + i + 1 for i, shape in enumerate(SHAPES)}
    return keys, values


def _canvas_hints(question: Question, hidden: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[canvas, hints] for the hidden places of the answer and for its end."""
    hints = np.full((question.canvas, len(HINTS)), IGNORE)
    length = len(question.answer)
    hints[: length + 1, COLUMNS["key"]] = question.key
    items = np.array(question.items)
    hints[:length, COLUMNS["item"]] = np.where(items < 0, IGNORE, np.minimum(items, HINTS["item"] - 1))
    hints[:length, COLUMNS["slot"]] = np.minimum(question.slots, END - 1)
    hints[length, COLUMNS["slot"]] = END
    for name, slot, classes in zip(("previous_key", "previous_value"), (KEY, VALUE), _answer_classes(), strict=True):
        before = 0
        for place, (token, item, part) in enumerate(zip(question.answer, question.items, question.slots, strict=True)):
            if item < 0:
                break
            if part == slot:
                hints[:length][items == item, COLUMNS[name]] = before
                before = IGNORE if hidden[place] else classes[token]
    hints[~hidden] = IGNORE
    return hints


class _Sequence:
    """One sequence under construction."""

    def __init__(self) -> None:
        self.parts: list[tuple[NDArray[np.int64], ...]] = []
        self.weights: list[NDArray[np.float32]] = []
        self.hints: list[NDArray[np.int64]] = []
        self.length = 0

    def add(
        self,
        ids: Sequence[int] | NDArray[np.int64],
        group: int,
        start: int,
        *,
        source: NDArray[np.int64] | None = None,
        target: NDArray[np.int64] | None = None,
        task: int = IGNORE,
        hints: NDArray[np.int64] | None = None,
        weight: NDArray[np.float32] | None = None,
    ) -> None:
        """Tokens at positions `start`, `start` + 1, ..."""
        count = len(ids)

        def or_all(values: NDArray[np.int64] | None, default: int) -> NDArray[np.int64]:
            return values if values is not None else np.full(count, default, dtype=np.int64)

        self.parts.append(
            (
                np.asarray(ids, dtype=np.int64),
                or_all(source, TEXT),
                np.arange(start, start + count),
                np.full(count, group, dtype=np.int64),
                or_all(target, IGNORE),
                np.full(count, task, dtype=np.int64),
            )
        )
        self.hints.append(hints if hints is not None else np.full((count, len(HINTS)), IGNORE))
        self.weights.append(weight if weight is not None else np.zeros(count, dtype=np.float32))
        self.length += count

    def padded(self, tokens: int) -> tuple[list[NDArray[np.int64]], NDArray[np.float32], NDArray[np.int64]]:
        rest = tokens - self.length
        fill = (special_id(PLACEHOLDER), TEXT, 0, PAD, IGNORE, IGNORE)
        columns = [
            np.concatenate([*column, np.full(rest, value, dtype=np.int64)])
            for column, value in zip(zip(*self.parts, strict=True), fill, strict=True)
        ]
        weights = np.concatenate([*self.weights, np.zeros(rest, dtype=np.float32)])
        return columns, weights, np.concatenate([*self.hints, np.full((rest, len(HINTS)), IGNORE)])


def ordered(asked: list[Question], phase: Phase, rng: np.random.Generator) -> list[Question]:
    """All questions in random order, then all again; listing and counting ones brought forward at the phase's rates."""

    def rank(question: Question) -> float:
        if question.lists:
            return -float(rng.random()) if rng.random() < phase.long else 0.3 + float(rng.random())
        if question.group == "count":
            return -float(rng.random()) if rng.random() < phase.count else 0.2 + float(rng.random())
        return float(rng.random())

    once = sorted(asked, key=rank)
    # The same questions again, hidden otherwise, fill what room is left.
    return (
        once + [once[int(i)] for i in rng.permutation(len(once))] + [once[int(i)] for i in rng.permutation(len(once))]
    )


def pick_sample(phase: Phase, seed: tuple[int, ...], split: Split) -> Sample:
    rng = np.random.default_rng((*seed, 9))
    shares = np.array(list(phase.families.values()))
    family = list(phase.families)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    level = int(rng.choice(3, p=np.array(phase.levels) / sum(phase.levels)))
    return make(family, level, seed, split)


def language_batch(phase: Phase, seed: tuple[int, ...], split: Split) -> LanguageBatch:
    rng = np.random.default_rng((*seed, 7))
    patches: list[NDArray[np.uint8]] = []
    sequences: list[_Sequence] = []
    tiles = 0
    for i in range(phase.batch):
        sample = pick_sample(phase, (*seed, i), split)
        visual = visual_tokens(sample)
        images = len(sample.scenes)
        source = np.where(visual.source < 0, _NEWLINE, visual.source + tiles * PATCHES)
        patches.append(visual.patches)
        tiles += len(visual.patches)

        sequence = _Sequence()
        system = bool(rng.random() < phase.system)
        head, _ = prompt_pieces("", images, system)
        sequence.add(head, 0, 0)
        sequence.add(np.full(len(source), special_id(PLACEHOLDER)), 0, len(head), source=source, hints=visual.hints)
        start = sequence.length
        group = 0
        for question in ordered(questions(sample), phase, rng):
            question = _other_canvas(question, phase, rng)
            _, tail = prompt_pieces(question.text, images, system)
            if group and sequence.length + len(tail) + question.canvas > phase.tokens:
                continue
            group += 1
            hidden = hidden_places(question, rng)
            canvas = canvas_ids(question)
            sequence.add(tail, group, start)
            sequence.add(
                np.where(hidden, special_id(MASK), canvas),
                group,
                start + len(tail),
                target=np.where(hidden, canvas, IGNORE),
                task=TASKS.index(question.task),
                weight=_canvas_weights(question, hidden),
                hints=_canvas_hints(question, hidden),
            )
        sequences.append(sequence)
    return _stacked(sequences, patches, tiles)


def _stacked(sequences: list[_Sequence], patches: list[NDArray[np.uint8]], tiles: int) -> LanguageBatch:
    longest = max(sequence.length for sequence in sequences)
    columns, weights, hints = zip(*(sequence.padded(longest) for sequence in sequences), strict=True)
    ids, sources, positions, groups, target, task = (
        torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)
    )
    sources[sources == _NEWLINE] = tiles * PATCHES
    return LanguageBatch(
        torch.from_numpy(np.concatenate(patches)),
        ids,
        sources,
        positions,
        groups,
        target,
        task,
        torch.from_numpy(np.stack(weights)),
        torch.from_numpy(np.stack(hints)),
    )


def _other_canvas(question: Question, phase: Phase, rng: np.random.Generator) -> Question:
    """Now and then another canvas, mostly a longer one than the answer needs: servers ask for what they like."""
    if rng.random() >= phase.other_canvas:
        return question
    others = [length for length in CANVAS_LENGTHS if length > len(question.answer) and length != question.canvas]
    if not others:
        return question
    # The longest ones seldom: they cost as much as the picture.
    return replace(question, canvas=others[min(int(rng.geometric(0.55)) - 1, len(others) - 1)])


class Batches(Dataset[TowerBatch | LanguageBatch]):
    """The batches of a phase, by number; meant for a DataLoader with workers and no batching of its own."""

    def __init__(self, phase: Phase, phase_index: int, seed: int, split: Split = "train") -> None:
        self.phase = phase
        self.seed = (seed, phase_index, 0 if split == "train" else 1)
        self.split: Split = split

    def __getitem__(self, index: int) -> TowerBatch | LanguageBatch:
        seed = (*self.seed, index)
        if self.phase.part == "tower":
            return tower_batch(self.phase, seed, self.split)
        return language_batch(self.phase, seed, self.split)
