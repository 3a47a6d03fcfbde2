"""Held-out questions as files: JPEG pictures and one JSON line per question, for any evaluation that reads such.

    python -m training.taskset --to examples/tiny_dvlm/tasks --per-task 100

Each line of `tasks.jsonl` has id, task, group ("short", "count" or "long"), image (file name beside it), question,
answer, gen_length and steps. The pictures hold handwriting, codes, values and layouts that no training picture has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from training.evaluate import EVALUATION_SEED, held_out
from training.plan import PLAN
from training.scenes import render
from training.tasks import steps_for
from training.vocab import tokenizer

# A fifth of the size of PNGs, whose bytes would nearly all be the paper's grain. Colors at full resolution.
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


def write_tasks(target: Path, per_task: int, seed: int) -> int:
    """Returns the number of questions written."""
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    names: dict[tuple[int, ...], str] = {}
    for number, (scene, question) in enumerate(held_out(PLAN[-1], per_task, seed)):
        if scene.seed not in names:
            names[scene.seed] = f"{scene.seed[1]:05d}.jpg"
            Image.fromarray(render(scene)).save(target / names[scene.seed], **JPEG)
        line = {
            "id": number,
            "task": question.task,
            "group": question.group,
            "image": names[scene.seed],
            "question": question.text,
            "answer": tokenizer().decode(list(question.answer)),
            "gen_length": question.canvas,
            "steps": steps_for(question.canvas),
        }
        lines.append(json.dumps(line))
    (target / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    args = parser.parse_args()
    print(f"{write_tasks(args.to, args.per_task, args.seed):,} questions in {args.to}")


if __name__ == "__main__":
    main()
