"""Real checkpoint layouts into our modules: which tensor goes where, and clear errors when they do not match.

The engine loads with `load_weights(model, checkpoint_weights(model_dir))`; vLLM brings its own iterator of tensors and
a `load_param` that calls its sharding weight loaders. The tables below are read in both directions, so errors speak of
the checkpoint's names.
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

# (prefix in the checkpoint, prefix in Dvlm); the first that fits wins.
_VISION = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.", "projector."),
    ("model.image_newline", "image_newline"),
)
_LAYERS = "language_model.layers."
_LANGUAGE = {
    "llama": (
        ("model.embed_tokens.", "language_model.embed_tokens."),
        ("model.layers.", _LAYERS),
        ("model.norm.", "language_model.norm."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "olmo": (
        ("model.transformer.wte.", "language_model.embed_tokens."),
        ("model.transformer.blocks.", _LAYERS),
        ("model.transformer.ln_f.", "language_model.norm."),
        ("model.transformer.ff_out.", "language_model.lm_head."),
    ),
}
# Names inside a layer, where they differ from ours.
_IN_LAYER = {
    "llama": (),
    "olmo": (
        ("attn_norm.", "input_layernorm."),
        ("ff_norm.", "post_attention_layernorm."),
        ("q_proj.", "self_attn.q_proj."),
        ("k_proj.", "self_attn.k_proj."),
        ("v_proj.", "self_attn.v_proj."),
        ("attn_out.", "self_attn.o_proj."),
        ("ff_proj.", "mlp.gate_proj."),
        ("up_proj.", "mlp.up_proj."),
        ("ff_out.", "mlp.down_proj."),
    ),
}
# The tower's final norm and pooling head come after the features that are used; the others are buffers older
# transformers saved.
_UNUSED = re.compile(
    r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm\.|head\.|embeddings\.position_ids$)"
    r"|model\.(layers|transformer\.blocks)\.\d+\.(self_attn\.)?rotary_emb\.inv_freq$"
)
_TOWER_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")


def checkpoint_weights(model_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors file or shards in `model_dir`, one at a time, under the checkpoint's names."""
    for path in _weight_files(Path(model_dir)):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open's handle is not a mapping
                yield name, file.get_tensor(name)


def check_weight_files(model_dir: str | Path) -> None:
    """Raises ValueError for weight files that are missing or cut short. Reads their headers only."""
    for path in _weight_files(Path(model_dir)):
        with _opened(path):
            pass


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file (cut short while copying?): {error}") from error


def _weight_files(model_dir: Path) -> list[Path]:
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


def rename(name: str, layout: str) -> str | None:
    """The checkpoint's name -> the name in `Dvlm`; None for a tensor that is left out on purpose.

    layout: how the checkpoint names its tensors, see `Family`. A name no part of the model answers to comes back as it
    is, for `load_weights` to complain about.
    """
    if _UNUSED.match(name):
        return None
    return _translate(name, (*_VISION, *_LANGUAGE[layout]), _IN_LAYER[layout])


def checkpoint_name(name: str, layout: str) -> str:
    """The name in `Dvlm` -> the checkpoint's name."""
    prefixes = (*_VISION, *_LANGUAGE[layout])
    return _translate(name, _reversed(prefixes), _reversed(_IN_LAYER[layout]))


def _reversed(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((ours, theirs) for theirs, ours in pairs)


def _translate(name: str, prefixes: Iterable[tuple[str, str]], in_layer: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if not name.startswith(old):
            continue
        rest = name.removeprefix(old)
        if _LAYERS in (old, new):
            number, _, leaf = rest.partition(".")
            rest = f"{number}.{_translate(leaf, in_layer, ())}"
        return new + rest
    return name


def load_weights(
    model: Dvlm,
    weights: Iterable[tuple[str, Tensor]],
    load_param: Callable[[nn.Parameter, Tensor], None] | None = None,
) -> set[str]:
    """Fills every parameter of `model`; returns their names.

    load_param: puts one tensor into one parameter, where that is more than a copy (a shard of it under tensor
    parallelism). Raises ValueError naming, as the checkpoint does, every tensor that is missing, unknown, or of the
    wrong shape.
    """
    layout = model.config.family.layout
    parameters = dict(model.named_parameters())
    tower_layers = {int(match.group(1)) for name in parameters if (match := _TOWER_LAYER.match(name))}
    load = load_param or _copy
    loaded: set[str] = set()
    unknown: list[str] = []
    for name, tensor in weights:
        target = rename(name, layout)
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
    missing = sorted(checkpoint_name(name, layout) for name in parameters.keys() - loaded)
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
