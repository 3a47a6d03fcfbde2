"""Readers of `config.json`: each checks one kind of value and names the key in its refusal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redvtp.values import did_you_mean

# key -> (what a missing key means, supported values). With any other value the reference computes something else.
Supported = Mapping[str, tuple[Any, tuple[Any, ...]]]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is {path.parent} a checkpoint folder?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(raw) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def value_at(raw: Mapping[str, Any], key: str) -> Any:
    """The value of a key, None where it is missing. Dots lead into nested objects: "language_config.hidden_size"."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def unsupported(key: str, value: Any, names: Sequence[str]) -> ValueError:
    """The error for a value, or a list with one value, that is none of these names; with the name it is most like."""
    only = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    supported = ", ".join(map(repr, dict.fromkeys(names)))
    return ValueError(f"{key} {value!r} is not supported; supported: {supported}{did_you_mean(only, names)}")


def check_supported(raw: Mapping[str, Any], supported: Supported) -> None:
    """Raises ValueError for the first key with a value that is not supported. Keys may be dotted, see `value_at`."""
    for key, (default, values) in supported.items():
        # A key that is there and null is not a missing one.
        parent, _, leaf = key.rpartition(".")
        inside = value_at(raw, parent) if parent else raw
        value = inside.get(leaf, default) if isinstance(inside, Mapping) else default
        if value not in values:
            raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(map(repr, values))}")


def integer(raw: Mapping[str, Any], key: str, default: int | None = None, where: str = "config.json") -> int:
    """A positive integer. default: for a key that is missing or null; None: there must be one."""
    value = value_at(raw, key)
    if value is None:
        if default is None:
            raise ValueError(f"{where} lacks {key!r}")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def optional_integer(raw: Mapping[str, Any], key: str) -> int | None:
    """An integer; None where the key is missing or null."""
    value = value_at(raw, key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    return value


def number(raw: Mapping[str, Any], key: str) -> float:
    """A positive number."""
    value = value_at(raw, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def dtype_name(raw: Mapping[str, Any]) -> str:
    """The dtype's name (vLLM's copy may hold a torch dtype); without one float16, as in the official loader."""
    return str(raw.get("torch_dtype") or raw.get("dtype") or "float16").removeprefix("torch.")


def is_plain_rope(rope: Mapping[str, Any]) -> bool:
    """True for the form transformers 5 writes when nothing is scaled: {"rope_theta": ..., "rope_type": "default"}."""
    return rope.get("rope_type", rope.get("type", "default")) == "default" and not set(rope) - {
        "rope_theta",
        "rope_type",
        "type",
    }


def rope_theta(raw: Mapping[str, Any]) -> float:
    """The base of rotary positions, from either place it may be in."""
    rope = raw.get("rope_parameters")
    if isinstance(rope, Mapping):
        # transformers 5 moves the flat key in here when it reads a config, and vLLM hands over what it read.
        if not is_plain_rope(rope):
            raise ValueError(f"rope_parameters {dict(rope)!r} is not supported; supported: rope_type 'default'")
        if "rope_theta" in rope:
            return number(rope, "rope_theta")
    return number(raw, "rope_theta")
