"""What a model is for the commands and the server: a folder with a published checkpoint. And what to say without one.

It imports nothing heavy: a wrong path is refused within a moment.
"""

from __future__ import annotations

import re
from pathlib import Path

from redvtp.values import nearest

CONTENTS = "a published checkpoint's config.json, tokenizer.json and *.safetensors, such as examples/tiny_dvlm"
# An id on the Hugging Face hub.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def why_no_model(model: str) -> str | None:
    """Why `model` is no checkpoint folder, and what to do, in one sentence; None if it is one."""
    found = reason_and_remedy(model)
    return None if found is None else "; ".join(found)


def reason_and_remedy(model: str) -> tuple[str, str] | None:
    """The two halves of `why_no_model`."""
    path = Path(model)
    if (path / "config.json").is_file():
        return None
    if path.is_dir():
        return f"{model} is not a checkpoint folder: it has no config.json", f"name a folder with {CONTENTS}"
    if path.exists():
        return f"{model} is not a checkpoint folder but a file", f"name the folder with {CONTENTS}"
    nothing_there = f"{model} is not a checkpoint folder: there is no such folder"
    if (similar := _similar(path)) is not None:
        return nothing_there, f"did you mean {similar}?"
    if _HUB_ID.fullmatch(model):
        return (
            f"{model} is not a checkpoint folder on this machine, and redvtp downloads nothing, while `vllm serve "
            f"{model}` would try the Hugging Face hub",
            f"fetch it with `hf download {model} --local-dir {path.name}` and name the folder {path.name}",
        )
    return nothing_there, f"name one with {CONTENTS}"


def _similar(path: Path) -> Path | None:
    """A checkpoint folder whose path differs from this one in one misspelt name."""
    # The topmost part that is not there.
    part = next(each for each in reversed((path, *path.parents)) if not each.exists())
    try:
        names = [each.name for each in part.parent.iterdir() if each.is_dir()]
    except OSError:
        return None
    name = nearest(part.name, names)
    found = part.with_name(name) / path.relative_to(part) if name is not None else None
    return found if found is not None and (found / "config.json").is_file() else None


def looks_like_a_path(model: str) -> bool:
    """Whether a model's name can only be meant as a path: no hub and no storage has such names."""
    if "://" in model or model.endswith(".gguf"):
        # Object storage, or one file of a repository.
        return False
    return model.startswith((".", "/", "~")) or model.count("/") > 1
