"""The command line that `redvtp doctor` prints starts a server that answers, within the memory that it names."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from redvtp.evaluation.tasks import read_tasks
from serving.chat import ask, message
from serving.server import running_server

pytestmark = pytest.mark.serving
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_dvlm"


def test_the_printed_command_serves_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "redvtp.cli", "doctor", str(MODEL), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    program, *arguments = shlex.split(report["serve"])
    assert Path(program).name == "vllm"
    assert arguments[0] == "serve"
    # `running_server` adds an address only.
    with running_server(tmp_path / "server.log", *arguments[1:]) as server, server.client() as client:
        for task in read_tasks(MODEL / "demo.jsonl").tasks:
            photo = message(task.question, [task.images[0].read_bytes()])
            answer = ask(client, server.model(), photo, max_tokens=task.gen_length, temperature=0)
            assert answer.text.strip() == task.answers[0]
        processes = [server.process.pid, *(each.pid for each in psutil.Process(server.process.pid).children(True))]
        taken = sum(psutil.Process(pid).memory_full_info().uss for pid in processes)
    assert taken < report["memory"]["total"]
    assert "chat template registered" not in (tmp_path / "server.log").read_text(errors="replace")
