"""Errors whose message is for the person who can correct the input, and the one place that turns one into the other.

A message is a sequence of parts: text, and the parameters it speaks of as `Knob`. The same parameter has another name
in Python (`keep_ratio`), in the command (`--keep-ratio`) and over HTTP (`redvtp_keep_ratio`). The code that refuses a
value does not know where it came from; the code that shows the message does, and writes each knob as it was typed.
Everything else keeps its traceback: it is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter in a message, by its name in Python: a field of DenoisingParams or PruningParams, or an option of
    an engine."""

    name: str


class Refusal(Exception):
    """A message in parts, as in InvalidRequest("raise ", Knob("gen_length")). str() gives the names in Python."""

    def __init__(self, *parts: str | Knob) -> None:
        # As the exception's args they survive a pickle.
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with each knob as `spell` writes it."""
        return "".join(spell(part.name) if isinstance(part, Knob) else part for part in self.parts)


class InvalidRequest(Refusal, ValueError):
    """A request that cannot be served. The message names the parameter, the value and what is allowed.

    A server answers it with HTTP 400, the command with status 2.
    """


class BadInput(Refusal):
    """Something the user of the command can correct; the message is one line that says what and how."""


def spelled(error: ValueError, spell: Callable[[str], str]) -> str:
    """The message of an error that may be a Refusal."""
    return error.spelled(spell) if isinstance(error, InvalidRequest) else str(error)


@contextmanager
def refusing() -> Iterator[None]:
    """Within it, a ValueError is an error in the user's input. Outside, it is a bug and keeps its traceback."""
    try:
        yield
    except ValueError as error:
        parts = error.parts if isinstance(error, InvalidRequest) else (str(error),)
        raise BadInput(*parts) from error
