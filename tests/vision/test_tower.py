"""The vision tower and what follows it, against the reference's features and visual tokens."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import SiglipVisionConfig

from golden_data import Case, cases, checkpoint_dir
from redvtp.families.config import load_config
from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import checkpoint_weights, load_weights
from redvtp.vision.encoder import TiledEncoder
from redvtp.vision.geometry import SO400M_PATCH14_384
from redvtp.vision.images import open_image
from redvtp.vision.media import MediaItem
from redvtp.vision.tower import VisionTower
from vision_geometries import tiled_vision

# float32 over a handful of layers, another order of summation; measured: 7e-6.
TOLERANCE = 1e-4


@cache
def _model(checkpoint: str) -> Dvlm:
    model = Dvlm(load_config(checkpoint_dir(checkpoint)))
    load_weights(model, checkpoint_weights(checkpoint_dir(checkpoint)))
    return model.eval().float()


def _vision(checkpoint: str) -> TiledEncoder:
    vision = _model(checkpoint).vision
    assert isinstance(vision, TiledEncoder)
    return vision


def _items(case: Case) -> list[MediaItem]:
    vision = load_config(case.model_dir, case.config_overrides).vision
    return vision.items([open_image(file) for file in case.image_files])


def _pixels(case: Case) -> Tensor:
    return torch.cat([item.inputs() for item in _items(case)])


def _assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", cases(tensor="vision_features"), ids=str)
@torch.inference_mode()
def test_features_equal_the_reference(case: Case) -> None:
    _assert_close(_vision(case.checkpoint).tower(_pixels(case)), case.base("vision_features"))


@pytest.mark.parametrize("case", cases(tensor="projected_features"), ids=str)
@torch.inference_mode()
def test_projected_features_equal_the_reference(case: Case) -> None:
    vision = _vision(case.checkpoint)
    _assert_close(vision.projector(vision.tower(_pixels(case))), case.base("projected_features"))


@pytest.mark.parametrize("case", [case for case in cases() if case.image_files], ids=str)
@torch.inference_mode()
def test_visual_tokens_from_the_png_equal_the_reference(case: Case) -> None:
    tokens = torch.cat(_vision(case.checkpoint).encode(_items(case)))
    # Images follow each other directly in the prompt (the separator is lost), so they are one stretch of it.
    start = case.meta["image_token_pos"][0]
    _assert_close(tokens, case.base("prompt_embeds")[start : start + len(tokens)])
    if case.has("visual_tokens"):
        _assert_close(tokens, case.base("visual_tokens"))


@torch.inference_mode()
def test_the_towers_own_repository_holds_other_weights() -> None:
    """Guards the tests above: with the tower repository's weights they would fail: those were not loaded."""
    case = next(case for case in cases() if case.image_files)
    tower = _vision(case.checkpoint).tower
    repository = checkpoint_dir("siglip2-so400m-patch14-tiny56")
    other = VisionTower(tiled_vision(case.checkpoint).tower)
    mine = dict(other.named_parameters())
    found = {name.removeprefix("vision_model."): tensor for name, tensor in checkpoint_weights(repository)}
    for name, parameter in mine.items():
        parameter.copy_(found[name])
    pixels = _pixels(case)
    assert (other(pixels) - tower(pixels)).abs().max() > 100 * TOLERANCE


@torch.inference_mode()
def test_tower_built_on_the_meta_device_works_after_loading() -> None:
    directory = checkpoint_dir("tiny-llada-v")
    with torch.device("meta"):
        vision = Dvlm(load_config(directory)).vision
    assert isinstance(vision, TiledEncoder)
    vision.tower.to_empty(device="cpu")
    weights = {
        name.split("vision_model.")[1]: tensor
        for name, tensor in checkpoint_weights(directory)
        if "vision_model." in name and "post_layernorm" not in name
    }
    vision.tower.load_state_dict(weights)
    pixels = torch.randn(2, 3, 56, 56)
    assert torch.equal(vision.tower(pixels), _vision("tiny-llada-v").tower(pixels))


def test_published_tower_keeps_26_of_27_layers_and_no_head() -> None:
    with torch.device("meta"):
        tower = VisionTower(SO400M_PATCH14_384)
    names = dict(tower.named_parameters())
    assert len({name.split(".")[2] for name in names if name.startswith("encoder.layers.")}) == 26
    assert {name.split(".")[0] for name in names} == {"embeddings", "encoder"}
    # 428 million parameters, of which the last layer, the norm and the head are left out.
    assert 395e6 < sum(parameter.numel() for parameter in tower.parameters()) < 400e6


def test_tiles_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels must be \[tiles, 3, 56, 56\], got \[1, 3, 60, 60\]"):
        _vision("tiny-llada-v").tower(torch.zeros(1, 3, 60, 60))


def test_choosing_sdpa_by_hand_is_still_needed() -> None:
    """Fails when transformers chooses sdpa for a bare config: the assignment in VisionTower can then go."""
    assert SiglipVisionConfig()._attn_implementation != "sdpa"
    assert _vision("tiny-llada-v").tower.encoder.config._attn_implementation == "sdpa"
