"""Checks of single values, and how a message shows a refused one.

Each check raises InvalidRequest naming the knob, the value and what is allowed.
"""

from __future__ import annotations

import math

from redvtp.errors import InvalidRequest

# Longer text fits no canvas and no context; tokenising megabytes to find that out would hold up a server.
MAX_TEXT_LENGTH = 1 << 16
_SHOWN_LENGTH = 120
_FLOAT32_LIMIT = 3e38


def shown(value: object) -> str:
    """A refused value as a message shows it: what a client sends may be megabytes long."""
    text = value[: _SHOWN_LENGTH + 1] if isinstance(value, str) else value
    text = repr(text)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InvalidRequest unless value is an integer from low to high; None is no limit."""
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidRequest(f"{name} must be an integer {allowed}, got {shown(value)}")


def is_number(value: object) -> bool:
    """Whether value is a finite number; booleans are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, float) and math.isfinite(value)


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless value is one of `allowed`."""
    if value not in allowed:
        raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def check_text(name: str, value: str) -> None:
    """Raises InvalidRequest for text that is too long or no valid Unicode."""
    if len(value) > MAX_TEXT_LENGTH:
        raise InvalidRequest(f"{name} must have at most {MAX_TEXT_LENGTH:,} characters, got {len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer and no wire format takes.
        raise InvalidRequest(f"{name} must be valid Unicode, got {shown(value)}") from None


def fits_float32(value: object) -> bool:
    """Whether value is a number that float32 holds."""
    return is_number(value) and abs(value) < _FLOAT32_LIMIT  # type: ignore[arg-type]


def check_share(name: str, value: object) -> None:
    """Raises InvalidRequest unless value is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise InvalidRequest(f"{name} must be a number in (0, 1], got {shown(value)}")
