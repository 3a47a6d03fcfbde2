"""`redvtp heatmap`: the picture of a pruning from what an API answered, and how it refuses what it cannot draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from golden_data import Case, checkpoint_dir
from redvtp.cli.main import main

MODEL = checkpoint_dir("tiny-llada-v")
WIDE = Case("tiny-llada-v", "wide")
TALL = Case("tiny-llada-v", "tall")


def _command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's trace, its picture, and the trace as the API response it would have been."""
    folder = tmp_path_factory.mktemp("heatmap")
    arguments = (
        "generate", MODEL, "--image", *WIDE.image_files, *TALL.image_files, "--prompt", "Which?", "--gen-length", 16,
        "--keep-ratio", 0.25, "--trace", folder / "trace.json", "--heatmap", folder / "run.png",
    )  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    trace = json.loads((folder / "trace.json").read_text())
    response = {"model": str(MODEL), "choices": [], "kv_transfer_params": {"redvtp": {"prunings": trace["prunings"]}}}
    (folder / "response.json").write_text(json.dumps(response))
    return folder


@pytest.mark.parametrize("saved", ["trace.json", "response.json"])
def test_picture_is_the_one_of_the_run(folder: Path, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = (*WIDE.image_files, *TALL.image_files)
    status, err = _command(capsys, "heatmap", folder / saved, "--image", *images, "--output", folder / "saved.png")
    assert (status, err) == (0, "")
    with Image.open(folder / "run.png") as expected, Image.open(folder / "saved.png") as drawn:
        assert drawn.size == expected.size
        assert ImageChops.difference(drawn, expected).getbbox() is None


def test_model_may_be_named_where_the_server_had_another_name_for_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    response = json.loads((folder / "response.json").read_text()) | {"model": "our-llada"}
    (tmp_path / "named.json").write_text(json.dumps(response))
    images = (*WIDE.image_files, *TALL.image_files)
    call = ("heatmap", tmp_path / "named.json", "--image", *images, "--output", tmp_path / "kept.png")
    status, err = _command(capsys, *call)
    assert status == 2
    assert "our-llada is not a checkpoint folder on this machine; name it with --model" in err
    assert _command(capsys, *call, "--model", MODEL) == (0, "")


PRUNING = {"step": 0, "layer": None, "visual_before": 2, "visual_after": 1, "importance": [0.1, 0.2], "kept": [1]}


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "neither an API response nor a trace"),
        ({"kv_transfer_params": None, "choices": []}, 'no "prunings" in this response; ask for them with'),
        ({"kv_transfer_params": {"redvtp": {"steps": 3}}}, 'no "prunings" in this response'),
        ({"kv_transfer_params": {"redvtp": 5}}, 'no "prunings" in this response'),
        ({"prunings": []}, "nothing was pruned in this request"),
        ({"prunings": 5}, '"prunings" are damaged'),
        ({"prunings": [5]}, '"prunings" are damaged'),
        ({"prunings": [PRUNING | {"kept": [2]}]}, '"prunings" are damaged'),
        ({"prunings": [PRUNING | {"importance": [0.1]}]}, '"prunings" are damaged'),
        ({"prunings": [PRUNING | {"importance": [0.1, "x"]}]}, '"prunings" are damaged'),
        ({"prunings": [PRUNING | {"importance": [0.1, float("nan")]}]}, '"prunings" are damaged'),
        ({"prunings": [PRUNING, PRUNING]}, "does not begin with what the one before it kept"),
        ({"prunings": [PRUNING]}, "2 scores for 1 image(s) that have 70 visual tokens together"),
    ],
    ids=str,
)
def test_what_is_no_response_is_refused(
    saved: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "saved.json"
    file.write_text(saved if isinstance(saved, str) else json.dumps(saved))
    call = ("heatmap", file, "--image", *WIDE.image_files, "--output", tmp_path / "kept.png", "--model", MODEL)
    status, err = _command(capsys, *call)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"response": "nosuch.json"}, "nosuch.json cannot be read: No such file or directory"),
        ({"--image": "nosuch.png"}, "nosuch.png"),
        ({"--image": __file__}, "test_heatmap.py"),
        ({"--output": "no/such/folder/kept.png"}, "--output no/such/folder/kept.png cannot be written"),
        ({"--output": "kept.txt"}, "--output kept.txt does not end like an image file; use .png"),
        ({"--model": "nosuch"}, "--model nosuch is not a checkpoint folder: there is no such folder; name one with"),
    ],
    ids=str,
)
def test_files_that_are_not_there_are_named(
    folder: Path, changed: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--image": str(WIDE.image_files[0]), "--output": str(tmp_path / "kept.png"), "--model": str(MODEL)}
    response = changed.get("response", str(folder / "response.json"))
    given = [part for flag in (flags | changed).items() for part in flag if flag[0] != "response"]
    status, err = _command(capsys, "heatmap", response, *given)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
