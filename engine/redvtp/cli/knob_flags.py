"""One flag for each field of `DenoisingParams` and `PruningParams`: a new field is a new flag, with no line here.

Name, default and type are the field's, the help is the docstring's first sentence about it. The dataclass checks the
value, so a wrong one is refused with the same message here as by the server.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from redvtp.params import KNOB_NAMES, PRESETS, DenoisingParams, PruningParams

# Commands that compare lists of values have other flags for these.
_COMPARED_FLAGS = {"preset": "--policies", "keep_ratio": "--keep"}
_COMPARING = ("compare", "eval")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LENGTHS = ("gen_length", "block_length", "steps")


def flag_of(name: str, command: str = "") -> str:
    """The flag of a parameter, or of an engine's option of that name. command: the one that has the flag."""
    if command in _COMPARING and name in _COMPARED_FLAGS:
        return _COMPARED_FLAGS[name]
    return f"--{KNOB_NAMES.get(name, name).replace('_', '-')}"


def integer(text: str) -> int | str:
    """The number in a text. Any other text is returned as it is, for the parameter's check to refuse."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> float | str:
    """As `integer`."""
    try:
        return float(text)
    except ValueError:
        return text


def byte_count(text: str) -> int | str:
    """As `integer`, also with a suffix as vLLM reads it: k, m, g are powers of 1,000 and K, M, G of 1,024."""
    unit = _UNITS.get(text[-1:], 1)
    count = integer(text if unit == 1 else text[:-1])
    return count * unit if isinstance(count, int) else text


# How the text of a flag becomes a value, by the field's type; the first that matches counts.
_BY_TYPE: dict[Any, dict[str, Any]] = {
    tuple[str, ...]: {"nargs": "+", "action": "extend", "metavar": "TEXT"},
    tuple[float, ...]: {"type": Path, "metavar": "FILE.json"},
    bool: {"action": "store_true"},
    int: {"type": integer, "metavar": "N"},
    float: {"type": number, "metavar": "X"},
    str: {"metavar": "TEXT"},
}


def denoising_flags(parser: argparse.ArgumentParser, many_requests: bool = False, many_caches: bool = False) -> None:
    """The fields of `DenoisingParams`.

    many_requests: each task has lengths, which these flags override; there is no draft.
    many_caches: --cache is a list with commas.
    """
    group = parser.add_argument_group("denoising")
    several = {"cache"} if many_caches else set()
    if many_requests:
        _add(group, DenoisingParams, without={"draft"}, of_task=LENGTHS, several=several)
        parser.set_defaults(draft="")
    else:
        _add(group, DenoisingParams, several=several)


def pruning_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of `PruningParams`. `--importance` names a JSON file."""
    _add(parser.add_argument_group("visual-token pruning"), PruningParams)


def meaning(params: type, field: str) -> str:
    """What the docstring of a dataclass says of a field: from `name: ` to the next field or the end of the list."""
    names = "|".join(each.name for each in fields(params))
    pattern = rf"^\s*{field}: (.*?)(?=^\s*(?:{names}): |^\s*$)"
    found = re.search(pattern, params.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert found, f"{params.__name__} does not say what {field} is"
    return " ".join(found[1].split()).rstrip(".")


def _add(
    group: argparse._ArgumentGroup,
    params: type,
    *,
    without: Collection[str] = (),
    of_task: Collection[str] = (),
    several: Collection[str] = (),
) -> None:
    """without: fields that get no flag. of_task: those whose default a task decides. several: lists with commas."""
    types = get_type_hints(params)
    for field in fields(params):
        if field.name in without:
            continue
        kinds = {types[field.name], *get_args(types[field.name])}
        options = next(options for kind, options in _BY_TYPE.items() if kind in kinds)
        text = meaning(params, field.name).partition(". ")[0].replace("%", "%%").replace("None ", "the default ")
        text = f"{text}: {', '.join(PRESETS)}" if field.name == "preset" else text
        text = f"{text}; several with commas" if field.name in several else text
        shown = "" if field.default in (None, "", ()) or field.default is False else " (default %(default)s)"
        default: Any = field.default
        default = list(default) if "nargs" in options else default
        if field.name in of_task:
            default, shown = None, " (default: the task's)"
        group.add_argument(flag_of(field.name), default=default, help=text + shown, **options)
