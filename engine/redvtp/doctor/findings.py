"""What was found, as lines for people; what has a remedy is a problem."""

from __future__ import annotations

from dataclasses import dataclass

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    topic: the heading that it stands under.
    text: what was found.
    remedy: what to do about it; empty where nothing is wrong.
    """

    topic: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        return f"! {text} -> {self.remedy}" if self.remedy else f"  {text}"


def readable(size: float) -> str:
    """A number of bytes, with three digits at most."""
    power = 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.3g} {_UNITS[power]}"
