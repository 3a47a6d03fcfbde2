"""What the engine needs to know about a checkpoint, read from its `config.json` and checked once.

`load_config(model_dir)` is the only reader of that file. A checkpoint this engine cannot run exactly is refused here,
with the key, its value and what is supported, so nothing further down has to guess. `DvlmConfig.from_dict` takes the
same keys from a mapping (vLLM hands its own copy of them over).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redvtp.families.family import Family, family_of


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Geometry of the whole SigLIP tower as published; the engine runs only the layers its features come from.

    num_hidden_layers: layers of the FULL tower, the dropped last ones included.
    image_size: side of one tile in pixels.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"vision tower {key} must be at least 1, got {getattr(self, key)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision tower hidden_size {self.hidden_size} is not a multiple of "
                f"its num_attention_heads {self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"vision tower patch_size {self.patch_size} is larger than its image_size {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Visual tokens along one side of a tile; pixels that do not fill a patch are dropped by the tower."""
        return self.image_size // self.patch_size

    def kept_layers(self, select_layer: int) -> int:
        """Layers that must run to have the hidden state `select_layer` (-1 is the output of the last layer)."""
        return self.num_hidden_layers + 1 + select_layer


# The tower repository is often not at hand, and config.json names it without its geometry. SigLIP and SigLIP 2 agree.
SO400M_PATCH14_384 = TowerConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


@dataclass(frozen=True, slots=True)
class DvlmConfig:
    """A checkpoint's numbers, under the names most of the families' `config.json` use.

    family: what the architecture implies. vocab_size: rows of the embedding and of the head.
    mask_token_id: as the checkpoint says; None leaves it to the tokenizer.
    image_grid_pinpoints: (width, height) in pixels, each a multiple of the tile; the order breaks ties.
    tokenizer_model_max_length: longest prompt the checkpoint was trained for, None when it does not say.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    max_position_embeddings: int
    tokenizer_model_max_length: int | None
    torch_dtype: str
    eos_token_id: int | None
    mask_token_id: int | None
    image_aspect_ratio: str
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    mm_hidden_size: int
    mm_vision_select_layer: int
    tower: TowerConfig

    @property
    def max_length(self) -> int:
        """Longest prompt and response together."""
        return min(self.max_position_embeddings, self.tokenizer_model_max_length or self.max_position_embeddings)

    @property
    def qkv_bias(self) -> bool:
        return self.family.qkv_bias

    @property
    def max_grid_tiles(self) -> int | None:
        """k of `anyres_max_k`: the grid's features are scaled down to about k tiles. None: no limit."""
        match = re.fullmatch(r"anyres_max_(\d+)", self.image_aspect_ratio)
        return int(match.group(1)) if match else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], model_dir: str | Path) -> DvlmConfig:
        """Checks and picks the keys; `model_dir` is only where a tower named by a relative path is looked for."""
        family = family_of(raw.get("architectures"))
        _check_supported(raw, family)
        tower = _tower_config(raw, Path(model_dir))

        def size(name: str, default: int | None = None) -> int:
            return _integer(raw, family.keys.get(name, name), default)

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        select_layer = int(raw.get("mm_vision_select_layer", -2))
        config = cls(
            family=family,
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", default=heads),
            head_dim=size("head_dim", default=hidden // heads),
            rms_norm_eps=float(_number(raw, "rms_norm_eps")),
            rope_theta=_rope_theta(raw),
            vocab_size=size("vocab_size"),
            max_position_embeddings=size("max_position_embeddings"),
            tokenizer_model_max_length=_optional_integer(raw, "tokenizer_model_max_length"),
            torch_dtype=_dtype_name(raw),
            eos_token_id=_optional_integer(raw, "eos_token_id"),
            mask_token_id=_optional_integer(raw, "mask_token_id"),
            image_aspect_ratio=str(raw["image_aspect_ratio"]),
            image_grid_pinpoints=_pinpoints(raw, tower.image_size),
            mm_hidden_size=_integer(raw, "mm_hidden_size"),
            mm_vision_select_layer=select_layer,
            tower=tower,
        )
        if heads % config.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {config.head_dim}")
        if config.mm_hidden_size != tower.hidden_size:
            raise ValueError(
                f"mm_hidden_size {config.mm_hidden_size} differs from the tower's hidden_size {tower.hidden_size}"
            )
        if tower.kept_layers(select_layer) < 1:
            raise ValueError(
                f"mm_vision_select_layer {select_layer} leaves no layer of the tower's {tower.num_hidden_layers}"
            )
        return config


def load_config(model_dir: str | Path, overrides: Mapping[str, Any] | None = None) -> DvlmConfig:
    """Reads `model_dir/config.json`; `overrides` replaces top-level keys before anything is checked."""
    path = Path(model_dir) / "config.json"
    return DvlmConfig.from_dict({**_read_json(path), **(overrides or {})}, model_dir)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is {path.parent} a checkpoint folder?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(raw) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _check_supported(raw: Mapping[str, Any], family: Family) -> None:
    for key, (default, supported) in family.supported.items():
        value = raw.get(key, default)
        if key == "rope_scaling" and isinstance(value, Mapping) and _is_plain_rope(value):
            continue
        if value not in supported:
            raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(map(repr, supported))}")
    ratio = raw.get("image_aspect_ratio")
    if not isinstance(ratio, str) or not re.fullmatch(family.aspect_ratios, ratio):
        raise ValueError(f"image_aspect_ratio {ratio!r} is not supported; supported: {family.allowed_ratios}")


