"""What several commands check before a model is loaded, and how they print and start an engine.

Nothing here imports torch: a mistake in a flag is refused within a moment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redvtp.engines import EngineOptions
from redvtp.errors import BadInput, Knob, Refusal, refusing
from redvtp.model_folder import why_no_model
from redvtp.params import DenoisingParams

if TYPE_CHECKING:
    from PIL.Image import Image

    from redvtp.local import LocalEngine

INTERRUPTED = 130
ENGINE_FLAGS = ("dtype", "device", "max_model_len", "block_size", "kv_cache_memory_bytes", "attention")
# Whether the device is there, torch knows; it is not imported here.
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
EXTRA = "pip install 'vllm-redvtp[eval]'"


class Mistakes:
    """Gathers what is wrong with a command line, so that all of it is said at once.

    mistakes = Mistakes()
    with mistakes:
        check_checkpoint(options)
    with mistakes:
        images = open_images(options.image)
    mistakes.refuse()
    use(images)  # bound, since nothing was refused
    """

    def __init__(self) -> None:
        self._found: list[tuple[str | Knob, ...]] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, BadInput | ValueError):
            return False
        self._found.append(error.parts if isinstance(error, Refusal) else (str(error),))
        return True

    def refuse(self) -> None:
        """Raises BadInput with all that was found, if anything was."""
        if not self._found:
            return
        first, *others = dict.fromkeys(self._found)
        raise BadInput(*first, *(part for parts in others for part in ("; also: ", *parts)))


def positive(flag: str, value: object) -> int | None:
    """`value` if it was not given or is a positive integer. Raises BadInput otherwise."""
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise BadInput(f"--{flag} must be an integer >= 1, got {value!r}")


def denoising_of(options: argparse.Namespace, **instead: object) -> DenoisingParams:
    """The denoising flags; `instead` overrides some of them. Raises ValueError naming the first bad value."""
    given = vars(options) | {"stop": tuple(options.stop)} | instead
    return DenoisingParams(**{field.name: given[field.name] for field in fields(DenoisingParams)})


def check_file(flag: str, path: Path) -> None:
    """Raises BadInput for a file that could not be written: an answer takes minutes and must not be lost."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"--{flag} {path} cannot be written; name a file in a folder that exists")


def check_picture(flag: str, path: Path) -> None:
    """Raises BadInput for a file that no image could be written to."""
    from PIL import Image

    check_file(flag, path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise BadInput(f"--{flag} {path} does not end like an image file; use .png")


def check_checkpoint(options: argparse.Namespace) -> None:
    """Raises BadInput if the model is no checkpoint folder, or an engine flag has a value that it cannot have."""
    positive("max-model-len", options.max_model_len)
    positive("block-size", options.block_size)
    if options.device is not None and not _DEVICE.fullmatch(options.device):
        raise BadInput(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    size = options.kv_cache_memory_bytes
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BadInput(f"--kv-cache-memory-bytes must be a number of bytes such as 800M or 4G, got {size!r}")
    reason = why_no_model(options.model)
    if reason is not None:
        raise BadInput(reason)


def check_libraries() -> None:
    """Raises BadInput if a library of the `eval` extra is missing. Without matplotlib only the plots are missing."""
    for name in ("openai", "scipy"):
        if find_spec(name) is None:
            raise BadInput(f"{name} is not installed; {EXTRA}")


def open_images(paths: list[Path]) -> tuple[Image, ...]:
    """Raises BadInput naming every file that is no image."""
    from redvtp.vision.images import open_image

    mistakes, images = Mistakes(), []
    for path in paths:
        with mistakes:
            images.append(open_image(path))
    mistakes.refuse()
    return tuple(images)


def read_json(name: str, path: Path) -> Any:
    """The JSON in a file. Raises BadInput, calling the file `name`, if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name} is not JSON: {error}") from error


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The engine flags. Raises BadInput for one that has a value that it cannot have."""
    check_checkpoint(options)
    progress = sys.stderr.isatty()
    return EngineOptions(options.model, progress=progress, **_engine_flags(options))


def start_engine(options: argparse.Namespace, max_num_seqs: int, **more: Any) -> LocalEngine:
    """The embedded engine. more: for `LocalEngine`. Raises BadInput for a checkpoint it cannot load."""
    from redvtp.local import LocalEngine

    with refusing():
        return LocalEngine(options.model, max_num_seqs=max_num_seqs, **_engine_flags(options), **more)


def _engine_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `flags.engine_flags` under the names that `EngineOptions` and `LocalEngine` have for them."""
    return {name: getattr(options, name) for name in ENGINE_FLAGS}


def say(text: str) -> None:
    """Prints to stdout. Ignores a closed stdout (`| head`): the files are written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(command: str, text: str) -> None:
    """One line on stderr, with the command's name."""
    print(f"redvtp {command}: {' '.join(text.split())}", file=sys.stderr)
