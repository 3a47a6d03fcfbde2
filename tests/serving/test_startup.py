"""Command lines that must not come up, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden_data import checkpoint_dir
from serving.chat import CHECKPOINT
from serving.server import START_SECONDS, run_to_exit

pytestmark = pytest.mark.serving


def test_path_that_is_not_there_is_said_without_a_traceback(tmp_path: Path) -> None:
    """vLLM takes it for an id of a hub. The second form is moved to the front by vLLM."""
    for model in (("path/that/does/not/exist",), ("--model", "path/that/does/not/exist")):
        status, said = run_to_exit(tmp_path / "vllm.log", "serve", *model, "--plugin", "redvtp", seconds=START_SECONDS)
        assert status == 2
        assert "path/that/does/not/exist is not a checkpoint folder: there is no such folder; name one with" in said
        assert "Traceback" not in said
        assert "chat template" not in said


def test_plugin_that_is_not_installed_stops_the_start(tmp_path: Path) -> None:
    # Long before a model would be loaded; the time is vLLM's imports, on a busy machine.
    status, said = run_to_exit(
        tmp_path / "vllm.log", "serve", checkpoint_dir(CHECKPOINT), "--plugin", "nosuch", seconds=START_SECONDS
    )
    assert status == 2
    assert "--plugin nosuch: no such vLLM plugin is installed (installed: " in said
    installed = said.split("(installed: ", 1)[1].split(")", 1)[0]
    assert "redvtp" in installed.split(", ")
    assert "Traceback" not in said
