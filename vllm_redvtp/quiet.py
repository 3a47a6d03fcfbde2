"""Context managers that keep vLLM's logs and warnings out of a command's output.

vLLM logs to stdout, and warns through Python, its logger and C++ while it starts. `redvtp generate` prints the answer
to stdout and refuses in one line, so it runs vLLM inside these.
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
    """os.environ with `variables` in it. Restores it afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Sends stdout to stderr, of C++ libraries too. vLLM logs errors only, unless the user has set a level."""
    quiet = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", _LEVEL: os.environ.get(_LEVEL, _QUIET)}
    # vLLM logs while it is imported, before it reads its settings.
    logging.getLogger("vllm").setLevel(quiet[_LEVEL].upper())
    with environment(quiet), _descriptors(2, 1), redirect_stdout(sys.stderr):
        yield


@contextmanager
def start_up_noise(*expected: type[BaseException]) -> Iterator[None]:
    """Drops warnings and holds back stdout and stderr. Shows them after an error that is not `expected`.

    Use it within `logs_on_stderr`. Does nothing if the user has set a log level.
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
    """Redirects file descriptors of this process to the file of `target`."""
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
