"""Checks of single values, and how a message shows a refused one.

Each check raises InvalidRequest naming the knob, the value and what is allowed. `name` is the knob's name in Python,
which whoever shows the message may write otherwise (`redvtp.errors`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches

from redvtp.errors import InvalidRequest, Knob

# Longer text fits no canvas and no context; tokenising megabytes to find that out would hold up a server.
MAX_TEXT_LENGTH = 1 << 16
_SHOWN_LENGTH = 120
_FLOAT32_LIMIT = 3e38
# No name is longer, and comparing long texts takes time that grows with their square.
_NAME_LENGTH = 64
# How alike two names must be, from 0 to 1: `dual` and `duel` are 0.75.
_ALIKE = 0.7


def shown(value: object) -> str:
    """A refused value as a message shows it: what a client sends may be megabytes long."""
    text = value[: _SHOWN_LENGTH + 1] if isinstance(value, str) else value
    text = repr(text)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."


def refused(name: str, rule: str, value: object, end: str = "") -> InvalidRequest:
    """The error for a value that a rule does not allow. rule: "a number in (0, 1]". end: of the message."""
    return InvalidRequest(Knob(name), f" must be {rule}, got {shown(value)}{end}")


def nearest(name: object, names: Iterable[str], alike: float = _ALIKE) -> str | None:
    """The one of `names` that was most probably meant; None if none is like it. Case and -_ make no difference."""
    if not isinstance(name, str) or len(name) > _NAME_LENGTH:
        return None
    plain = {_plain(each): each for each in names}
    found = get_close_matches(_plain(name), plain, n=1, cutoff=alike)
    return plain[found[0]] if found else None


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """The end of a refusal: the name that was meant, or nothing."""
    meant = nearest(value, names)
    return f"; did you mean {meant!r}?" if meant is not None else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InvalidRequest unless value is an integer from low to high; None is no limit."""
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise refused(name, f"an integer {allowed}", value)


def is_number(value: object) -> bool:
    """Whether value is a finite number; booleans are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, float) and math.isfinite(value)


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless value is one of `allowed`."""
    if value not in allowed:
        raise refused(name, f"one of {', '.join(allowed)}", value, did_you_mean(value, allowed))


def check_text(name: str, value: str) -> None:
    """Raises InvalidRequest for text that is too long or no valid Unicode."""
    if len(value) > MAX_TEXT_LENGTH:
        raise InvalidRequest(Knob(name), f" must have at most {MAX_TEXT_LENGTH:,} characters, got {len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer and no wire format takes.
        raise refused(name, "valid Unicode", value) from None


def fits_float32(value: object) -> bool:
    """Whether value is a number that float32 holds."""
    return is_number(value) and abs(value) < _FLOAT32_LIMIT  # type: ignore[arg-type]


def check_share(name: str, value: object) -> None:
    """Raises InvalidRequest unless value is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise refused(name, "a number in (0, 1]", value)
