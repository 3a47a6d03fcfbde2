"""examples/chat_with_image.py against a real server, run as by somebody who has the openai package and not ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from golden_data import Case
from redvtp.params import PRESETS
from serving.chat import CHECKPOINT, Answer, ask, message
from serving.server import HOST, Server

pytestmark = pytest.mark.serving
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "chat_with_image.py"
PHOTO = Case(CHECKPOINT, "wide").image_files[0]
LENGTHS = ("--gen-length", "16", "--steps", "8")
# The package is not there for the example, nor for what it imports.
ALONE = "import runpy, sys; sys.modules['redvtp'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


def _run(server: Server, *arguments: object, alone: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-c", ALONE) if alone else ()), EXAMPLE, PHOTO, "--prompt", "What?", *LENGTHS]
    command += ["--base-url", f"http://{HOST}:{server.port}/v1", *arguments]
    environment = os.environ | {"NO_PROXY": HOST, "no_proxy": HOST}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, check=False, env=environment
    )


def _asked(client: openai.OpenAI, model: str, **knobs: Any) -> Answer:
    body = {"vllm_xargs": {f"redvtp_{name}": value for name, value in ({"steps": 8} | knobs).items()}}
    return ask(client, model, message("What?", [PHOTO.read_bytes()]), max_tokens=16, temperature=0, extra_body=body)


@pytest.mark.parametrize(
    ("flags", "knobs"),
    [
        ((), {}),
        (("--pruning", "none"), {"pruning": "none"}),
        (("--pruning", "late", "--keep-ratio", "0.25", "--cache", "prefix"),
         {"pruning": "late", "keep_ratio": 0.25, "cache": "prefix"}),
        (("--pruning", "progressive", "--knob", "prune_steps=2", "--knob", "score_layers=1:3"),
         {"pruning": "progressive", "prune_steps": 2, "score_layers": "1:3"}),
    ],
    ids=str,
)  # fmt: skip
def test_answer_and_counts_are_those_of_the_knobs(
    server: Server, client: openai.OpenAI, model: str, flags: tuple[str, ...], knobs: dict[str, Any]
) -> None:
    done = _run(server, *flags)
    assert done.returncode == 0, done.stderr
    expected = _asked(client, model, **knobs)
    report = expected.report
    assert report is not None
    assert f"answer: {expected.text!r}" in done.stdout
    assert f"{report['visual_tokens']} before pruning, {report['visual_tokens_kept']} after" in done.stdout
    assert f"KV blocks freed: {report['blocks_freed']} of {report['kv_blocks_admitted']}, " in done.stdout


def test_every_policy_can_be_asked_for(server: Server, client: openai.OpenAI, model: str) -> None:
    visual = (_asked(client, model, pruning="none").report or {})["visual_tokens"]
    for preset in PRESETS:
        given = ("--knob", f"importance={[0.5] * visual}") if preset == "external" else ()
        done = _run(server, "--pruning", preset, *given)
        assert done.returncode == 0, (preset, done.stderr)
        assert re.search(rf"visual tokens: {visual} before pruning, \d+ after", done.stdout), preset


def test_stream_is_the_answer(server: Server, client: openai.OpenAI, model: str) -> None:
    done = _run(server, "--stream", "--pruning", "uniform")
    assert done.returncode == 0, done.stderr
    assert done.stdout == _asked(client, model, pruning="uniform").text + "\n"


def test_heat_map_is_drawn(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "pruned.png"
    done = _run(server, "--pruning", "progressive", "--heatmap", target, alone=False)
    assert done.returncode == 0, done.stderr
    with Image.open(target) as picture:
        assert picture.getcolors(maxcolors=16) is None


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--pruning", "best"), 1, "refused (HTTP 400): redvtp_pruning must be one of redvtp, llada-fastv"),
        (("--cache", "some"), 1, "refused (HTTP 400): redvtp_cache must be one of none, prefix"),
        (("--knob", "prune_stepps=1"), 1, "unknown knob 'redvtp_prune_stepps'; did you mean redvtp_prune_steps?"),
        (("--knob", "prune_layer=9"), 1, "redvtp_prune_layer must be an integer in [0, 3]"),
        (("--knob", "prune_layer"), 2, "argument --knob: must be NAME=VALUE, got 'prune_layer'"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_said_in_one_sentence(
    server: Server, flags: tuple[str, ...], status: int, said: str
) -> None:
    done = _run(server, *flags)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
