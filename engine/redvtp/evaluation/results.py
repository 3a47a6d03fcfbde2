"""The folder of one evaluation: its configuration, every answer as it came, and the results.

    run.json       the configuration, written once
    results.jsonl  one line for each answer, appended and flushed at once
    summary.json, report.md, *.png    written from the lines when all are there

An evaluation that was interrupted, killed or lost its server goes on from results.jsonl: each question is asked once in
each cell. A last line cut off by a crash is dropped, and its question asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from redvtp.errors import BadInput
from redvtp.evaluation.backends import Answer
from redvtp.evaluation.grid import Cell, Question, has_own_budget
from redvtp.evaluation.tasks import is_right
from redvtp.params import DenoisingParams, PruningParams

# Written for the reader. A copy of the checkpoint, or the same server at another port, gives the same answers.
_MAY_CHANGE = {"model", "tasks", "server"}
# What a folder was answered with if it is older than a parameter.
_DEFAULTS = {field.name: field.default for params in (DenoisingParams, PruningParams) for field in fields(params)}
_SAMPLE_BYTES = 1 << 20


class Results:
    """Use it as a context manager: it holds a lock on the folder.

    rows: the lines so far, by the key of their question.

    Raises BadInput for a folder with answers of another configuration, and while another process writes to it.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any]) -> None:
        self.folder = folder
        make_folder("output", folder)
        try:
            self._file = (folder / "results.jsonl").open("a+b")
        except OSError as error:
            raise BadInput(f"--output {folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(json.loads(json.dumps(configuration)))
            self.rows = self._read()
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise BadInput(f"another evaluation is writing to {folder}") from error
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def next_span(self) -> int:
        """Spans are numbered through all sessions: stretches of uninterrupted work on one cell."""
        return 1 + max((int(row["span"]) for row in self.rows.values()), default=0)

    def add(self, question: Question, answer: Answer, *, span: int, clock_s: float) -> None:
        """Appends one line. clock_s: seconds from the start of the span to this answer."""
        task = question.task
        row = {
            "id": task.id,
            "task": task.name,
            "group": task.group,
            **asdict(question.cell),
            "correct": answer.error is None and is_right(answer.text, task.answers),
            **asdict(answer),
            "span": span,
            "clock_s": clock_s,
        }
        # One write: a kill leaves the whole line or a part of it at the end, which `_read` drops.
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows[question.key] = row

    def write(self, name: str, text: str) -> None:
        """A file that is whole or not there."""
        beside = self.folder / f".{name}.part"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.folder / name)

    def _check(self, configuration: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            self.write("run.json", json.dumps(configuration, indent=2) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is no JSON; take another --output folder") from error
        defaults = json.loads(json.dumps({name: _DEFAULTS[name] for name in configuration if name in _DEFAULTS}))
        changed = [
            f"{name} was {json.dumps(was)}, is {json.dumps(configuration.get(name))}"
            for name, was in sorted((dict.fromkeys(configuration) | defaults | before).items())
            if name not in _MAY_CHANGE and was != configuration.get(name)
        ]
        if changed:
            raise BadInput(
                f"{self.folder} holds answers of another configuration ({'; '.join(changed)}); take another --output "
                f"folder"
            )

    def _read(self) -> dict[tuple[str, Cell], dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)
        rows: dict[tuple[str, Cell], dict[str, Any]] = {}
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                key = str(row["id"]), cell_of(row)
            except (ValueError, KeyError, TypeError) as error:
                where = f"line {number} of {self.folder / 'results.jsonl'}"
                raise BadInput(f"{where} is not a result; correct it or take another --output folder") from error
            rows[key] = row
        return rows


def cell_of(row: dict[str, Any]) -> Cell:
    # Folders of earlier versions have a ratio here: such a policy ran once for each.
    keep_ratio = None if has_own_budget(row["policy"]) else row["keep_ratio"]
    return Cell(row["policy"], keep_ratio, row["cache"])


def make_folder(flag: str, path: Path) -> None:
    """Raises BadInput, naming the flag, if the folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--{flag} {path} cannot be written: {error.strerror}") from error


def checkpoint_digest(folder: str | Path) -> str:
    """Changes with the JSON files, and with the weights as far as the ends of their files show.

    Reading 16 GB to the last byte would take longer than many evaluations; a training step changes every tensor.
    """
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            if size > _SAMPLE_BYTES:
                file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
                digest.update(file.read())
    return digest.hexdigest()
