"""The training model: LLaDA-V's arithmetic, batched and padded, with a mask that lets many questions share one picture.

Parameters of the language model carry the engine's names (`redvtp.models`), so export is a renaming. The auxiliary
heads are only there in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.glyphs import CELL
from training.vocab import COLORS, GLYPHS, NAMES, SHAPES, attribute_ids, tokenizer

# What the middle of the language model is asked, and the number of answers. Of a visual token of an item: the item's
# place among its kind in reading order; the form line a value belongs to; the next item's color or name, and its first
# character or shape (0: there is no next item). Of a masked place of the answer: the word the question looks up (0: it
# lists or counts); in a list, which item the place belongs to; and the key and first character of the item before,
# where they stand in the answer already. Of both: the part of a sign or a form line (`training.tasks.KEY`, ...).
HINTS = {
    "rank": 16,
    "owner": len(NAMES),
    "next_key": 1 + len(COLORS) + len(NAMES),
    "next_value": 1 + len(GLYPHS) + len(SHAPES),
    "key": 1 + len(COLORS) + len(GLYPHS) + len(SHAPES) + len(NAMES),
    "item": 16,
    "slot": 8,
    "previous_key": 1 + len(COLORS) + len(NAMES),
    "previous_value": 1 + len(GLYPHS) + len(SHAPES),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the whole model. tower_layers counts the unused last one, as SigLIP's config does."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tower_hidden: int = 128
    tower_intermediate: int = 384
    tower_layers: int = 4
    tower_heads: int = 4
    tile: int = 64
    patch: int = CELL

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def side(self) -> int:
        return self.tile // self.patch


def tiny_shape() -> Shape:
    return Shape(vocab_size=len(tokenizer()))


class TowerLayer(nn.Module):
    """One SigLIP encoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.tower_hidden
        self.heads = shape.tower_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, shape.tower_intermediate), "fc2": nn.Linear(shape.tower_intermediate, width)}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        tiles, patches, width = hidden.shape
        normed = self.layer_norm1(hidden)
        query, key, value = (
            self.self_attn[name](normed).view(tiles, patches, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(tiles, patches, width)
        hidden = hidden + self.self_attn["out_proj"](mixed)
        inner = functional.gelu(self.mlp["fc1"](self.layer_norm2(hidden)), approximate="tanh")
        output: Tensor = hidden + self.mlp["fc2"](inner)
        return output


class PatchEmbeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, shape.tower_hidden, shape.patch, stride=shape.patch)
        self.position_embedding = nn.Embedding(shape.side**2, shape.tower_hidden)

    def forward(self, patches: Tensor) -> Tensor:
        conv = self.patch_embedding
        return functional.linear(patches, conv.weight.flatten(1), conv.bias) + self.position_embedding.weight


class Tower(nn.Module):
    """SigLIP without the layers LLaDA-V does not look at."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(shape)
        layers = nn.ModuleList(TowerLayer(shape) for _ in range(shape.tower_layers - 1))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [tiles, side * side, 3 * patch * patch], normalised pixels. Returns [tiles, side * side, hidden]."""
        hidden: Tensor = self.embeddings(patches)
        for layer in self.layers():
            hidden = layer(hidden)
        return hidden

    def layers(self) -> nn.ModuleList:
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        return layers


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * self.weight


class LladaLayer(nn.Module):
    """Attention and gated MLP, pre-norm, no biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.heads = shape.num_attention_heads
        self.input_layernorm = RmsNorm(width, shape.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        self.post_attention_layernorm = RmsNorm(width, shape.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, watched: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [batch, tokens, hidden]; cos, sin [batch, 1, tokens, head_dim]; mask [batch, 1, tokens, tokens], added
        to the attention logits. Also returns how much of each token's attention, [batch, tokens], the mean over heads,
        goes to the tokens that `watched` [batch, tokens] marks with ones."""
        batch, tokens, width = hidden.shape
        normed = self.input_layernorm(hidden)
        query, key, value = (
            self.self_attn[name](normed).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query = _rotate(query, cos, sin) * (width // self.heads) ** -0.5
        # By hand: on a CPU the backward of scaled_dot_product_attention takes twice as long.
        weights = (query @ _rotate(key, cos, sin).transpose(-1, -2) + mask).softmax(-1)
        hidden = hidden + self.self_attn["o_proj"]((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        normed = self.post_attention_layernorm(hidden)
        gated = functional.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        spent = None if watched is None else (weights @ watched[:, None, :, None])[..., 0].mean(1)
        return hidden + self.mlp["down_proj"](gated), spent


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = rows.chunk(2, dim=-1)
    return rows * cos + torch.cat((-second, first), dim=-1) * sin


class LanguageModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(LladaLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def stack(self) -> list[LladaLayer]:
        return [layer for layer in self.layers if isinstance(layer, LladaLayer)]


class AttributeHeads(nn.Module):
    """Reads what a visual token shows, through the word embeddings themselves.

    So a red box with a 7 comes to lie near e(red) + e(7), and looking something up is a match of contents. "part" has
    no words and gets vectors of its own; every attribute has one more for "none".
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(5, shape.hidden_size))
        self.part = nn.Parameter(torch.randn(4, shape.hidden_size) * 0.25)
        self.bias = nn.Parameter(torch.zeros(5))
        for name, ids in attribute_ids().items():
            self.register_buffer(f"ids_{name}", torch.tensor(ids), persistent=False)

    def forward(self, visual: Tensor, embeddings: Tensor) -> list[Tensor]:
        """visual [tokens, hidden], embeddings [vocab, hidden] -> logits [tokens, 1 + values] per attribute."""
        logits = []
        for i, name in enumerate(("color", "glyph", "shape", "name", "part")):
            table = self.part if name == "part" else embeddings[getattr(self, f"ids_{name}")]
            values = visual @ table.T + self.bias[i]
            logits.append(torch.cat(((visual @ self.none[i])[:, None], values), dim=1))
        return logits


def _weight(module: nn.Module) -> Tensor:
    """A linear layer's weight, for writing into without a gradient."""
    assert isinstance(module, nn.Linear)
    return module.weight.data


class TinyDvlm(nn.Module):
    """The model, and the heads that only training needs."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.vision_tower = Tower(shape)
        self.projector = nn.Sequential(
            nn.Linear(shape.tower_hidden, shape.hidden_size),
            nn.GELU(),
            nn.Linear(shape.hidden_size, shape.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.randn(shape.hidden_size) * 0.25)
        self.language_model = LanguageModel(shape)
        self.attributes = AttributeHeads(shape)
        self.hints = nn.ModuleDict({name: nn.Linear(shape.hidden_size, count) for name, count in HINTS.items()})
        self.hint_norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("frequencies", 1.0 / shape.rope_theta**exponents, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.language_model.stack():
            depth = math.sqrt(2 * self.shape.num_hidden_layers)
            for linear in (layer.self_attn["o_proj"], layer.mlp["down_proj"]):
                _weight(linear).div_(depth)
            # Half of the heads begin by looking at tokens like themselves: looking something up is just that.
            half = self.shape.hidden_size // 2
            _weight(layer.self_attn["k_proj"])[:half] = _weight(layer.self_attn["q_proj"])[:half]
        nn.init.normal_(self.language_model.embed_tokens.weight, std=0.25)
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        for hint in self.hints.values():
            nn.init.zeros_(_weight(hint))
        self.start_head()

    def start_head(self) -> None:
        """The head as a copy of the embeddings, so that what a visual token shows can be written at once."""
        self.language_model.lm_head.weight.data.copy_(self.language_model.embed_tokens.weight.data)
        # Small logits to begin with.
        self.language_model.norm.weight.data.fill_(0.3)

    def encode_tiles(self, patches: Tensor) -> Tensor:
        """patches [tiles, side * side, 3 * patch * patch] -> visual tokens [tiles, side * side, hidden]."""
        features: Tensor = self.projector(self.vision_tower(patches))
        return features

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor, watched: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [batch, tokens, hidden], positions [batch, tokens], mask [batch, 1, tokens, tokens].

        Returns the last hidden states before the final norm, those in the middle of the stack, and the share of every
        token's attention that goes to the `watched` tokens, [batch, tokens], the mean over layers and heads.
        """
        half = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((half, half), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        layers = self.language_model.stack()
        middle, total = hidden, hidden.new_zeros(positions.shape)
        for i, layer in enumerate(layers):
            hidden, spent = layer(hidden, cos, sin, mask, watched)
            if spent is not None:
                total = total + spent / len(layers)
            if i == len(layers) // 2:
                middle = hidden
        return hidden, middle, total

    def logits(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.language_model.lm_head(self.language_model.norm(hidden))
        return output
