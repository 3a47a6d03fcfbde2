"""`vllm serve --plugin NAME`, through vLLM's own parser. The command itself: tests/serving/test_startup.py."""

from __future__ import annotations

import os
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


def test_allow_list_gets_the_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", _other_plugin())
    for _ in range(2):
        serve_parser().parse_args(["--plugin", "redvtp"])
        assert os.environ["VLLM_PLUGINS"] == f"{_other_plugin()},redvtp"


def test_absent_allow_list_stays_absent() -> None:
    """Set, it would shut every other plugin out."""
    serve_parser().parse_args(["--plugin", "redvtp"])
    assert "VLLM_PLUGINS" not in os.environ
