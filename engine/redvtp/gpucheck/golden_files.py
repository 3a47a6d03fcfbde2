"""The golden data as it lies in a source checkout: runs of the reference implementations, in our knobs.

`tests/golden/runs.json` says what was asked, `goldens/` what the references computed after each step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open
from torch import Tensor

from redvtp.params import DenoisingParams, PruningParams


@dataclass(frozen=True, slots=True)
class GoldenRun:
    """One run. entry: its entry in runs.json, see tests/golden/write_runs.py."""

    root: Path
    entry: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.entry['checkpoint']}/{self.entry['case']}/{self.entry['name']}"

    @property
    def model(self) -> Path:
        return self.root / "ckpt" / str(self.entry["checkpoint"])

    @property
    def denoising(self) -> DenoisingParams:
        values = self.entry["denoising"]
        return DenoisingParams(**{**values, "stop": tuple(values["stop"])})

    @property
    def pruning(self) -> PruningParams:
        return PruningParams(**self.entry["pruning"])

    def images(self) -> tuple[Image.Image, ...]:
        return tuple(Image.open(self._folder / name).convert("RGB") for name in self.entry["images"])

    def canvases(self) -> list[list[int]]:
        """The canvas after each step."""
        stored = self._tensor("x")
        assert stored is not None
        ids: list[list[int]] = stored[self.entry["steps"]].long().tolist()
        return ids

    def kept(self) -> list[int] | None:
        """Visual tokens that the pruning kept; None where nothing was pruned or it was not stored."""
        stored = self._tensor("kept")
        return None if stored is None else [int(index) for index in stored]

    @property
    def _folder(self) -> Path:
        return self.root / "goldens" / str(self.entry["checkpoint"]) / str(self.entry["case"])

    def _tensor(self, field: str) -> Tensor | None:
        name = f"{self.entry['name']}/{field}"
        with safe_open(self._folder / f"{self.entry['kind']}.safetensors", "pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118  no dictionary
                return None
            found: Tensor = tensors.get_tensor(name)
            return found


def golden_runs(root: Path, quick: bool) -> list[GoldenRun]:
    """One run of each mode first. quick: no others. Raises OSError where there is no golden data."""
    entries = json.loads((root / "runs.json").read_text(encoding="utf-8"))
    ordered = sorted(entries, key=lambda entry: not entry["quick"])
    return [GoldenRun(root, entry) for entry in ordered if entry["quick"] or not quick]
