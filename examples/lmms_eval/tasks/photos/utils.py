"""How lmms-eval finds the photographs of photos.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(Path(__file__).parent / doc["image"]).convert("RGB")]
