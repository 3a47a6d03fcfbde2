"""Errors whose message is for the person who can correct the input, and the one place that turns one into the other.

Everything else keeps its traceback: it is a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InvalidRequest(ValueError):
    """A request that cannot be served. The message names the parameter, the value and what is allowed.

    A server answers it with HTTP 400, the command with status 2.
    """


class BadInput(Exception):
    """Something the user of the command can correct; the message is one line that says what and how."""


@contextmanager
def refusing() -> Iterator[None]:
    """Within it, a ValueError is an error in the user's input. Outside, it is a bug and keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error
