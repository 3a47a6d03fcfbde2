"""A random LLaDA-V or LaViDa checkpoint of any size, in the layout of the published one, and a picture to ask it about.

Made once for each size and kept in a work folder. Every linear layer keeps the scale of its input and attention is
uneven, so scores differ between visual tokens and answers depend on the image.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from redvtp.families.llada_v import LLADA_V
from redvtp.families.registry import family_of
from redvtp.families.weights import WeightNames

CHECKPOINTS = Path(__file__).resolve().parents[1] / "tests" / "golden" / "ckpt"
# The tiny checkpoint whose tokenizer and settings a family takes over.
TINY = {"llada-v": "tiny-llada-v", "lavida": "tiny-lavida"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
# Tiles across and down that the published checkpoints know.
GRIDS = {
    "llada-v": [(i, j) for i in range(1, 7) for j in range(1, 7)],
    "lavida": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
}
PATCH = 14
# Rows of the tiny checkpoints' embedding: more than the tokenizer has, as in the published checkpoint.
VOCAB = 640
MASK_ID = 584


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the language model and of the tower.

    tile: the side of the tower's input in pixels.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    tower_hidden: int
    tower_layers: int
    tile: int


def make_checkpoint(workdir: Path, shape: Shape) -> Path:
    """The checkpoint folder for this shape, written if it is not there yet."""
    name = hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()[:12]
    folder = workdir / f"{shape.family}-{name}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        shutil.copyfile(CHECKPOINTS / TINY[shape.family] / file, folder / file)
    # The name must not be the published tower's, whose geometry is known without a folder.
    tower = workdir / f"siglip-patch{PATCH}-{name}"
    tower.mkdir(exist_ok=True)
    (tower / "config.json").write_text(json.dumps({"vision_config": _tower_config(shape)}))
    config = _config(shape, tower.name)
    (folder / "config.json").write_text(json.dumps(config))
    names = family_of(config).weights
    generator = torch.Generator().manual_seed(0)
    tensors = {_renamed(tensor_name, names): tensor for tensor_name, tensor in _tensors(shape, generator)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "complete").touch()
    return folder


def make_image(width: int, height: int) -> Image.Image:
    """Blobs of colour at several scales, so that no two patches are alike; the same at every call."""
    random = np.random.default_rng(0)
    canvas = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        canvas += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 3
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _config(shape: Shape, tower: str) -> dict[str, object]:
    config: dict[str, object] = json.loads((CHECKPOINTS / TINY[shape.family] / "config.json").read_text())
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16384,
    }
    keys = family_of(config).keys
    vision = {
        "mm_hidden_size": shape.tower_hidden,
        "mm_vision_tower": tower,
        "image_grid_pinpoints": [[i * shape.tile, j * shape.tile] for i, j in GRIDS[shape.family]],
        "tokenizer_model_max_length": 16384,
    }
    return config | {keys.get(name, name): size for name, size in sizes.items()} | vision


def _renamed(name: str, names: WeightNames) -> str:
    """A LLaDA-V tensor's name in another family."""
    ours = LLADA_V.weights.ours(name)
    return name if ours is None else names.theirs(ours)


def _tower_config(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": shape.tower_hidden,
        "intermediate_size": 4 * shape.tower_hidden,
        "num_hidden_layers": shape.tower_layers + 1,  # the last one is never run
        "num_attention_heads": max(1, shape.tower_hidden // 64),
        "num_channels": 3,
        "image_size": shape.tile,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def _tensors(shape: Shape, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(gain / columns**0.5)

    hidden, inner = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", torch.randn(VOCAB, hidden, generator=generator)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(hidden)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(hidden)
        for name, gain in (("q", 1.4), ("k", 1.4), ("v", 1.0), ("o", 1.0)):
            yield f"{prefix}.self_attn.{name}_proj.weight", matrix(hidden, hidden, gain)
        yield f"{prefix}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", matrix(hidden, inner)
    yield "model.norm.weight", torch.ones(hidden)
    head = matrix(VOCAB, hidden, gain=4.0)
    # Never chosen: a position that proposes the mask stays undecided, and steps would vary with the weights.
    head[MASK_ID] = 0
    yield "lm_head.weight", head
    yield "model.image_newline", torch.randn(hidden, generator=generator)
    for index, columns in ((0, shape.tower_hidden), (2, hidden)):
        yield f"model.mm_projector.{index}.weight", matrix(hidden, columns, gain=1.4)
        yield f"model.mm_projector.{index}.bias", torch.zeros(hidden)
    yield from _tower_tensors(shape, generator)


def _tower_tensors(shape: Shape, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    width = shape.tower_hidden
    tower = "model.vision_tower.vision_tower.vision_model"
    patches = (shape.tile // PATCH) ** 2

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", torch.randn(rows, columns, generator=generator) / columns**0.5
        yield f"{name}.bias", torch.zeros(rows)

    kernel = torch.randn(width, 3, PATCH, PATCH, generator=generator) / (3 * PATCH * PATCH) ** 0.5
    yield f"{tower}.embeddings.patch_embedding.weight", kernel
    yield f"{tower}.embeddings.patch_embedding.bias", torch.zeros(width)
    yield f"{tower}.embeddings.position_embedding.weight", torch.randn(patches, width, generator=generator) * 0.5
    for layer in range(shape.tower_layers + 1):
        prefix = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}.{norm}.weight", torch.ones(width)
            yield f"{prefix}.{norm}.bias", torch.zeros(width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{prefix}.self_attn.{name}", width, width)
        yield from linear(f"{prefix}.mlp.fc1", 4 * width, width)
        yield from linear(f"{prefix}.mlp.fc2", width, 4 * width)
    yield f"{tower}.post_layernorm.weight", torch.ones(width)
    yield f"{tower}.post_layernorm.bias", torch.zeros(width)
