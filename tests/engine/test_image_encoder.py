"""The tower looks once at each image: all new ones together, none that is remembered, within a number of bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

import golden_data
from devices import DEVICE
from redvtp.local import LocalEngine, Request
from redvtp.models.visual_cache import ImageEncoder
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.vision.encoder import TILES_AT_ONCE, TiledEncoder
from redvtp.vision.media import MediaItem, Treatment, content_digest
from vision_geometries import tiled_vision

EngineFactory = Callable[..., LocalEngine]
CHECKPOINT = "tiny-llada-v"
ANYRES = tiled_vision(CHECKPOINT).alone
PAD = tiled_vision(CHECKPOINT).several


@contextmanager
def _tower_calls(local: LocalEngine) -> Iterator[list[int]]:
    """The number of tiles of every call of the tower."""
    calls: list[int] = []
    assert isinstance(local.model.vision, TiledEncoder)
    hook = local.model.vision.tower.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    try:
        yield calls
    finally:
        hook.remove()


def _image(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def _item(image: Image.Image, treatment: Treatment = ANYRES) -> MediaItem:
    return MediaItem("image", content_digest(image), image.size, treatment, lambda: treatment.inputs(image))


def _alone(local: LocalEngine, image: Image.Image, treatment: Treatment) -> torch.Tensor:
    with torch.inference_mode():
        (tokens,) = local.model.vision.encode([_item(image, treatment)])
    return tokens


def test_equal_pixels_have_equal_digests_and_others_do_not() -> None:
    image = _image(1, (6, 4))
    assert content_digest(image) == content_digest(image.copy())
    changed = image.copy()
    changed.putpixel((5, 3), (1, 2, 3))
    assert content_digest(changed) != content_digest(image)
    # The same bytes in another shape are another picture.
    assert content_digest(Image.frombytes("RGB", (4, 6), image.tobytes())) != content_digest(image)
    # What the tower sees of a palette are its colours.
    palette = image.quantize(4)
    assert content_digest(palette) == content_digest(palette.convert("RGB"))


@torch.inference_mode()
def test_new_images_go_through_the_tower_together_and_old_ones_not_at_all(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    encoder = ImageEncoder(local.model)
    one, two, padded = _image(1), _image(2, (40, 90)), _image(3)
    inputs = [_item(one), _item(two), _item(padded, PAD), _item(one.copy())]
    with _tower_calls(local) as calls:
        first = encoder.encode(inputs)
        tiles = [image.inputs().shape[0] for image in inputs[:3]]
        assert sum(tiles) <= TILES_AT_ONCE
        assert calls == [sum(tiles)], "one call, and an image that is there twice only once"
        again = encoder.encode([inputs[2], inputs[0], _item(one, PAD)])
        assert calls[1:] == [1], "tiled in another way an image is another one"
    for tokens, (image, treatment) in zip(
        first, [(one, ANYRES), (two, ANYRES), (padded, PAD), (one, ANYRES)], strict=True
    ):
        torch.testing.assert_close(tokens, _alone(local, image, treatment), rtol=1e-5, atol=1e-5)
    assert torch.equal(again[0], first[2])
    assert torch.equal(again[1], first[0])


@torch.inference_mode()
def test_many_tiles_are_taken_a_few_at_a_time(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    images = [_image(seed) for seed in range(2 * TILES_AT_ONCE + 3)]
    with _tower_calls(local) as calls:
        tokens = ImageEncoder(local.model).encode([_item(image, PAD) for image in images])
    assert calls == [TILES_AT_ONCE, TILES_AT_ONCE, 3]
    torch.testing.assert_close(tokens[-1], _alone(local, images[-1], PAD), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_least_recently_used_images_are_forgotten_beyond_the_budget(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    images = [_item(_image(seed)) for seed in range(3)]
    (tokens,) = ImageEncoder(local.model, 0).encode(images[:1])
    encoder = ImageEncoder(local.model, 2 * tokens.nbytes)
    with _tower_calls(local) as calls:
        encoder.encode(images[:2])
        encoder.encode([images[0]])
        encoder.encode([images[2]])
        assert encoder.bytes_held == 2 * tokens.nbytes
        del calls[:]
        encoder.encode([images[0], images[2]])
        assert calls == []
        encoder.encode([images[1]])
        assert len(calls) == 1
        encoder.clear()
        assert encoder.bytes_held == 0
        encoder.encode([images[1]])
        assert len(calls) == 2


@torch.inference_mode()
def test_no_budget_remembers_nothing(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    encoder = ImageEncoder(local.model, 0)
    with _tower_calls(local) as calls:
        for _ in range(2):
            encoder.encode([_item(_image(1))])
    assert len(calls) == 2
    assert encoder.bytes_held == 0


@pytest.mark.parametrize("case", ["wide", "two_pad_tensor"])
def test_second_request_with_the_same_images_does_not_run_the_tower(engine: EngineFactory, case: str) -> None:
    local = LocalEngine(golden_data.checkpoint_dir(CHECKPOINT), dtype="float32", device=DEVICE)
    images = tuple(golden_data.Case(CHECKPOINT, case).images())
    prompts = [chat_prompt(local.tokenizer, question, len(images)) for question in ("What is it?", "Which colour?")]
    denoising = DenoisingParams(gen_length=16, steps=8, ignore_eos=True)
    requests = [Request(prompt, images, denoising, PruningParams(keep_ratio=0.3)) for prompt in prompts]
    forgetful = engine(CHECKPOINT, vision_cache_bytes=0)
    expected = [forgetful.generate([request])[0].output_ids for request in requests]
    with _tower_calls(local) as calls:
        answers = [local.generate([request])[0].output_ids for request in requests]
    assert len(calls) == 1
    assert answers == expected
    (treatment, *_) = local.config.vision.of_images([image.size for image in images])
    assert treatment == (PAD if len(images) > 1 else ANYRES)
