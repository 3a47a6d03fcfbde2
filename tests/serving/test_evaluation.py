"""`redvtp eval` against a running server, with eight clients: the answers, tokens and blocks of the engine alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.task_files import FLAGS, MODEL, in_process, key, rows, tasks, write
from redvtp.local import LocalEngine
from serving.chat import CHECKPOINT
from serving.server import HOST, Server

pytestmark = pytest.mark.serving
EngineFactory = Callable[..., LocalEngine]
GRID = ("--policies", "redvtp,random,uniform", "--keep", "0.5,0.25", "--cache", "none,prefix", "--concurrency", "8")
# A random model often ends within a character. vLLM leaves it out, the engine's decoder shows this in its place.
BROKEN_OFF = "\ufffd"


@pytest.fixture(scope="module")
def asked(engine: EngineFactory) -> list[dict[str, Any]]:
    made = tasks(engine(CHECKPOINT), rounds=3, lengths=(1, 2, 16, 40))
    return [task for task in made if not task["answer"].endswith(BROKEN_OFF)]


def _both(
    server: Server, file: Path, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[Any, dict[str, Any]]:
    """What the server answered, which must be what the engine alone answers. The server's rows are in `served`."""
    served, embedded = folder / "served", folder / "embedded"
    url = f"http://{HOST}:{server.port}"
    status, _, err = in_process(capsys, "eval", url, file, *flags, "--ignore-eos", "--output", served)
    assert status == 0, err
    status, _, err = in_process(capsys, "eval", MODEL, file, *flags, *FLAGS, "--output", embedded)
    assert status == 0, err
    fields = (
        "text",
        "correct",
        "tokens",
        "steps",
        "visual_tokens",
        "visual_tokens_kept",
        "kv_blocks",
        "kv_blocks_freed",
    )
    over_http, alone = (
        {
            key(row): {name: row[name] for name in fields} | {"text": row["text"].rstrip(BROKEN_OFF)}
            for row in rows(folder)
        }
        for folder in (served, embedded)
    )
    assert over_http == alone
    return over_http


def test_eight_clients_get_the_engines_answers_tokens_and_blocks(
    server: Server, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", asked)
    assert len(_both(server, file, tmp_path, capsys, *GRID)) == 14 * len(asked)
    dense = [row["correct"] for row in rows(tmp_path / "served") if (row["policy"], row["cache"]) == ("none", "none")]
    assert all(dense)


@pytest.mark.parametrize("rule", [("--threshold", "2.5"), ("--min-confidence", "0.4")], ids=lambda rule: rule[0])
def test_steps_by_confidence_are_the_engines(
    server: Server, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: tuple[str]
) -> None:
    few = [task for task in asked if task["gen_length"] > 2][:3]
    file = write(tmp_path / "questions.jsonl", few)
    answers = _both(server, file, tmp_path, capsys, *rule, "--policies", "none", "--cache", "none,prefix")
    assert len(answers) == 2 * len(few)
    assert all(answer["steps"] < answer["tokens"] for answer in answers.values())


def test_a_model_the_server_does_not_have_is_refused(
    server: Server, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", asked[:1])
    url = f"http://{HOST}:{server.port}/v1"
    status, _, err = in_process(
        capsys, "eval", "another", file, "--server", url, "--policies", "none", "--output", tmp_path / "out"
    )
    assert status == 2
    assert "not another" in err


def test_what_the_server_refuses_counts_as_wrong_with_its_own_words(
    server: Server, model: str, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", [asked[0], asked[1] | {"gen_length": 4000, "steps": None}])
    status, _, err = in_process(
        capsys, "eval", model, file, "--server", f"http://{HOST}:{server.port}", "--policies", "none", "--ignore-eos",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 1
    assert "1 questions could not be asked" in err
    assert "exceeds max_model_len" in err
    # In the order in which they came.
    correct = {row["id"]: row["correct"] for row in rows(tmp_path / "out")}
    assert correct == {asked[0]["id"]: True, asked[1]["id"]: False}
