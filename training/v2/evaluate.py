"""Held-out exact match of the training model, decoded the way it will be served (dense).

python -m training.v2.evaluate --folder training/runs/small --per-task 40
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redvtp.prompt import BOS, END_HEADER, EOS, EOT, MASK, START_HEADER
from training.model import Shape
from training.v2.batches import prompt_pieces
from training.v2.makers import make
from training.v2.model import SmallDvlm
from training.v2.pictures import normalised, visual_tokens
from training.v2.questions import LIST_TASKS, LONG, TASKS, Question, questions, steps_for
from training.v2.vocab import special_id
from training.v2.world import Family, Sample

EVALUATION_SEED = 90_002
# The engine's default.
BLOCK_LENGTH = 32
_FAMILIES: tuple[Family, ...] = ("objects", "form", "table", "page", "signs", "pair", "clip")


def _wanted(question: Question) -> bool:
    """Listings count with long answers only; reading one line and version 1's sparse lists stay short."""
    return question.task not in LIST_TASKS or question.task == "read_line" or len(question.answer) >= LONG[0]


def held_out(per_task: int, seed: int = EVALUATION_SEED, level: int = 2) -> list[tuple[Sample, Question]]:
    """`per_task` questions of each task, at most one of a task per sample, from test digits, strings and layouts."""
    picked: list[tuple[Sample, Question]] = []
    counts: dict[str, int] = defaultdict(int)
    for i in range(60 * per_task):
        if all(counts[task] >= per_task for task in TASKS):
            break
        sample = make(_FAMILIES[i % len(_FAMILIES)], level, (seed, i), "test")
        rng = np.random.default_rng((seed, i, 5))
        asked = [question for question in questions(sample) if _wanted(question)]
        for task in TASKS:
            fitting = [question for question in asked if question.task == task]
            if fitting and counts[task] < per_task:
                counts[task] += 1
                picked.append((sample, fitting[int(rng.integers(len(fitting)))]))
    return picked


@torch.inference_mode()
def prompt_embeddings(model: SmallDvlm, sample: Sample, question: Question) -> Tensor:
    """[prompt, hidden], every visual token in place, the default system turn included."""
    shown = visual_tokens(sample)
    features = model.encode_tiles(normalised(torch.from_numpy(shown.patches))).flatten(0, 1)
    source = torch.from_numpy(shown.source)
    table = torch.cat((features, model.image_newline[None]))
    visual = table[torch.where(source < 0, torch.tensor(len(features)), source)]
    before, after = (
        model.language_model.embed_tokens(torch.tensor(ids))
        for ids in prompt_pieces(question.text, len(sample.scenes), True)
    )
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
        logits[:, [special_id(text) for text in (BOS, EOS, START_HEADER, END_HEADER)]] = float("-inf")
        confidence, tokens = logits.double().softmax(-1).max(-1)
        chosen = confidence.topk(min(self.counts.pop(0)[1], len(rows))).indices
        self.tokens[rows[chosen]] = tokens[chosen]

    def answer(self) -> list[int]:
        tokens: list[int] = self.tokens.tolist()
        return tokens[: tokens.index(special_id(EOT))] if special_id(EOT) in tokens else tokens


@torch.inference_mode()
def decode(model: SmallDvlm, prompts: list[Tensor], canvases: list[int]) -> list[list[int]]:
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
        last, _ = model(hidden, torch.arange(longest).expand(len(alive), -1), mask)
        for row, i in enumerate(alive):
            rows = states[i].candidates()
            states[i].commit(rows, model.logits(last[row, prompts[i].shape[0] + rows]))
    return [state.answer() for state in states]


def evaluate(
    model: SmallDvlm, examples: list[tuple[Sample, Question]], at_once: int = 8
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match per task and per group."""
    right: dict[str, list[bool]] = defaultdict(list)
    groups: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(examples, key=lambda example: (example[1].canvas, len(example[1].text)))
    for start in range(0, len(ordered), at_once):
        part = ordered[start : start + at_once]
        prompts = [prompt_embeddings(model, sample, question) for sample, question in part]
        answers = decode(model, prompts, [question.canvas for _, question in part])
        for (_, question), answer in zip(part, answers, strict=True):
            right[question.task].append(tuple(answer) == question.answer)
            groups[question.group].append(tuple(answer) == question.answer)
    tasks = {task: round(float(np.mean(right[task])), 4) for task in TASKS if right[task]}
    return tasks, {group: round(float(np.mean(values)), 4) for group, values in groups.items()}


def load_average(folder: Path) -> SmallDvlm:
    """The model of a training's folder with its averaged weights."""
    state = torch.load(folder / "state.pt", weights_only=True)
    model = SmallDvlm(Shape(**state["shape"]))
    model.load_state_dict({**state["model"], **state["average"]})
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/small"), help="the training's folder")
    parser.add_argument("--per-task", type=int, default=20)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--level", type=int, default=2, choices=(0, 1, 2), help="how much the pictures hold")
    args = parser.parse_args()
    tasks, groups = evaluate(load_average(args.folder), held_out(args.per_task, args.seed, args.level))
    print(json.dumps({"tasks": tasks, "groups": groups}, indent=2))


if __name__ == "__main__":
    main()
