"""Task files: what is read, in whose spelling, and how a bad line is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from redvtp.evaluation.tasks import read_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "text.png").write_text("no pixels here")
    return tmp_path


GOOD: dict[str, Any] = {"id": "x", "image": "images/a.png", "question": "What?", "answer": "7"}


def _file(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "some.jsonl"
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_a_task_has_its_fields_and_paths_beside_the_file(folder: Path) -> None:
    line = GOOD | {"task": "digits", "group": "short", "gen_length": 4, "block_length": 2, "steps": 3, "more": [1]}
    (task,) = read_tasks(_file(folder, line)).tasks
    assert (task.line, task.id, task.name, task.group) == (1, "x", "digits", "short")
    assert (task.question, task.answers, task.images) == ("What?", ("7",), (folder / "images/a.png",))
    assert (task.gen_length, task.block_length, task.steps) == (4, 2, 3)


@pytest.mark.parametrize(
    ("line", "answers", "images"),
    [
        ({"doc_id": 5, "query": "What?", "target": "7", "image_path": "images/a.png"}, ("7",), ["a.png"]),
        ({"question_id": "5", "prompt": "What?", "answers": ["7", "seven"], "images": ["images/a.png"]},
         ("7", "seven"), ["a.png"]),
        ({"id": 5, "question": "What?", "answer": 7, "image": ["images/a.png", "images/b.png"]},
         ("7",), ["a.png", "b.png"]),
        ({"id": 5, "question": "<image>\nWhat?", "answer": [{"answer": "7", "answer_id": 1}], "image": "images/b.png"},
         ("7",), ["b.png"]),
        ({"id": 5, "question": "What?", "answer": "7", "image": []}, ("7",), []),
    ],
)  # fmt: skip
def test_other_tools_spellings_are_read(
    folder: Path, line: dict[str, Any], answers: tuple[str, ...], images: list[str]
) -> None:
    (task,) = read_tasks(_file(folder, line)).tasks
    assert (task.id, task.question, task.answers) == ("5", "What?", answers)
    assert [path.name for path in task.images] == images
    assert task.name == "some"


def test_without_an_id_the_line_is_the_id_and_blank_lines_count(folder: Path) -> None:
    line = {name: value for name, value in GOOD.items() if name != "id"}
    file = read_tasks(_file(folder, line, "", line))
    assert [(task.line, task.id) for task in file.tasks] == [(1, "1"), (3, "3")]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"id": "y", ', "no JSON"),
        ("[1, 2]", "must be a JSON object"),
        ({**GOOD, "id": "y", "question": " "}, "needs a question"),
        ({**GOOD, "id": "y", "question": "What <image> is it?"}, "has <image> marks"),
        ({**GOOD, "id": "y", "answer": None}, "needs an answer"),
        ({**GOOD, "id": "y", "answer": []}, "needs an answer"),
        ({**GOOD, "id": "y", "answer": True}, "needs an answer"),
        ({"id": "y", "question": "What?", "answer": "7"}, "needs an image"),
        ({**GOOD, "id": "y", "image": "images/none.png"}, "image images/none.png does not exist"),
        ({**GOOD, "id": "y", "image": "images/text.png"}, "image images/text.png is not in an image format"),
        ({**GOOD, "id": "y", "image": "images"}, "image images cannot be read"),
        ({**GOOD, "id": "y", "image": 3}, "must be a path"),
        ({**GOOD, "id": "y", "gen_length": 0}, "gen_length must be an integer >= 1, got 0"),
        ({**GOOD, "id": "y", "steps": "4"}, "steps must be an integer >= 1, got '4'"),
        (GOOD, "id 'x' is already on line 1"),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: dict[str, Any] | str, why: str) -> None:
    with pytest.raises(ValueError, match="has bad lines: line 2: ") as error:
        read_tasks(_file(folder, GOOD, bad, {**GOOD, "id": "z"}))
    assert why in str(error.value)
    assert "line 3:" not in str(error.value)


def test_several_bad_lines_are_told_together_and_not_all_of_a_thousand(folder: Path) -> None:
    with pytest.raises(ValueError, match="bad lines") as error:
        read_tasks(_file(folder, *["no"] * 1000))
    told = str(error.value)
    assert all(f"line {number}:" in told for number in (1, 2, 5))
    assert "line 6:" not in told
    assert told.endswith("and 995 more lines")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_tasks_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"has no tasks|is not UTF-8"):
        read_tasks(path)


def test_the_digest_follows_the_file_and_the_images(folder: Path) -> None:
    before = read_tasks(_file(folder, GOOD)).digest
    assert read_tasks(_file(folder, GOOD)).digest == before
    assert read_tasks(_file(folder, GOOD | {"answer": "8"})).digest != before
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "a.png")
    assert read_tasks(_file(folder, GOOD)).digest != before
