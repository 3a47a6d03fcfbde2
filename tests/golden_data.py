"""Access to the golden data: what the reference implementation computed on the tiny checkpoints.

Reads the full set where the checkout has it beside it (`../shared/golden`), else the committed part in
`tests/golden`. Both have one layout; the committed part lacks some tensors, so a test asks `Case.has` or `Run.has`
when it parametrises. Integers come back as int64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

TESTS = Path(__file__).resolve().parent
RUN_KINDS = ("plain", "redvtp", "fast")


def golden_root() -> Path:
    """Directory with `ckpt/` and `goldens/`."""
    full = TESTS.parent.parent / "shared" / "golden"
    return full if (full / "goldens").is_dir() else TESTS / "golden"


def _present(*checkpoints: str) -> tuple[str, ...]:
    """Those of the checkpoints that this golden data has: the committed part lacks tiny-lavida-b."""
    return tuple(name for name in checkpoints if (golden_root() / "goldens" / name).is_dir())


LLADA_V = _present("tiny-llada-v", "tiny-llada-v-b")
LAVIDA = _present("tiny-lavida", "tiny-lavida-b")
DREAM = _present("tiny-lavida-dream")
ALL = LLADA_V + LAVIDA + DREAM


def checkpoint_dir(name: str) -> Path:
    return golden_root() / "ckpt" / name


def _names(file: Path) -> frozenset[str]:
    if not file.exists():
        return frozenset()
    with safe_open(file, "pt") as tensors:
        return frozenset(tensors.keys())


def _load(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    return tensor.long()


@dataclass(frozen=True)
class Case:
    """One prompt with its images, `goldens/<checkpoint>/<name>`."""

    checkpoint: str
    name: str

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.name}"

    @property
    def dir(self) -> Path:
        return golden_root() / "goldens" / self.checkpoint / self.name

    @property
    def model_dir(self) -> Path:
        return checkpoint_dir(self.checkpoint)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """base.json."""
        meta: dict[str, Any] = json.loads((self.dir / "base.json").read_text())
        return meta

    @property
    def question(self) -> str:
        return str(self.meta["question"])

    @property
    def prompt(self) -> str:
        return str(self.meta["prompt"])

    @property
    def image_files(self) -> list[Path]:
        return sorted(self.dir.glob("image*.png"))

    def images(self) -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in self.image_files]

    @property
    def config_overrides(self) -> dict[str, str]:
        """What the reference was told beside the checkpoint's own config.json for this case."""
        stored = json.loads((self.model_dir / "config.json").read_text())["image_aspect_ratio"]
        used = self.meta.get("image_aspect_ratio", stored)
        return {} if used == stored else {"image_aspect_ratio": used}

    @cached_property
    def _base_names(self) -> frozenset[str]:
        return _names(self.dir / "base.safetensors")

    def has(self, name: str) -> bool:
        return name in self._base_names

    def base(self, name: str) -> Tensor:
        """A tensor of base.safetensors."""
        return _load(self.dir / "base.safetensors", name)


@dataclass(frozen=True)
class Run:
    """One call of the reference's `generate` for a case. kind: "plain", "redvtp" or "fast"."""

    case: Case
    kind: str
    name: str
    data: dict[str, Any] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.case}/{self.name}"

    @property
    def params(self) -> dict[str, Any]:
        """Keywords `generate` was called with."""
        params: dict[str, Any] = self.data["params"]
        return params

    @property
    def robust(self) -> bool:
        """Whether an independent float32 implementation must agree to the token (see tests/golden/README.md)."""
        # Margins of Dream runs were not measured; all of them are tried.
        return bool(self.data.get("robust", True))

    @property
    def keep_ratio(self) -> float | None:
        ratio: float | None = self.data.get("keep_ratio")
        return ratio

    @property
    def uses_threshold(self) -> bool:
        return self.params.get("threshold") is not None

    @property
    def output(self) -> list[int]:
        """The answer; LaViDa's reference puts zeros in the prompt's place before it."""
        output = [int(token) for token in self.data["output"]]
        return output[-self.params["max_new_tokens"] :] if "max_new_tokens" in self.params else output

    @property
    def _file(self) -> Path:
        return self.case.dir / f"{self.kind}.safetensors"

    def has(self, name: str) -> bool:
        return f"{self.name}/{name}" in _names(self._file)

    def tensor(self, name: str) -> Tensor:
        """A tensor of this run: "x", "output", "importance", "kept", "logits_step1"."""
        return _load(self._file, f"{self.name}/{name}")


def cases(*checkpoints: str, tensor: str | None = None) -> list[Case]:
    """Cases of the checkpoints (default: all of them); with `tensor`, those whose base file has it."""
    found = [
        Case(checkpoint, folder.name)
        for checkpoint in checkpoints or ALL
        for folder in sorted((golden_root() / "goldens" / checkpoint).iterdir())
    ]
    return found if tensor is None else [case for case in found if case.has(tensor)]


def runs(*kinds: str, checkpoints: tuple[str, ...] = ALL) -> list[Run]:
    """Runs of the given kinds (default: all) and checkpoints (default: all), in a fixed order.

    Those that show what the published RedVTP fork of LaViDa does wrong (it never sees the image) are left out.
    """
    found: list[Run] = []
    for case in cases(*checkpoints):
        for kind in kinds or RUN_KINDS:
            file = case.dir / f"{kind}.json"
            if file.exists():
                stored = json.loads(file.read_text())["runs"]
                found.extend(
                    Run(case, kind, name, data) for name, data in stored.items() if not name.startswith("as_published")
                )
    return found
