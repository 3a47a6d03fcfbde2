"""The shipped model behind the `vllm serve` line that `redvtp doctor` prints, and the README's demo."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from eval.task_files import in_process, key, rows
from redvtp.evaluation.tasks import read_tasks
from serving.chat import ask, message
from serving.server import HOST, START_SECONDS, Server, running_server

pytestmark = pytest.mark.serving
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_dvlm"
TASKS = MODEL / "tasks" / "tasks.jsonl"
GRID = ("--policies", "redvtp", "--keep", "0.5,0.25", "--cache", "none,prefix", "--concurrency", "8", "--limit", "24")


@pytest.fixture(scope="module")
def advice() -> dict[str, Any]:
    """What `redvtp doctor` says of the model."""
    command = [sys.executable, "-m", "redvtp.cli", "doctor", str(MODEL), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def server(advice: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program, *arguments = shlex.split(advice["serve"])
    assert Path(program).name == "vllm"
    assert arguments[0] == "serve"
    log = tmp_path_factory.mktemp("tiny-dvlm-server") / "server.log"
    # `running_server` adds an address only.
    with running_server(log, *arguments[1:]) as running:
        yield running


def test_the_printed_command_serves_the_model(advice: dict[str, Any], server: Server) -> None:
    """It answers, within the memory that doctor names."""
    with server.client() as client:
        for task in read_tasks(MODEL / "demo.jsonl").tasks:
            photo = message(task.question, [task.images[0].read_bytes()])
            answer = ask(client, server.model(), photo, max_tokens=task.gen_length, temperature=0)
            assert answer.text.strip() == task.answers[0]
    processes = [server.process.pid, *(each.pid for each in psutil.Process(server.process.pid).children(True))]
    assert sum(psutil.Process(pid).memory_full_info().uss for pid in processes) < advice["memory"]["total"]
    assert "chat template registered" not in server.log.read_text(errors="replace")


def test_eight_clients_get_the_engines_answers(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[dict[Any, Any]] = []
    for where, options in ((f"http://{HOST}:{server.port}", ()), (str(MODEL), ("--dtype", "float32"))):
        out = tmp_path / f"out-{len(answers)}"
        status, _, err = in_process(capsys, "eval", where, TASKS, *GRID, *options, "--output", out)
        assert status == 0, err
        # vLLM leaves the space before the first word, which the tokenizer's own decoder drops.
        answers.append(
            {key(row): (row["text"].strip(), row["tokens"], row["visual_tokens_kept"], row["kv_blocks_freed"])
             for row in rows(out)}
        )  # fmt: skip
    assert len(answers[0]) == 6 * 24
    assert answers[0] == answers[1]


def test_the_demo_gets_right_answers_and_draws_them(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--output", str(tmp_path)]
    command += ["--timeout", str(START_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * START_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = read_tasks(MODEL / "demo.jsonl").tasks
    assert f"Right answers: {len(asked)} of {len(asked)} dense, {len(asked)} with 25% kept." in done.stdout
    heatmaps = re.findall(r"what it looked at: (.*\.png)", done.stdout)
    assert len(heatmaps) == len(asked)
    for heatmap in heatmaps:
        with Image.open(heatmap) as picture:
            assert picture.getcolors(maxcolors=16) is None
