"""`redvtp` answers a mistake at once: torch and transformers take seconds to import, so checks come before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from golden_data import Case, checkpoint_dir
from redvtp.cli.main import parse
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
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr
    assert "nosuch" in done.stderr


def test_every_parameter_is_a_flag_with_its_default() -> None:
    options = vars(parse(["generate", MODEL])) | {"preset": "redvtp"}
    for params in (DenoisingParams, PruningParams):
        for field in fields(params):
            value = options[field.name]
            assert (tuple(value) if isinstance(value, list) else value) == field.default
