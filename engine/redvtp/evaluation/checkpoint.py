"""Whether a checkpoint folder still holds the checkpoint that an evaluation began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 1 << 20


def checkpoint_digest(folder: str | Path) -> str:
    """Changes with the JSON files, and with the weights as far as the ends of their files tell.

    Reading 16 GB to the last byte would take longer than many evaluations; a training step changes every tensor.
    """
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            if size > _SAMPLE_BYTES:
                file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
                digest.update(file.read())
    return digest.hexdigest()
