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


def test_eight_clients_get_the_engines_answers_tokens_and_blocks(
    server: Server, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", asked)
    served, embedded = tmp_path / "served", tmp_path / "embedded"
    url = f"http://{HOST}:{server.port}"
    status, _, err = in_process(capsys, "eval", url, file, *GRID, "--ignore-eos", "--output", served)
    assert status == 0, err
    status, _, err = in_process(capsys, "eval", MODEL, file, *GRID, *FLAGS, "--output", embedded)
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
    assert len(over_http) == 14 * len(asked)
    assert over_http == alone
    dense = [row["correct"] for row in rows(served) if (row["policy"], row["cache"]) == ("none", "none")]
    assert all(dense)


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
