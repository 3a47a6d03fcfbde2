"""vLLM inside a command: its settings in the environment for a while, and its chatter out of the command's output.

vLLM logs to stdout, and warns through Python, its logger and C++ while it starts. A command whose stdout is the answer,
and whose refusals are one line, wraps it in these.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

_LEVEL = "VLLM_LOGGING_LEVEL"
_QUIET = "ERROR"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `variables` in it; afterwards as it was."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """stdout is stderr meanwhile, for this process's C++ libraries too. vLLM logs errors only, if the user has set no
    level."""
    quiet = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", _LEVEL: os.environ.get(_LEVEL, _QUIET)}
    # What vLLM says while it is imported comes before it reads its settings.
    logging.getLogger("vllm").setLevel(quiet[_LEVEL].upper())
    with environment(quiet), _descriptors(2, 1), redirect_stdout(sys.stderr):
        yield


@contextmanager
def start_up_noise(*expected: type[BaseException]) -> Iterator[None]:
    """Warnings are dropped, what goes to stdout and stderr is held back; it is shown after an error not `expected`.

    Within `logs_on_stderr`. Not where the user has asked for logs: then all is wanted, also of a start that crashes.
    """
    if os.environ[_LEVEL] != _QUIET:
        yield
        return
    with tempfile.TemporaryFile() as noise, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _descriptors(noise.fileno(), 1, 2):
                yield
        except expected:
            raise
        except BaseException:
            noise.seek(0)
            with open(2, "wb", closefd=False) as stderr:
                shutil.copyfileobj(noise, stderr)
            raise


@contextmanager
def _descriptors(target: int, *descriptors: int) -> Iterator[None]:
    """File descriptors of this process lead to another one's file meanwhile."""
    saved = [os.dup(descriptor) for descriptor in descriptors]
    _flush()
    for descriptor in descriptors:
        os.dup2(target, descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, file in zip(descriptors, saved, strict=True):
            os.dup2(file, descriptor)
            os.close(file)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
