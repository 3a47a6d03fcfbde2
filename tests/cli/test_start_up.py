"""`redvtp` answers a mistake at once: torch and transformers take seconds to import, so checks come before."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import fields

import pytest

from golden_data import Case, checkpoint_dir
from redvtp.cli.main import main, parse
from redvtp.params import DenoisingParams, PruningParams

MODEL = str(checkpoint_dir("tiny-llada-v"))
IMAGE = str(Case("tiny-llada-v", "wide").image_files[0])
SCRIPT = """
import sys
from redvtp.cli.main import main
status = main(sys.argv[1:])
print(status, *sorted({"torch", "transformers", "scipy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", MODEL, "--image", "nosuch.png", "--prompt", "Hi"),
        ("generate", MODEL, "--prompt", "Hi", "--engine", "nosuch"),
        ("generate", "nosuch", "--prompt", "Hi"),
        ("heatmap", "nosuch.json", "--image", IMAGE, "--output", "kept.png"),
        ("compare", MODEL, "--image", "nosuch.png", "--prompt", "Hi"),
        ("eval", MODEL, "nosuch.jsonl", "--output", "out"),
        ("consistency", MODEL, "nosuch.jsonl", "--output", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_a_missing_file_is_refused_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "2\n", done.stderr
    assert "nosuch" in done.stderr
    # Of the processor, which other work on the machine does not change.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


FOLDER = "nofolder is not a checkpoint folder: there is no such folder; name one with a published"
IMAGES = ("image file no1.png does not exist", "image file no2.png does not exist")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("generate", "nofolder", "--image", "no1.png", "no2.png", "--keep-ratio", "2"),
            (FOLDER, *IMAGES, "no question was given; pass --prompt TEXT", "--keep-ratio must be a number in (0, 1]"),
        ),
        (
            ("generate", MODEL, "--prompt", "Hi", "--trace", "no/t.json", "--importance", "no.json", "--engine", "no"),
            ("--trace no/t.json cannot be written", "--importance no.json cannot be read", "--engine must be one of"),
        ),
        (
            ("heatmap", "no.json", "--image", "no1.png", "no2.png", "--output", "no/k.png", "--model", "nofolder"),
            ("no.json cannot be read", *IMAGES, "--output no/k.png cannot be written", FOLDER),
        ),
        (
            ("compare", "nofolder", "--image", "no1.png", "no2.png", "--keep", "2", "--output", "no/k.png"),
            (FOLDER, *IMAGES, "no question was given", "--keep must be", "--output no/k.png cannot be written"),
        ),
        (("eval", "nofolder", "no.jsonl", "--output", "out"), (FOLDER, "the task file no.jsonl cannot be read")),
        (("consistency", "nofolder", "no.jsonl", "--output", "out"), (FOLDER, "the task file no.jsonl cannot be read")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_all_that_is_missing_is_said_at_once(
    arguments: tuple[str, ...], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [part for part in said if part not in line] == []
    assert line.count("; also: ") == len(said) - 1


def test_every_parameter_is_a_flag_with_its_default() -> None:
    options = vars(parse(["generate", MODEL])) | {"preset": "redvtp"}
    for params in (DenoisingParams, PruningParams):
        for field in fields(params):
            value = options[field.name]
            assert (tuple(value) if isinstance(value, list) else value) == field.default
