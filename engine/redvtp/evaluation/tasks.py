"""Questions with known answers, read from JSON lines in the style of lmms-eval, and when an answer is right.

    {"id": "box-17", "image": "images/17.png", "question": "Which digit is in the red box?", "answer": "7",
     "task": "digit_of_color", "group": "short", "gen_length": 2}

Image paths are relative to the file. Files of other tools are read unchanged, by the spellings in `SPELLINGS`; other
fields are ignored. A bad line is refused by its number before any model is loaded. An answer is right if it matches
exactly, after a normalisation that ignores case, space and final punctuation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

# What is read as what; where a line has several of a row, the first one counts.
SPELLINGS = {
    "id": ("id", "doc_id", "question_id", "sample_id"),
    "question": ("question", "query", "prompt", "input"),
    "answer": ("answer", "answers", "target", "targets"),
    "image": ("image", "images", "image_path", "image_paths"),
    "task": ("task", "task_name"),
}
LENGTHS = ("gen_length", "block_length", "steps")
# Errors in one message; a file of the wrong kind has one on every line.
MAX_ERRORS = 5
FINAL_PUNCTUATION = ".,;:!?"


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    line: its line in the file, from 1.
    name: the task it counts for.
    group: of tasks, if any.
    answers: any of them is right.
    gen_length, block_length, steps: what the answer needs; None leaves it to the flags.
    """

    line: int
    id: str
    name: str
    group: str | None
    question: str
    answers: tuple[str, ...]
    images: tuple[Path, ...]
    gen_length: int | None = None
    block_length: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class TaskFile:
    """The tasks of a file, in order.

    digest: changes with any byte of the file and with the size of any image.
    """

    path: Path
    digest: str
    tasks: tuple[Task, ...]


def read_tasks(path: str | Path) -> TaskFile:
    """All tasks of a file. Raises ValueError naming the lines that are no task, and why."""
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        sample = "examples/tiny_dvlm/tasks/tasks.jsonl is one, and docs/evaluation.md describes it"
        raise ValueError(f"the task file {path} cannot be read: {error.strerror}; {sample}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the task file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    tasks: list[Task] = []
    errors: list[str] = []
    lines: dict[str, int] = {}
    # Not splitlines(): JSON strings may hold the other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            task = _task(number, line, path)
            if task.id in lines:
                raise ValueError(f"id {task.id!r} is already on line {lines[task.id]}")
        except ValueError as error:
            errors.append(f"line {number}: {error}")
            continue
        lines[task.id] = number
        tasks.append(task)
    if errors:
        more = f"; and {len(errors) - MAX_ERRORS} more lines" if len(errors) > MAX_ERRORS else ""
        raise ValueError(f"the task file {path} has bad lines: {'; '.join(errors[:MAX_ERRORS])}{more}")
    if not tasks:
        raise ValueError(f"the task file {path} has no tasks in it")
    digest = hashlib.sha256(data)
    for image in (image for task in tasks for image in task.images):
        digest.update(f"{image.stat().st_size},".encode())
    return TaskFile(path, digest.hexdigest(), tuple(tasks))


def normalize(text: str) -> str:
    """Case folded, white space at the ends removed and elsewhere one space, punctuation at the end removed.

    An answer of nothing but punctuation stays unchanged.
    """
    words = " ".join(text.casefold().split())
    return words.rstrip(FINAL_PUNCTUATION + " ") or words


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    """Whether `answer` is one of the accepted ones, normalised."""
    return normalize(answer) in {normalize(text) for text in accepted}


def _task(number: int, line: str, path: Path) -> Task:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {line.strip()[:40]!r}")
    images = tuple(_images(fields, path.parent))
    return Task(
        line=number,
        id=str(_of(fields, "id", number)),
        name=str(_of(fields, "task", path.stem)),
        group=None if fields.get("group") is None else str(fields["group"]),
        question=_question(fields, len(images)),
        answers=tuple(_answers(fields)),
        images=images,
        **{name: _length(name, fields.get(name)) for name in LENGTHS},
    )


def _of(fields: dict[str, Any], name: str, default: Any = None) -> Any:
    """The field in any of its spellings."""
    return next((fields[key] for key in SPELLINGS[name] if fields.get(key) is not None), default)


def _question(fields: dict[str, Any], images: int) -> str:
    question = _of(fields, "question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"needs a question (a text under one of {', '.join(SPELLINGS['question'])})")
    # Here, not above: transformers takes a second to import, and a file that is not there is refused before.
    from redvtp.prompt import IMAGE_MARK

    # Many data sets carry the marks in front of the question, where the prompt template puts them anyway.
    question = re.sub(rf"^\s*(?:{re.escape(IMAGE_MARK)}\s*){{0,{images}}}", "", question)
    if IMAGE_MARK in question:
        raise ValueError(f"has {IMAGE_MARK} marks that are not {images} in front of the question, where images go")
    return question


def _answers(fields: dict[str, Any]) -> Iterator[str]:
    answer = _of(fields, "answer")
    answers = answer if isinstance(answer, list) else [answer]
    for one in answers:
        # VQA style: [{"answer": "yes", "answer_id": 1}, ...]
        value = one.get("answer") if isinstance(one, dict) else one
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"needs an answer, a text or a list of texts, got {json.dumps(answer)[:60]}")
        yield str(value)
    if not answers:
        raise ValueError("needs an answer, got an empty list")


def _images(fields: dict[str, Any], folder: Path) -> Iterator[Path]:
    if not any(key in fields for key in SPELLINGS["image"]):
        raise ValueError(f'needs an image ({", ".join(SPELLINGS["image"])}); "image": [] is a question without one')
    value = _of(fields, "image", [])
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the image must be a path or a list of paths, got {json.dumps(value)[:60]}")
        path = folder / name
        try:
            # Reads the header only; pixels that are damaged behind it show when the question is asked.
            Image.open(path).close()
        except FileNotFoundError:
            raise ValueError(f"image {name} does not exist") from None
        except UnidentifiedImageError:
            raise ValueError(f"image {name} is not in an image format that PIL reads") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {name} cannot be read: {error}") from error
        yield path


def _length(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
