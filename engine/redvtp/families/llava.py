"""Building block: LLaVA's vision path, a SigLIP tower over tiles, with its config keys and tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redvtp.families.fields import Supported, check_supported, integer, number, read_json
from redvtp.vision.geometry import SO400M_PATCH14_384, Tiling, TowerConfig
from redvtp.vision.media import Size
from redvtp.vision.path import TiledVision
from redvtp.vision.tiled import TiledImage

_SUPPORTED: Supported = {
    "mm_patch_merge_type": ("flat", ("spatial_unpad",)),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_layer": (-2, (-2,)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_resampler_type": (None, (None,)),
    "mm_use_im_start_end": (False, (False,)),
    "mm_use_im_patch_token": (False, (False,)),
    "use_pos_skipping": (False, (False,)),
}
# Keys of families that pool every tile 2x2 after the projector.
_POOLED: Supported = {
    "mm_spatial_pool_mode": ("bilinear", ("bilinear",)),
    "mm_pooler_ratio": (2, (2,)),
}

_TOWER = "model.vision_tower.vision_tower.vision_model."
LLAVA_NAMES = (
    (_TOWER, "vision.tower."),
    ("model.mm_projector.", "vision.projector."),
    ("model.image_newline", "vision.newline"),
)
# The tower's final norm and pooling head come after the features that are used; position ids are a buffer that older
# transformers saved.
LLAVA_IGNORED = re.escape(_TOWER) + r"(post_layernorm\.|head\.|embeddings\.position_ids$)"


def read_llava(raw: Mapping[str, Any], model_dir: Path, *, pooled: bool, limited: bool) -> TiledVision:
    """The vision path of a checkpoint.

    model_dir: where the tower's folder is looked for.
    pooled: every tile is pooled 2x2; not where several images are padded.
    limited: "anyres_max_<k>" is supported.
    """
    check_supported(raw, {**_SUPPORTED, **_POOLED} if pooled else _SUPPORTED)
    ratio = _aspect_ratio(raw, limited)
    tower = _tower(raw, model_dir)
    select_layer = int(raw.get("mm_vision_select_layer", -2))
    if (width := integer(raw, "mm_hidden_size")) != tower.hidden_size:
        raise ValueError(f"mm_hidden_size {width} differs from the tower's hidden_size {tower.hidden_size}")
    if tower.kept_layers(select_layer) < 1:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} leaves no layer of the tower's {tower.num_hidden_layers}"
        )
    limit = re.fullmatch(r"anyres_max_(\d+)", ratio)
    alone = Tiling(
        tile=tower.image_size,
        patch=tower.patch_size,
        mode="pad" if ratio == "pad" else "anyres",
        pinpoints=_pinpoints(raw, tower.image_size, required=ratio != "pad"),
        max_grid_tiles=int(limit.group(1)) if limit else None,
        pooled=pooled,
    )
    # As the official evaluations pass several images of one request.
    several = Tiling(tile=tower.image_size, patch=tower.patch_size, mode="pad", newline=False)
    return TiledVision(tower, select_layer, TiledImage(alone), TiledImage(several))


def _aspect_ratio(raw: Mapping[str, Any], limited: bool) -> str:
    ratio = raw.get("image_aspect_ratio")
    pattern = r"anyres(_max_[1-9]\d*)?|pad" if limited else r"anyres|pad"
    if not isinstance(ratio, str) or not re.fullmatch(pattern, ratio):
        values = "'anyres', 'anyres_max_<k>', 'pad'" if limited else "'anyres', 'pad'"
        raise ValueError(f"image_aspect_ratio {ratio!r} is not supported; supported: {values}")
    return ratio


def _pinpoints(raw: Mapping[str, Any], tile: int, required: bool) -> tuple[Size, ...]:
    value = raw.get("image_grid_pinpoints")
    if value is None and not required:
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


def _tower(raw: Mapping[str, Any], model_dir: Path) -> TowerConfig:
    """Sizes from the checkpoint's config, else from the tower's folder, else those of the published so400m."""
    if isinstance(raw.get("vision_config"), Mapping):
        return _read_tower(raw["vision_config"], "vision_config")
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ValueError(f"mm_vision_tower must name the SigLIP tower, got {name!r}")
    last = name.rstrip("/").split("/")[-1]
    # An absolute name makes the join ignore model_dir, as it should.
    for folder in (model_dir / name, model_dir.absolute().parent / last):
        path = folder / "config.json"
        if path.is_file():
            tower = read_json(path)
            return _read_tower(tower.get("vision_config", tower), str(path))
    if "so400m-patch14-384" in last:
        return SO400M_PATCH14_384
    raise ValueError(
        f"the geometry of mm_vision_tower {name!r} is not known: put the tower's folder at "
        f"{model_dir.absolute().parent / last} or add its vision_config to {model_dir / 'config.json'}"
    )


def _read_tower(raw: Mapping[str, Any], where: str) -> TowerConfig:
    for key, supported in (("hidden_act", "gelu_pytorch_tanh"), ("num_channels", 3)):
        if raw.get(key, supported) != supported:
            raise ValueError(f"{key} {raw[key]!r} in {where} is not supported; supported: {supported!r}")
    # Only the epsilon has a default: transformers' other SigLIP defaults are those of another, smaller tower.
    return TowerConfig(
        hidden_size=integer(raw, "hidden_size", where=where),
        intermediate_size=integer(raw, "intermediate_size", where=where),
        num_hidden_layers=integer(raw, "num_hidden_layers", where=where),
        num_attention_heads=integer(raw, "num_attention_heads", where=where),
        image_size=integer(raw, "image_size", where=where),
        patch_size=integer(raw, "patch_size", where=where),
        layer_norm_eps=number(raw, "layer_norm_eps") if "layer_norm_eps" in raw else 1e-6,
    )
