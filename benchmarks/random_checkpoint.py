"""A random LLaDA-V or LaViDa checkpoint of any size, in the layout of the published one, and a picture to ask it about.

Made once for each size and kept in a work folder. Every linear layer keeps the scale of its input and attention is
uneven, so scores differ between visual tokens and answers depend on the image. No more than one shard is in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
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
from redvtp.models.loading import INDEX

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
    vocab: rows of embedding and head; those behind the tokenizer's are never chosen.
    tower_inner, tower_heads: None for four times the width, and for heads of 64.
    dtype: of the weights.
    shard_bytes: about so many in a file; None for a single file.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    tower_hidden: int
    tower_layers: int
    tile: int
    vocab: int = VOCAB
    tower_inner: int | None = None
    tower_heads: int | None = None
    dtype: str = "float32"
    shard_bytes: int | None = None


# LLaDA-V 8B.
PUBLISHED = Shape(
    "llada-v", 4096, 12288, 32, 32, 1152, 26, 384,
    vocab=126_464, tower_inner=4304, tower_heads=16, dtype="bfloat16", shard_bytes=2 << 30,
)  # fmt: skip


def checkpoint_folder(workdir: Path, shape: Shape) -> tuple[Path, bool]:
    """Where `make_checkpoint` puts the checkpoint, and whether it is there."""
    folder = workdir / f"{shape.family}-{_digest(shape)}"
    return folder, (folder / "complete").exists()


def _digest(shape: Shape) -> str:
    return hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()[:12]


def make_checkpoint(workdir: Path, shape: Shape, saved: Callable[[Path], object] = lambda _: None) -> Path:
    """The checkpoint folder for this shape, written if it is not there yet. saved: called with each file of weights."""
    folder, complete = checkpoint_folder(workdir, shape)
    if complete:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        shutil.copyfile(CHECKPOINTS / TINY[shape.family] / file, folder / file)
    # The name must not be the published tower's, whose geometry is known without a folder.
    tower = workdir / f"siglip-patch{PATCH}-{_digest(shape)}"
    tower.mkdir(exist_ok=True)
    (tower / "config.json").write_text(json.dumps({"vision_config": _tower_config(shape)}))
    config = config_of(shape, tower.name)
    (folder / "config.json").write_text(json.dumps(config))
    names = family_of(config).weights
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    tensors = ((_renamed(name, names), tensor.to(dtype)) for name, tensor in _tensors(shape, generator))
    if shape.shard_bytes is None:
        save_file(dict(tensors), folder / "model.safetensors")
        saved(folder / "model.safetensors")
    else:
        _save_shards(folder, tensors, shape.shard_bytes, saved)
    (folder / "complete").touch()
    return folder


def _save_shards(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int, saved: Callable[[Path], object]
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        file = folder / f"model-{number:05}.safetensors"
        save_file(shard, file)
        weight_map |= dict.fromkeys(shard, file.name)
        # The next shard is made while this one's name still holds it.
        shard.clear()
        saved(file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


def make_image(width: int, height: int) -> Image.Image:
    """Blobs of colour at several scales, so that no two patches are alike; the same at every call."""
    random = np.random.default_rng(0)
    canvas = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        canvas += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 3
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def config_of(shape: Shape, tower: str | None = None) -> dict[str, object]:
    """Its config.json.

    tower: the name of the vision tower, whose folder lies beside the checkpoint's; None puts its sizes in.
    """
    config: dict[str, object] = json.loads((CHECKPOINTS / TINY[shape.family] / "config.json").read_text())
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocab,
        "torch_dtype": shape.dtype,
        "max_position_embeddings": 16384,
    }
    keys = family_of(config).keys
    vision = {
        "mm_hidden_size": shape.tower_hidden,
        **({"vision_config": _tower_config(shape)} if tower is None else {"mm_vision_tower": tower}),
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
        "intermediate_size": _tower_inner(shape),
        "num_hidden_layers": shape.tower_layers + 1,  # the last one is never run
        "num_attention_heads": shape.tower_heads or max(1, shape.tower_hidden // 64),
        "num_channels": 3,
        "image_size": shape.tile,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def _tower_inner(shape: Shape) -> int:
    return shape.tower_inner or 4 * shape.tower_hidden


def _tensors(shape: Shape, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(gain / columns**0.5)

    hidden, inner = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", torch.randn(shape.vocab, hidden, generator=generator)
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
    head = matrix(shape.vocab, hidden, gain=4.0)
    # Never chosen: a position that proposes the mask stays undecided, and steps would vary with the weights.
    head[MASK_ID] = 0
    yield "lm_head.weight", head
    yield "model.image_newline", torch.randn(hidden, generator=generator)
    for index, columns in ((0, shape.tower_hidden), (2, hidden)):
        yield f"model.mm_projector.{index}.weight", matrix(hidden, columns, gain=1.4)
        yield f"model.mm_projector.{index}.bias", torch.zeros(hidden)
    yield from _tower_tensors(shape, generator)


def _tower_tensors(shape: Shape, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    width, inner = shape.tower_hidden, _tower_inner(shape)
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
        yield from linear(f"{prefix}.mlp.fc1", inner, width)
        yield from linear(f"{prefix}.mlp.fc2", width, inner)
    yield f"{tower}.post_layernorm.weight", torch.ones(width)
    yield f"{tower}.post_layernorm.bias", torch.zeros(width)
