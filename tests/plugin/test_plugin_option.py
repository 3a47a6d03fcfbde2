"""`vllm serve --plugin NAME`, through vLLM's own parser. The command itself: tests/serving/test_startup.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from plugin.command_line import serve_parser


@pytest.fixture(autouse=True)
def _environment_of_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def _other_plugin() -> str:
    """vLLM brings plugins of its own."""
    names = {entry.name for entry in entry_points(group="vllm.general_plugins")} - {"redvtp"}
    assert names
    return min(names)


def test_installed_plugins_are_accepted_one_by_one_and_in_lists() -> None:
    other = _other_plugin()
    parse = serve_parser().parse_args
    assert parse([]).plugin is None
    assert parse(["--plugin", "redvtp"]).plugin == ["redvtp"]
    assert parse(["--plugin=redvtp"]).plugin == ["redvtp"]
    assert parse(["--plugin", f"redvtp,{other}"]).plugin == ["redvtp", other]
    assert parse(["--plugin", "redvtp", "--plugin", other]).plugin == ["redvtp", other]


def test_config_file_may_name_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("plugin: redvtp\n")
    assert serve_parser().parse_args(["--config", str(file)]).plugin == ["redvtp"]


@pytest.mark.parametrize(
    ("names", "unknown"), [("nosuch", "nosuch"), ("redvtp,nosuch", "nosuch"), ("redvtp, other", " other"), ("", "")]
)
def test_unknown_name_ends_with_the_installed_ones(
    capsys: pytest.CaptureFixture[str], names: str, unknown: str
) -> None:
    with pytest.raises(SystemExit) as end:
        serve_parser().parse_args(["--plugin", names])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"--plugin {unknown}: no such vLLM plugin is installed (installed: " in said
    assert "redvtp" in said.split("(installed: ", 1)[1]


@pytest.mark.parametrize("model", ["no/such/folder", "./nosuch", "/no/such", "~/nosuch"])
def test_path_that_is_not_there_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], model: str) -> None:
    with pytest.raises(SystemExit) as end:
        serve_parser().parse_args([model, "--plugin", "redvtp"])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {model} is not a checkpoint folder: there is no such folder; name one with " in said


@pytest.mark.parametrize("model", ["GSAI-ML/LLaDA-V", "gpt2", "s3://bucket/a/model", "org/name/file.gguf", "../.."])
def test_names_that_may_be_ids_and_folders_of_any_kind_are_left_to_vllm(model: str) -> None:
    assert serve_parser().parse_args([model, "--plugin", "redvtp"]).model_tag == model
    assert serve_parser().parse_args(["no/such/folder"]).model_tag == "no/such/folder"


@pytest.mark.slow
def test_families_of_one_model_type_register_its_template_once() -> None:
    """vLLM warns where a second one replaces the first, at every start of every process."""
    script = "import vllm_redvtp; vllm_redvtp.register()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "chat template" not in done.stdout + done.stderr


def test_allow_list_gets_the_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", _other_plugin())
    for _ in range(2):
        serve_parser().parse_args(["--plugin", "redvtp"])
        assert os.environ["VLLM_PLUGINS"] == f"{_other_plugin()},redvtp"


def test_absent_allow_list_stays_absent() -> None:
    """Set, it would shut every other plugin out."""
    serve_parser().parse_args(["--plugin", "redvtp"])
    assert "VLLM_PLUGINS" not in os.environ
