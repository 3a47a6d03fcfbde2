"""When an answer counts as right: exact match after a normalisation that forgives spelling, not substance."""

from __future__ import annotations

from collections.abc import Iterable

FINAL_PUNCTUATION = ".,;:!?"


def normalize(text: str) -> str:
    """Case folded, white space at the ends removed and elsewhere one space, punctuation at the end removed.

    An answer of nothing but punctuation stays as it is.
    """
    words = " ".join(text.casefold().split())
    return words.rstrip(FINAL_PUNCTUATION + " ") or words


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    """Whether `answer` is one of the accepted ones, normalised."""
    return normalize(answer) in {normalize(text) for text in accepted}
