"""Task files for the tiny checkpoint. Its weights are random, so the right answers are those it really gives, dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from golden_data import Case, checkpoint_dir
from redvtp.cli.main import main
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

CHECKPOINT = "tiny-llada-v"
MODEL = checkpoint_dir(CHECKPOINT)
FLAGS = ("--dtype", "float32", "--ignore-eos")
# A canvas of one token is decided in one step, and nothing is pruned; of two, the first is decided before the pruning.
LENGTHS = (1, 2, 8, 16)


def tasks(engine: LocalEngine, rounds: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Questions about three images in each length, with the answers of the dense engine, asked one by one."""
    made = []
    for number in range(rounds):
        for case in ("square", "wide", "tall"):
            for length in lengths:
                task = {
                    "id": f"{case}-{length}-{number}",
                    "image": str(Case(CHECKPOINT, case).image_files[0]),
                    "question": f"Question {number} of {case}?",
                    "task": case,
                    "group": "short" if length <= 2 else "long",
                    "gen_length": length,
                    "steps": max(length // 2, min(length, 2)),
                }
                made.append(task | {"answer": answer(engine, task, PruningParams(preset="none"))})
    # The model decides white space now and then, which can be no expected answer.
    return [task for task in made if str(task["answer"]).strip()]


def answer(engine: LocalEngine, task: dict[str, Any], pruning: PruningParams, **denoising: Any) -> str:
    """What the engine says when it is asked this alone."""
    images = tuple(Case(CHECKPOINT, task["id"].split("-")[0]).images())
    params = DenoisingParams(gen_length=task["gen_length"], steps=task["steps"], ignore_eos=True, **denoising)
    prompt = chat_prompt(engine.tokenizer, task["question"], 1)
    (generation,) = engine.generate([Request(prompt, images, params, pruning)])
    return generation.text


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    """The command line, for a process of its own."""
    return [sys.executable, "-m", "redvtp.cli.main", *map(str, arguments)]


def run(*arguments: object, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)


def in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process, which has torch loaded: its status, stdout and stderr."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of results.jsonl."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["policy"], row["keep_ratio"], row["cache"]
