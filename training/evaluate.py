"""Held-out exact match of the training model, decoded the way it will be served (dense)."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from redvtp.prompt import BOS, END_HEADER, EOS, EOT, MASK, START_HEADER
from training.dataset import prompt_pieces
from training.model import TinyDvlm
from training.pictures import normalised, picture_patches, visual_tokens
from training.plan import PLAN, Phase
from training.scenes import Scene, SceneMaker, render
from training.tasks import TASKS, Question, questions, steps_for
from training.vocab import special_id

EVALUATION_SEED = 90_001
# The engine's default.
BLOCK_LENGTH = 32


def held_out(phase: Phase, per_task: int, seed: int = EVALUATION_SEED) -> list[tuple[Scene, Question]]:
    """`per_task` questions of each task, at most one of a task per picture, from test digits, strings and layouts."""
    maker = SceneMaker("test", items=phase.items, lines=phase.lines, mixed=phase.mixed, weights=phase.kinds)
    picked: list[tuple[Scene, Question]] = []
    counts: dict[str, int] = defaultdict(int)
    for i in range(60 * per_task):
        if all(counts[task] >= per_task for task in TASKS):
            break
        scene = maker.make((seed, i))
        rng = np.random.default_rng((seed, i, 5))
        asked = questions(scene)
        for task in TASKS:
            fitting = [question for question in asked if question.task == task]
            if fitting and counts[task] < per_task:
                counts[task] += 1
                picked.append((scene, fitting[int(rng.integers(len(fitting)))]))
    return picked


@torch.inference_mode()
def prompt_embeddings(model: TinyDvlm, scene: Scene, question: Question) -> Tensor:
    """[prompt, hidden], every visual token in place, the default system turn included."""
    features = model.encode_tiles(normalised(torch.from_numpy(picture_patches(render(scene))))).flatten(0, 1)
    source = torch.from_numpy(visual_tokens(scene).source)
    table = torch.cat((features, model.image_newline[None]))
    visual = table[torch.where(source < 0, torch.tensor(len(features)), source)]
    before, after = (model.language_model.embed_tokens(torch.tensor(ids)) for ids in prompt_pieces(question.text, True))
    return torch.cat((before, visual, after))


class _Canvas:
    """One answer being decided, by the reference's rules in their plainest form."""

    def __init__(self, length: int) -> None:
        self.tokens = torch.full((length,), special_id(MASK))
        self.counts: list[tuple[int, int]] = []
        bounds = range(0, length, BLOCK_LENGTH)
        steps = max(len(bounds), steps_for(length))
        for number, start in enumerate(bounds):
            size = min(BLOCK_LENGTH, length - start)
            share = min(size, steps // len(bounds) + (number < steps % len(bounds)))
            self.counts += [(start + size, size // share + (step < size % share)) for step in range(share)]

    def candidates(self) -> Tensor:
        """Masked places before the end of the active block, and before the first end token."""
        while self.counts:
            rows = (self.tokens[: min(self.counts[0][0], len(self.answer()))] == special_id(MASK)).nonzero()[:, 0]
            if len(rows):
                return rows
            self.counts.pop(0)
        return torch.empty(0, dtype=torch.int64)

    def commit(self, rows: Tensor, logits: Tensor) -> None:
        logits[:, _suppressed()] = float("-inf")
        confidence, tokens = logits.double().softmax(-1).max(-1)
        chosen = confidence.topk(min(self.counts.pop(0)[1], len(rows))).indices
        self.tokens[rows[chosen]] = tokens[chosen]

    def answer(self) -> list[int]:
        tokens: list[int] = self.tokens.tolist()
        return tokens[: tokens.index(special_id(EOT))] if special_id(EOT) in tokens else tokens


def _suppressed() -> list[int]:
    return [special_id(text) for text in (BOS, EOS, START_HEADER, END_HEADER)]


@torch.inference_mode()
def decode(model: TinyDvlm, prompts: list[Tensor], canvases: list[int]) -> list[list[int]]:
    """The reference's loop, in `steps_for` steps; answers are cut at the end token."""
    states = [_Canvas(length) for length in canvases]
    while alive := [i for i, state in enumerate(states) if len(state.candidates())]:
        lengths = [prompts[i].shape[0] + canvases[i] for i in alive]
        longest = max(lengths)
        hidden = torch.zeros(len(alive), longest, prompts[0].shape[1])
        mask = torch.zeros(len(alive), 1, longest, longest)
        for row, i in enumerate(alive):
            start = prompts[i].shape[0]
            hidden[row, :start] = prompts[i]
            hidden[row, start : lengths[row]] = model.language_model.embed_tokens(states[i].tokens)
            mask[row, :, :, lengths[row] :] = float("-inf")
        last, _, _ = model(hidden, torch.arange(longest).expand(len(alive), -1), mask)
        for row, i in enumerate(alive):
            rows = states[i].candidates()
            states[i].commit(rows, model.logits(last[row, prompts[i].shape[0] + rows]))
    return [state.answer() for state in states]


def evaluate(model: TinyDvlm, examples: list[tuple[Scene, Question]], at_once: int = 8) -> dict[str, float]:
    """Exact match per task."""
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(examples, key=lambda example: (example[1].canvas, example[0].cols * example[0].rows))
    for start in range(0, len(ordered), at_once):
        part = ordered[start : start + at_once]
        prompts = [prompt_embeddings(model, scene, question) for scene, question in part]
        answers = decode(model, prompts, [question.canvas for _, question in part])
        for (_, question), answer in zip(part, answers, strict=True):
            right[question.task].append(tuple(answer) == question.answer)
    return {task: round(float(np.mean(right[task])), 4) for task in TASKS if right[task]}


def evaluate_short(model: TinyDvlm, phase: Phase = PLAN[-1], per_task: int = 16) -> dict[str, float]:
    """A quick look during training, on pictures as hard as the phase's."""
    model.eval()
    return evaluate(model, held_out(phase, per_task))
