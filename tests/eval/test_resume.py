"""An evaluation that is stopped by a real signal goes on where it was: no answer lost, none asked twice."""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.task_files import CHECKPOINT, FLAGS, MODEL, command, in_process, key, rows, run, tasks, write
from redvtp.local import LocalEngine

pytestmark = pytest.mark.slow

EngineFactory = Callable[..., LocalEngine]
GRID = ("--policies", "redvtp", "--keep", "0.5", "--concurrency", "2")


@pytest.fixture(scope="module")
def file(engine: EngineFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Seconds of work, for a signal to find unfinished.
    asked = tasks(engine(CHECKPOINT), rounds=6, lengths=(48,))
    assert len(asked) > 12
    return write(tmp_path_factory.mktemp("tasks") / "questions.jsonl", asked)


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], str]:
    """The answers of an evaluation that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = run("eval", MODEL, file, *GRID, *FLAGS, "--output", folder)
    assert done.returncode == 0, done.stderr
    return {key(row): row["text"] for row in rows(folder)}


def _stopped(
    file: Path, begun: Path, with_signal: signal.Signals, after: int, answers: int
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An evaluation that goes on in a copy of `begun` and got a signal when it had written `after` of its answers.

    Again if the signal came when it had written them all: who watches may be kept waiting.
    """
    for attempt in range(10):
        folder = begun.with_name(f"{with_signal.name}-{attempt}")
        shutil.copytree(begun, folder)
        done = _signalled(file, folder, with_signal, after)
        if _answered(folder) < answers:
            return folder, done
    raise AssertionError(f"{with_signal.name} came too late ten times over")


def _signalled(file: Path, folder: Path, with_signal: signal.Signals, after: int) -> subprocess.CompletedProcess[str]:
    arguments = command("eval", MODEL, file, *GRID, *FLAGS, "--output", folder)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
    )
    deadline = time.monotonic() + 600
    try:
        while process.poll() is None and _answered(folder) < after:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(with_signal)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _hear_interrupts() -> None:
    """A shell that runs the tests in the background has children ignore Ctrl-C, and these pass that on to theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _answered(folder: Path) -> int:
    results = folder / "results.jsonl"
    return results.read_bytes().count(b"\n") if results.exists() else 0


def test_killed_and_interrupted_it_goes_on_and_ends_with_the_same_answers(
    file: Path, whole: dict[tuple[Any, ...], str], tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    folder, done = _stopped(file, tmp_path / "new", signal.SIGKILL, after=5, answers=len(whole))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    after_kill = (folder / "results.jsonl").read_bytes()
    assert after_kill.count(b"\n") >= 5
    assert not (folder / "summary.json").exists()
    # What a crash of the machine can leave: half a line.
    with (folder / "results.jsonl").open("ab") as results:
        results.write(b'{"id": "squ')

    folder, done = _stopped(file, folder, signal.SIGINT, after=after_kill.count(b"\n") + 5, answers=len(whole))
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    after_interrupt = (folder / "results.jsonl").read_bytes()
    answered = after_interrupt.count(b"\n")
    assert answered >= after_kill.count(b"\n") + 5
    assert f"interrupted; {answered} of {len(whole)} answers are in {folder}" in done.stderr
    assert "Traceback" not in done.stderr
    assert after_interrupt.startswith(after_kill)

    done = run("eval", MODEL, file, *GRID, *FLAGS, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "results.jsonl").read_bytes().startswith(after_interrupt)
    found = [(key(row), row["text"]) for row in rows(folder)]
    assert len(found) == len(whole)
    assert dict(found) == whole
    spans = [row["span"] for row in rows(folder)]
    # Each session times its own stretches.
    assert spans[answered] > max(spans[:answered])


def test_more_questions_and_cells_are_added_to_what_is_there(
    file: Path, whole: dict[tuple[Any, ...], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--policies", "none", "--concurrency", "2", "--limit", "3")
    assert in_process(capsys, "eval", MODEL, file, *few, *FLAGS, "--output", tmp_path)[0] == 0
    first = (tmp_path / "results.jsonl").read_bytes()
    assert first.count(b"\n") == 3
    assert in_process(capsys, "eval", MODEL, file, *GRID, *FLAGS, "--limit", "6", "--output", tmp_path)[0] == 0
    assert (tmp_path / "results.jsonl").read_bytes().startswith(first)
    ids = list(dict.fromkeys(row["id"] for row in rows(tmp_path)))
    assert len(ids) == 6
    assert {key(row): row["text"] for row in rows(tmp_path)} == {k: text for k, text in whole.items() if k[0] in ids}


def test_a_folder_has_one_writer(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "results.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = in_process(capsys, "eval", MODEL, file, *GRID, *FLAGS, "--output", tmp_path)
    assert status == 2
    assert f"another evaluation is writing to {tmp_path}" in err


def test_a_foreign_line_is_refused_by_its_number(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_text('{"some": "thing"}\n')
    status, _, err = in_process(capsys, "eval", MODEL, file, *GRID, *FLAGS, "--output", tmp_path)
    assert status == 2
    assert "line 1 of" in err
    assert (tmp_path / "results.jsonl").read_text() == '{"some": "thing"}\n'
