"""A family of another kind needs one file: a nested config, another vision module, text around images, other names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from devices import DEVICE
from golden_data import checkpoint_dir
from redvtp.families import registry
from redvtp.families.family import Family, SamplerTraits
from redvtp.families.language import LanguageConfig, read_language
from redvtp.families.llada_tokens import find_llada_tokens
from redvtp.families.llama import LLAMA_NAMES
from redvtp.families.weights import WeightNames
from redvtp.heatmap import draw
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import MASK, ChatTemplate, chat_prompt
from redvtp.vision.media import Box, Kind, MediaItem, Size, Treatment, VisionModule, VisionPath

SIDE = 4


@dataclass(frozen=True, slots=True)
class MeanColours:
    """SIDE x SIDE fine tokens, then one coarse token."""

    def count(self, size: Size) -> int:
        return SIDE**2 + 1

    def boxes(self, size: Size) -> list[Box | None]:
        across, down = size[0] / SIDE, size[1] / SIDE
        fine: list[Box | None] = [
            (col * across, row * down, (col + 1) * across, (row + 1) * down)
            for row in range(SIDE)
            for col in range(SIDE)
        ]
        return [*fine, (0.0, 0.0, float(size[0]), float(size[1]))]

    def coarse(self, size: Size) -> range:
        return range(SIDE**2, SIDE**2 + 1)

    def inputs(self, image: Image.Image) -> Tensor:
        small = torch.from_numpy(np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255).flatten(0, 1)
        return torch.cat((small, small.mean(0, keepdim=True)))


class ColourModule(VisionModule):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.colours = nn.Linear(3, hidden_size)

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        return [self.colours(item.inputs()) for item in items]

    def encode_largest(self) -> Tensor:
        tokens: Tensor = self.colours(torch.zeros(SIDE**2 + 1, 3))
        return tokens


class ColourPath(VisionPath):
    def treatments(self, kinds: Sequence[Kind]) -> list[Treatment]:
        return [MeanColours()] * len(kinds)

    def largest_size(self) -> Size:
        return SIDE, SIDE

    def build(self, hidden_size: int) -> VisionModule:
        return ColourModule(hidden_size)


def _read_language(raw: Mapping[str, Any]) -> LanguageConfig:
    return read_language(raw["text"])


TOY = Family(
    name="Toy",
    architecture="ToyForDiffusion",
    model_type="toy",
    keys={"hidden_size": "text.hidden_size"},
    read_language=_read_language,
    read_vision=lambda raw, folder: ColourPath(),
    find_tokens=lambda tokenizer, language: find_llada_tokens(tokenizer, "Toy", (MASK,)),
    template=ChatTemplate("chatml", between_images="", after_images="", around_image=("[", "]")),
    weights=WeightNames((("toy.eyes.", "vision.colours."), *LLAMA_NAMES), ignored=r"toy\.unused"),
    sampler=SamplerTraits(suppressed=(MASK,)),
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, TOY))
    source = checkpoint_dir("tiny-llada-v")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, tmp_path / file)
    text = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ToyForDiffusion"], "text": text}))
    weights = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if "vision" not in name and "mm_projector" not in name and "newline" not in name
    }
    generator = torch.Generator().manual_seed(1)
    weights["toy.eyes.weight"] = torch.randn(text["hidden_size"], 3, generator=generator)
    weights["toy.eyes.bias"] = torch.randn(text["hidden_size"], generator=generator)
    weights["toy.unused"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    return LocalEngine(tmp_path, dtype="float32", device=DEVICE)


def test_it_answers_prunes_and_draws(toy: LocalEngine) -> None:
    images = tuple(Image.effect_noise(size, 90).convert("RGB") for size in ((40, 30), (20, 60)))
    prompt = chat_prompt(toy.tokenizer, "What is it?", len(images), template=toy.config.family.template)
    assert "<image><image>What is it?" in prompt
    request = Request(prompt, images, DenoisingParams(gen_length=8, steps=4), PruningParams(keep_ratio=0.5))
    (answer,) = toy.generate([request])
    assert answer.visual_tokens == 2 * (SIDE**2 + 1)
    pruning = answer.steps[0].pruning
    assert pruning is not None
    assert len(pruning.kept) == SIDE**2 + 1
    assert toy.special.mask_id not in answer.output_ids
    spans = toy.tokenize(request).visual_spans
    # "]" of the first image and "[" of the second one.
    assert spans[1][0] - spans[0][1] == len(toy.tokenizer("][", add_special_tokens=False)["input_ids"])
    picture = draw(images, toy.config, [float(index) for index in range(answer.visual_tokens)], pruning.kept)
    assert picture.height == 60
