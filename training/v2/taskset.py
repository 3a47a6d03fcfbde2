"""Held-out questions as files: JPEG pictures and one JSON line per question, for any evaluation that reads such.

    python -m training.v2.taskset --to examples/small_dvlm/tasks --per-task 30

Each line of `tasks.jsonl` has id, task, group, image (file names beside it; several for two pictures and for clips),
question, answer, gen_length and steps. The pictures hold handwriting, codes, values and layouts that no training
picture has. Another --seed gives other questions, never the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from training.v2.draw import render
from training.v2.evaluate import EVALUATION_SEED, held_out
from training.v2.questions import TASKS, Question, steps_for
from training.v2.vocab import tokenizer
from training.v2.world import Sample

# A fifth of the size of PNGs, whose bytes would nearly all be the paper's grain. Colors at full resolution.
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


def image_names(number: int, sample: Sample) -> list[str]:
    """One name per picture; numbered when there are several."""
    if len(sample.scenes) == 1:
        return [f"{number:05d}.jpg"]
    return [f"{number:05d}-{picture + 1}.jpg" for picture in range(len(sample.scenes))]


def task_line(number: int, question: Question, images: list[str]) -> dict[str, object]:
    return {
        "id": number,
        "task": question.task,
        "group": question.group,
        "image": images[0] if len(images) == 1 else images,
        "question": question.text,
        "answer": tokenizer().decode(list(question.answer)),
        "gen_length": question.canvas,
        "steps": steps_for(question.canvas),
    }


def write_tasks(target: Path, per_task: int, seed: int, tasks: tuple[str, ...] = TASKS) -> int:
    """Returns the number of questions written."""
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    names: dict[Sample, list[str]] = {}
    picked = [(sample, question) for sample, question in held_out(per_task, seed) if question.task in tasks]
    for number, (sample, question) in enumerate(tqdm(picked, desc="pictures", unit="question")):
        if sample not in names:
            names[sample] = image_names(len(names), sample)
            for scene, name in zip(sample.scenes, names[sample], strict=True):
                Image.fromarray(render(scene)).save(target / name, **JPEG)
        lines.append(json.dumps(task_line(number, question, names[sample])))
    (target / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--per-task", type=int, default=30)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--tasks", default=",".join(TASKS), help="which, with commas between them")
    args = parser.parse_args()
    tasks = tuple(args.tasks.split(","))
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown tasks: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    print(f"{write_tasks(args.to, args.per_task, args.seed, tasks):,} questions in {args.to}")


if __name__ == "__main__":
    main()
