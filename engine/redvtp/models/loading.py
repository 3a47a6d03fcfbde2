"""Published checkpoints into our modules, unmodified, and clear errors when they do not match.

The engine loads with `load_weights(model, checkpoint_weights(model_dir))`. vLLM brings an iterator of tensors and a
`load_param` that calls its sharding weight loaders. Names come from the family; errors use those of the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from redvtp.models.dvlm import Dvlm

INDEX = "model.safetensors.index.json"

_TOWER_LAYER = re.compile(r"vision\.(?:\w+\.)*layers\.(\d+)\.")


def checkpoint_weights(model_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors file or shards in `model_dir`, one at a time, under the checkpoint's names."""
    for path in weight_files(model_dir):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open's handle is not a mapping
                yield name, file.get_tensor(name)


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with shapes and without data. Raises ValueError for a broken file."""
    with _opened(path) as file:
        return {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta")
            for name in file.keys()  # noqa: SIM118 - as above
        }


def check_weight_files(model_dir: str | Path) -> None:
    """Raises ValueError for weight files that are missing or cut short. Reads their headers only."""
    for path in weight_files(model_dir):
        with _opened(path):
            pass


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file (cut short while copying?): {error}") from error


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors file or shards in a folder. Raises ValueError naming all that are missing."""
    model_dir = Path(model_dir)
    index = model_dir / INDEX
    if not index.is_file():
        single = model_dir / "model.safetensors"
        if single.is_file():
            return [single]
        raise ValueError(f"no weights in {model_dir}: neither {INDEX} nor model.safetensors is there")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a weight index: {error!r}") from error
    files = [model_dir / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{model_dir} lacks {_count(missing, 'weight file')} named in {INDEX}: {', '.join(missing)}")
    return files


def load_weights(
    model: Dvlm,
    weights: Iterable[tuple[str, Tensor]],
    load_param: Callable[[nn.Parameter, Tensor], None] | None = None,
) -> set[str]:
    """Fills every parameter of `model`; returns their names.

    load_param: puts one tensor into one parameter, where that is more than a copy (tensor parallelism takes a shard).
    Raises ValueError naming, as the checkpoint does, every tensor that is missing, unknown, or of the wrong shape.
    """
    names = model.config.family.weights
    parameters = dict(model.named_parameters())
    tower_layers = {int(match.group(1)) for name in parameters if (match := _TOWER_LAYER.match(name))}
    load = load_param or _copy
    loaded: set[str] = set()
    unknown: list[str] = []
    for name, tensor in weights:
        target = names.ours(name)
        if target is None or _is_dropped_layer(target, tower_layers):
            continue
        if target not in parameters:
            unknown.append(name)
            continue
        try:
            load(parameters[target], tensor)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint tensor {name} of shape {list(tensor.shape)} does not fit the model: {error}"
            ) from error
        loaded.add(target)
    if unknown:
        raise ValueError(
            f"checkpoint has {_count(unknown, 'tensor')} that the model does not: {', '.join(sorted(unknown))}"
        )
    missing = sorted(names.theirs(name) for name in parameters.keys() - loaded)
    if missing:
        raise ValueError(f"checkpoint lacks {_count(missing, 'tensor')}: {', '.join(missing)}")
    return loaded


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    # copy_ broadcasts, which would hide a wrong shape.
    if parameter.shape != tensor.shape:
        raise ValueError(f"expected shape {list(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(tensor)


def _is_dropped_layer(target: str, kept: set[int]) -> bool:
    """True for the tower's layers after the last kept one; some checkpoints carry the whole tower."""
    match = _TOWER_LAYER.match(target)
    return match is not None and bool(kept) and int(match.group(1)) > max(kept)


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"