def _is_plain_rope(rope: Mapping[str, Any]) -> bool:
    """True for the form transformers 5 writes when nothing is scaled: {"rope_theta": ..., "rope_type": "default"}."""
    return rope.get("rope_type", rope.get("type", "default")) == "default" and not set(rope) - {
        "rope_theta",
        "rope_type",
        "type",
    }


def _rope_theta(raw: Mapping[str, Any]) -> float:
    rope = raw.get("rope_parameters")
    if isinstance(rope, Mapping):
        # transformers 5 moves the flat key in here when it reads a config; vLLM passes on what it read.
        if not _is_plain_rope(rope):
            raise ValueError(f"rope_parameters {dict(rope)!r} is not supported; supported: rope_type 'default'")
        if "rope_theta" in rope:
            return float(_number(rope, "rope_theta"))
    return float(_number(raw, "rope_theta"))


def _pinpoints(raw: Mapping[str, Any], tile: int) -> tuple[tuple[int, int], ...]:
    value = raw.get("image_grid_pinpoints")
    if value is None and raw["image_aspect_ratio"] == "pad":
        return ()
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"image_grid_pinpoints must be a list of [width, height] pairs, got {value!r}")
    for pair in value:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(edge, int) and edge > 0 and edge % tile == 0 for edge in pair)
        ):
            raise ValueError(
                f"image_grid_pinpoints entry {pair!r} is not a pair of multiples of the tower's image_size {tile}"
            )
    return tuple((width, height) for width, height in value)


def _tower_config(raw: Mapping[str, Any], model_dir: Path) -> TowerConfig:
    """Geometry from the checkpoint's config, else from the tower's own folder, else the published so400m numbers."""
    if isinstance(raw.get("vision_config"), Mapping):
        return _parse_tower(raw["vision_config"], "vision_config")
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ValueError(f"mm_vision_tower must name the SigLIP tower, got {name!r}")
    last = name.rstrip("/").split("/")[-1]
    # An absolute name makes the join below ignore model_dir, which is what is wanted.
    for folder in (model_dir / name, model_dir.absolute().parent / last):
        path = folder / "config.json"
        if path.is_file():
            tower = _read_json(path)
            return _parse_tower(tower.get("vision_config", tower), str(path))
    if "so400m-patch14-384" in last:
        return SO400M_PATCH14_384
    raise ValueError(
        f"the geometry of mm_vision_tower {name!r} is not known: put the tower's folder at "
        f"{model_dir.absolute().parent / last} or add its vision_config to {model_dir / 'config.json'}"
    )


def _parse_tower(raw: Mapping[str, Any], where: str) -> TowerConfig:
    for key, supported in (("hidden_act", "gelu_pytorch_tanh"), ("num_channels", 3)):
        if raw.get(key, supported) != supported:
            raise ValueError(f"{key} {raw[key]!r} in {where} is not supported; supported: {supported!r}")
    # Only the epsilon has a default: transformers' other SigLIP defaults are those of another, smaller tower.
    return TowerConfig(
        hidden_size=_integer(raw, "hidden_size", where=where),
        intermediate_size=_integer(raw, "intermediate_size", where=where),
        num_hidden_layers=_integer(raw, "num_hidden_layers", where=where),
        num_attention_heads=_integer(raw, "num_attention_heads", where=where),
        image_size=_integer(raw, "image_size", where=where),
        patch_size=_integer(raw, "patch_size", where=where),
        layer_norm_eps=float(_number(raw, "layer_norm_eps")) if "layer_norm_eps" in raw else 1e-6,
    )


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None, where: str = "config.json") -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{where} lacks {key!r}")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _optional_integer(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} must be an integer, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return value


def _dtype_name(raw: Mapping[str, Any]) -> str:
    """The dtype's name (vLLM's copy may hold a torch dtype); like the official loader, float16 if unsaid."""
    return str(raw.get("torch_dtype") or raw.get("dtype") or "float16").removeprefix("torch.")
