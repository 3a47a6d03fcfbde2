"""Batches: pictures cut into tiles, and token sequences in which many questions share one picture.

A sequence is `[prompt head][visual tokens][question 1][canvas 1][question 2][canvas 2]...`. Every question's positions
follow the picture's directly, and it sees the picture and itself only; the picture sees itself and the first question,
which so stands exactly as it will be served. The others cost a twentieth of a sequence each.

A batch depends on (seed, phase, step) alone, so a resumed training sees what an uninterrupted one would have.
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
from training.model import HINTS
from training.pictures import IGNORE, PATCHES, VisualTokens, by_tile, picture_patches, visual_tokens
from training.plan import Phase
from training.scenes import ATTRIBUTES, SceneMaker, dense_scene, labels, render
from training.tasks import CANVAS_LENGTHS, END, KEY, TASKS, VALUE, Question, choose, questions
from training.vocab import COLORS, GLYPHS, NAMES, SHAPES, single, special_id, tokenizer

TEXT, PAD = -1, -1


@dataclass
class TowerBatch:
    """patches: [tiles, 16, 768] bytes. labels: [tiles, 16, attributes] label numbers, IGNORE where none is asked."""

    patches: Tensor
    labels: Tensor


@dataclass
class LanguageBatch:
    """Sequences padded to one length.

    patches: [tiles, 16, 768] bytes, of all pictures. source: index of a visual token into the tiles' patches,
    `16 * tiles` for a newline token, TEXT for text. group: 0 head and picture, n the n-th question, PAD. target: the
    answer's token at masked places, else IGNORE. task: its number in TASKS. weight: of its loss. hints: see
    `model.HINTS`. All but the patches are [batch, tokens], hints [batch, tokens, hints].
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
    """Crowded pictures, every fourth one a sparse scene. Base tiles are taught to show nothing."""
    patches, shown = [], []
    maker = SceneMaker(split, items=(6, 14), lines=(4, 8))
    for i in range(phase.batch):
        sparse = i % 4 == 3
        scene = maker.make((*seed, i)) if sparse else dense_scene((*seed, i), split)
        cut = picture_patches(render(scene))
        tiles = by_tile(labels(scene))
        if sparse:
            patches.append(cut)
            shown.append(np.concatenate((np.zeros((1, PATCHES, len(ATTRIBUTES)), dtype=np.int64), tiles)))
        else:
            patches.append(cut[1:])
            shown.append(tiles)
    return TowerBatch(torch.from_numpy(np.concatenate(patches)), torch.from_numpy(np.concatenate(shown)))


