"""Reading checkpoints: real layouts load, and what cannot run exactly is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden_data import ALL, checkpoint_dir
from redvtp.families.config import load_config, read_config
from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import checkpoint_weights, load_weights
from redvtp.vision.encoder import TiledEncoder
from redvtp.vision.geometry import SO400M_PATCH14_384, TowerConfig
from redvtp.vision.path import TiledVision
from vision_geometries import tiled_vision

TINY = "tiny-llada-v"
TOWER = "model.vision_tower.vision_tower.vision_model."


def _raw(checkpoint: str = TINY) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((checkpoint_dir(checkpoint) / "config.json").read_text())
    return raw


def _weights(checkpoint: str = TINY) -> dict[str, Tensor]:
    return load_file(checkpoint_dir(checkpoint) / "model.safetensors")


def _model() -> Dvlm:
    return Dvlm(load_config(checkpoint_dir(TINY)))


def test_tiny_config_is_read() -> None:
    config = load_config(checkpoint_dir(TINY))
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim, config.vocab_size) == (64, 4, 16, 640)
    assert (config.rope_theta, config.rms_norm_eps, config.torch_dtype) == (500_000.0, 1e-5, "float32")
    vision = tiled_vision(TINY)
    assert vision.alone.tiling.max_grid_tiles == 4
    assert vision.alone.tiling.pinpoints[1] == (56, 112)
    tower = vision.tower
    assert (tower.num_hidden_layers, tower.kept_layers(-2), tower.image_size, tower.side) == (3, 2, 56, 4)


def test_olmo_config_is_read_under_its_own_names() -> None:
    config = load_config(checkpoint_dir("tiny-lavida"))
    assert config.family.architecture == "LlavaLladaForMaskedDiffusion"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 128, 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 16)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (640, 4096, 1e-5)
    with pytest.raises(ValueError, match=r"config\.json lacks 'd_model'"):
        load_config(checkpoint_dir("tiny-lavida"), {"d_model": None})


def test_dream_config_has_biases_and_fewer_key_heads() -> None:
    config = load_config(checkpoint_dir("tiny-lavida-dream"))
    assert config.family.architecture == "LlavaDreamForMaskedDiffusion"
    assert (config.num_attention_heads, config.num_key_value_heads, config.qkv_bias) == (4, 2, True)
    assert (config.rope_theta, config.rms_norm_eps, config.mask_token_id) == (1e6, 1e-6, 584)


@pytest.mark.parametrize(
    ("checkpoint", "key", "value"),
    [
        ("tiny-lavida", "block_type", "sequential"),
        ("tiny-lavida", "alibi", True),
        ("tiny-lavida", "include_qkv_bias", True),
        ("tiny-lavida", "weight_tying", True),
        ("tiny-lavida", "layer_norm_type", "default"),
        ("tiny-lavida", "mm_spatial_pool_mode", "average"),
        ("tiny-lavida", "mm_pooler_ratio", 3),
        # Its code for pooled tiles never met a limit of tiles.
        ("tiny-lavida", "image_aspect_ratio", "anyres_max_4"),
        ("tiny-lavida-dream", "use_sliding_window", True),
        ("tiny-lavida-dream", "tie_word_embeddings", True),
    ],
)
def test_unsupported_value_of_the_other_families_is_refused(checkpoint: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}.*is not supported; supported: ") as refusal:
        load_config(checkpoint_dir(checkpoint), {key: value})
    assert repr(value) in str(refusal.value)


def test_patches_that_do_not_fit_are_dropped() -> None:
    assert tiled_vision("tiny-llada-v-b").tower.side == 60 // 14


def test_overrides_replace_keys() -> None:
    config = load_config(checkpoint_dir(TINY), {"image_aspect_ratio": "anyres", "max_position_embeddings": 99})
    assert tiled_vision(TINY, {"image_aspect_ratio": "anyres"}).alone.tiling.max_grid_tiles is None
    assert config.max_position_embeddings == 99


def test_config_as_transformers_5_writes_it_reads_the_same() -> None:
    raw = _raw()
    theta = raw.pop("rope_theta")
    raw["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    raw["dtype"] = torch.float32
    del raw["torch_dtype"]
    assert read_config(raw, checkpoint_dir(TINY)) == load_config(checkpoint_dir(TINY))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlavaQwenForCausalLM"]),
        ("architectures", None),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        ("mm_patch_merge_type", "flat"),
        ("mm_projector_type", "linear"),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_resampler_type", "qformer"),
        ("mm_use_im_start_end", True),
        ("use_pos_skipping", True),
        ("image_aspect_ratio", "square"),
        ("image_aspect_ratio", "anyres_max_0"),
    ],
)
def test_unsupported_value_is_refused_with_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}.*is not supported; supported: ") as refusal:
        load_config(checkpoint_dir(TINY), {key: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "config.json lacks 'hidden_size'"),
        ("num_hidden_layers", "4", "num_hidden_layers must be a positive integer, got '4'"),
        ("rope_theta", 0, "rope_theta must be a positive number, got 0"),
        ("rms_norm_eps", None, "rms_norm_eps must be a positive number, got None"),
        ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("mm_hidden_size", 48, "mm_hidden_size 48 differs from the tower's hidden_size 32"),
        ("image_grid_pinpoints", [[56, 100]], r"image_grid_pinpoints entry \[56, 100\] is not a pair of multiples"),
        ("image_grid_pinpoints", [], r"must be a list of \[width, height\] pairs"),
        ("tokenizer_model_max_length", "long", "tokenizer_model_max_length must be an integer"),
    ],
)
def test_broken_value_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(checkpoint_dir(TINY), {key: value})


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist; is .* a checkpoint folder"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_config(tmp_path)


def _vision_config() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((checkpoint_dir("siglip2-so400m-patch14-tiny56") / "config.json").read_text())
    vision: dict[str, Any] = raw["vision_config"]
    return vision


def _tower(raw: dict[str, Any], model_dir: Path) -> TowerConfig:
    vision = read_config(raw, model_dir).vision
    assert isinstance(vision, TiledVision)
    return vision.tower


def test_tower_is_found_beside_below_and_by_absolute_name(tmp_path: Path) -> None:
    expected = tiled_vision(TINY).tower
    model_dir = tmp_path / "models" / "mine"
    model_dir.mkdir(parents=True)
    for folder, name in [
        (tmp_path / "models" / "beside", "someone/beside"),
        (model_dir / "below", "below"),
        (tmp_path / "elsewhere", str(tmp_path / "elsewhere")),
    ]:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vision_config": _vision_config()}))
        assert _tower({**_raw(), "mm_vision_tower": name}, model_dir) == expected


def test_tower_in_the_checkpoints_own_config_wins(tmp_path: Path) -> None:
    raw = {**_raw(), "mm_vision_tower": "google/siglip2-so400m-patch14-384", "vision_config": _vision_config()}
    assert _tower(raw, tmp_path) == tiled_vision(TINY).tower


def test_published_tower_needs_no_folder(tmp_path: Path) -> None:
    raw = {
        **_raw(),
        "mm_vision_tower": "google/siglip2-so400m-patch14-384",
        "mm_hidden_size": 1152,
        "image_grid_pinpoints": [[384, 768], [768, 384]],
    }
    tower = _tower(raw, tmp_path)
    assert tower == SO400M_PATCH14_384
    assert tower.side == 27


def test_unknown_tower_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mm_vision_tower 'x/clip' is not known: put the tower's folder at .*/clip or"
    ):
        read_config({**_raw(), "mm_vision_tower": "x/clip"}, tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' in vision_config is not supported"),
        ({"num_channels": 1}, "num_channels 1 in vision_config is not supported"),
        ({"patch_size": None}, "vision_config lacks 'patch_size'"),
        ({"patch_size": 57}, "patch_size 57 is larger than its image_size 56"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of its num_attention_heads 5"),
        ({"num_hidden_layers": 1}, "leaves no layer of the tower's 1"),
    ],
)
def test_broken_tower_is_refused(change: dict[str, Any], message: str) -> None:
    raw = {**_raw(), "vision_config": {**_vision_config(), **change}}
    with pytest.raises(ValueError, match=message):
        read_config(raw, checkpoint_dir(TINY))


@pytest.mark.parametrize("checkpoint", ALL)
def test_every_parameter_is_the_checkpoints(checkpoint: str) -> None:
    model = Dvlm(load_config(checkpoint_dir(checkpoint)))
    loaded = load_weights(model, checkpoint_weights(checkpoint_dir(checkpoint)))
    assert loaded == {name for name, _ in model.named_parameters()}
    stored = load_file(checkpoint_dir(checkpoint) / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[model.config.family.weights.theirs(name)]), name


@pytest.mark.parametrize("checkpoint", [TINY, "tiny-lavida", "tiny-lavida-dream"])
def test_names_lead_back_and_only_the_unused_norm_is_left_out(checkpoint: str) -> None:
    names = set(_weights(checkpoint))
    table = load_config(checkpoint_dir(checkpoint)).family.weights
    unused = {f"{TOWER}post_layernorm.{part}" for part in ("weight", "bias")} & names
    assert {name for name in names if table.ours(name) is None} == unused
    for name in names - unused:
        target = table.ours(name)
        assert target is not None
        assert table.theirs(target) == name


def test_sharded_checkpoint_loads_the_same(tmp_path: Path) -> None:
    weights = _weights()
    shards: dict[str, dict[str, Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for number, (name, tensor) in enumerate(weights.items()):
        list(shards.values())[number % 2][name] = tensor
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = dict(checkpoint_weights(tmp_path))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_whole_tower_in_the_checkpoint_is_cut_to_the_kept_layers() -> None:
    weights = _weights()
    last = {
        name.replace("layers.1.", "layers.2."): torch.zeros_like(tensor)
        for name, tensor in weights.items()
        if f"{TOWER}encoder.layers.1." in name
    }
    head = {f"{TOWER}head.probe": torch.zeros(1, 1, 32)}
    load_weights(_model(), (weights | last | head).items())


def test_missing_tensors_are_named_as_in_the_checkpoint() -> None:
    weights = _weights()
    for name in ("model.image_newline", "model.norm.weight"):
        del weights[name]
    with pytest.raises(ValueError, match=r"^checkpoint lacks 2 tensors: model\.image_newline, model\.norm\.weight$"):
        load_weights(_model(), weights.items())


def test_missing_and_unknown_tensors_of_lavida_are_named_as_in_its_checkpoint() -> None:
    weights = _weights("tiny-lavida")
    missing = {"model.transformer.ff_out.weight", "model.transformer.blocks.2.ff_out.weight"}
    left = {name: tensor for name, tensor in weights.items() if name not in missing}
    with pytest.raises(ValueError, match=f"^checkpoint lacks 2 tensors: {', '.join(sorted(missing))}$"):
        load_weights(Dvlm(load_config(checkpoint_dir("tiny-lavida"))), left.items())
    strange = {"model.transformer.blocks.0.q_norm.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"that the model does not: model\.transformer\.blocks\.0\.q_norm"):
        load_weights(Dvlm(load_config(checkpoint_dir("tiny-lavida"))), (weights | strange).items())


def test_missing_tower_layer_is_named() -> None:
    weights = {name: tensor for name, tensor in _weights().items() if "encoder.layers.1.mlp.fc1.bias" not in name}
    with pytest.raises(ValueError, match=rf"lacks 1 tensor: {TOWER}encoder\.layers\.1\.mlp\.fc1\.bias"):
        load_weights(_model(), weights.items())


def test_unknown_tensors_are_named() -> None:
    weights = _weights() | {"model.vision_resampler.query": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"has 1 tensor that the model does not: model\.vision_resampler\.query"):
        load_weights(_model(), weights.items())


@pytest.mark.parametrize("shape", [(64, 65), (1, 64), (64,)])
def test_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    weights = _weights() | {"model.mm_projector.2.weight": torch.zeros(shape)}
    with pytest.raises(
        ValueError, match=r"tensor model\.mm_projector\.2\.weight of shape .* expected shape \[64, 64\]"
    ):
        load_weights(_model(), weights.items())


def test_load_param_gets_every_parameter_once() -> None:
    seen: list[tuple[nn.Parameter, Tensor]] = []
    model = _model()
    load_weights(model, _weights().items(), load_param=lambda parameter, tensor: seen.append((parameter, tensor)))
    assert {id(parameter) for parameter, _ in seen} == {id(parameter) for parameter in model.parameters()}
    assert len(seen) == len(list(model.parameters()))
    assert all(parameter.shape == tensor.shape for parameter, tensor in seen)


def test_half_precision_model_takes_full_precision_weights() -> None:
    model = _model().to(torch.bfloat16)
    load_weights(model, _weights().items())
    assert isinstance(model.vision, TiledEncoder)
    assert torch.equal(model.vision.newline, _weights()["model.image_newline"].bfloat16())


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights in .*: neither model\.safetensors\.index\.json nor"):
        list(checkpoint_weights(tmp_path))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weight file named in .*: two\.safetensors"):
        list(checkpoint_weights(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}'])
def test_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is not a weight index"):
        list(checkpoint_weights(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 2_000, -1_000])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(checkpoint_dir(TINY) / "model.safetensors", file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        list(checkpoint_weights(tmp_path))