@cache
def prompt_pieces(question: str, system: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the picture, as the engine splits them."""
    text = chat_prompt(tokenizer(), question, 1, system=system)
    before, after = split_prompt(tokenizer(), text, 1)
    return tuple(before), tuple(after)


def canvas_ids(question: Question) -> NDArray[np.int64]:
    """The finished canvas: the answer, then end tokens."""
    canvas = np.full(question.canvas, special_id(EOT), dtype=np.int64)
    canvas[: len(question.answer)] = question.answer
    return canvas


def _hidden_places(question: Question, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which canvas places are masked: everything (the first step), a random share, or all after a decided start."""
    kind = rng.random()
    if kind < 0.35:
        return np.ones(question.canvas, dtype=bool)
    hidden: NDArray[np.bool_] = rng.random(question.canvas) < rng.random()
    if kind > 0.55 and question.is_long:
        hidden = np.arange(question.canvas) >= rng.integers(0, len(question.answer))
        hidden &= rng.random(question.canvas) < 0.9
        if rng.random() < 0.5:
            # End tokens at the far end are often decided early.
            hidden[int(rng.integers(len(question.answer), question.canvas + 1)) :] = False
    if not hidden.any():
        hidden[int(rng.integers(0, len(question.answer) + 1))] = True
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
    """Token ids of keys and of values to their hint classes, see `_key_and_value`."""
    keys = {single(f" {word}"): i + 1 for i, word in enumerate((*COLORS, *NAMES))}
    values = {single(glyph): i + 1 for i, glyph in enumerate(GLYPHS)}
    values |= {single(f" {shape}"): len(GLYPHS) + i + 1 for i, shape in enumerate(SHAPES)}
    return keys, values


def _canvas_hints(question: Question, hidden: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[canvas, hints] for the hidden places of the answer and for its end."""
    hints = np.full((question.canvas, len(HINTS)), IGNORE)
    length = len(question.answer)
    hints[: length + 1, 4] = question.key
    items = np.array(question.items)
    hints[:length, 5] = np.where(items < 0, IGNORE, np.minimum(items, HINTS["item"] - 1))
    hints[:length, 6] = np.minimum(question.slots, END - 1)
    hints[length, 6] = END
    for column, slot, classes in zip((7, 8), (KEY, VALUE), _answer_classes(), strict=True):
        before = 0
        for place, (token, item, part) in enumerate(zip(question.answer, question.items, question.slots, strict=True)):
            if item < 0:
                break
            if part == slot:
                hints[:length][items == item, column] = before
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


def _kept(visual: VisualTokens, phase: Phase, rng: np.random.Generator) -> NDArray[np.bool_]:
    """What of a picture a training sequence shows: all its items, and so much of the empty rest.

    Short sequences train several times faster, and the model learns that positions shift, as they do when a server
    drops visual tokens. Empty tokens are taken from few tiles, so that the tower need not look at the others.
    """
    if rng.random() < phase.whole:
        return np.ones(len(visual.source), dtype=bool)
    occupied = set(visual.tile[visual.shown].tolist())
    spare = [tile for tile in range(visual.tile.max() + 1) if tile not in occupied]
    for tile in rng.permutation(spare)[: int(rng.integers(0, 3))] if spare else ():
        occupied.add(int(tile))
    share = rng.uniform(*phase.background)
    keep: NDArray[np.bool_] = np.isin(visual.tile, list(occupied)) & (rng.random(len(visual.tile)) < share)
    keep |= (visual.tile < 0) & (rng.random(len(visual.tile)) < rng.random())
    # The prompt's head and one long question must find room behind the picture.
    spare_tokens = np.flatnonzero(keep & ~visual.shown)
    surplus = int((keep | visual.shown).sum()) - (phase.tokens - 112)
    if surplus > 0:
        keep[rng.permutation(spare_tokens)[:surplus]] = False
    return keep | visual.shown


def language_batch(phase: Phase, seed: tuple[int, ...], split: Split) -> LanguageBatch:
    rng = np.random.default_rng((*seed, 7))
    maker = SceneMaker(split, items=phase.items, lines=phase.lines, mixed=phase.mixed, weights=phase.kinds)
    patches: list[NDArray[np.uint8]] = []
    sequences: list[_Sequence] = []
    tiles = 0
    for i in range(phase.batch):
        scene = maker.make((*seed, i))
        cut = picture_patches(render(scene))
        visual = visual_tokens(scene)
        keep = _kept(visual, phase, rng)
        source, used = visual.source[keep], np.zeros(len(cut), dtype=bool)
        used[source[source >= 0] // PATCHES] = True
        # -2: newline, until the number of tiles of the whole batch is known.
        renumbered = (tiles + np.cumsum(used) - 1)[source // PATCHES] * PATCHES + source % PATCHES
        source = np.where(source < 0, -2, renumbered)
        patches.append(cut[used])
        tiles += int(used.sum())

        sequence = _Sequence()
        head, _ = prompt_pieces("", bool(rng.random() < phase.system))
        sequence.add(head, 0, 0)
        placeholders = np.full(len(source), special_id(PLACEHOLDER))
        sequence.add(placeholders, 0, len(head), source=source, hints=visual.hints[keep])
        start = sequence.length
        group = 0
        asked = questions(scene)
        # What room is left is filled with the same questions, hidden otherwise.
        again = choose(asked, 1.0, 0.0, rng) + choose(asked, 0.5, 0.0, rng)
        for question in choose(asked, phase.long, phase.count, rng) + again:
            question = _other_canvas(question, phase, rng)
            _, tail = prompt_pieces(question.text, True)
            if sequence.length + len(tail) + question.canvas > phase.tokens:
                continue
            group += 1
            hidden = _hidden_places(question, rng)
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
    columns, weights, hints = zip(*(sequence.padded(phase.tokens) for sequence in sequences), strict=True)
    ids, sources, positions, groups, target, task = (
        torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)
    )
    sources[sources == -2] = tiles * PATCHES
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
    chosen = others[min(int(rng.geometric(0.55)) - 1, len(others) - 1)]
    return replace(question, canvas=chosen)


class Batches(Dataset[TowerBatch | LanguageBatch]):
    """The batches of a phase, by number; meant for a DataLoader with workers and no batching of its own."""

    def __init__(self, phase: Phase, phase_index: int, seed: int, split: Split = "train") -> None:
        self.phase = phase
        self.seed = (seed, phase_index, 0 if split == "train" else 1)
        self.split: Split = split

    def __getitem__(self, index: int) -> TowerBatch | LanguageBatch:
        seed, phase = (*self.seed, index), self.phase
        if phase.partial and index % 2:
            phase = replace(phase, batch=phase.partial[0], tokens=phase.partial[1], whole=0.0)
        if self.phase.part == "tower":
            return tower_batch(phase, seed, self.split)
        return language_batch(phase, seed, self.split)
