"""Version 2's training model: version 1's layers at other sizes, other auxiliary heads, no look at the attention.

Parameters carry the engine's names (`redvtp.models.dvlm`), so export is a renaming. The auxiliary heads are only there
in training.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor, nn

from training.model import LanguageModel, RmsNorm, Shape, Tower
from training.v2.layers import run_layer
from training.v2.pictures import HINTS
from training.v2.vocab import attribute_ids, tokenizer, twins
from training.v2.world import ATTRIBUTES, PARTS


def small_shape() -> Shape:
    return Shape(
        vocab_size=len(tokenizer()),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        tower_hidden=160,
        tower_intermediate=480,
        tower_layers=4,
        tower_heads=5,
    )


# How much of a token a head adds to another that looks at it, at first.
_COPIED = 0.3
# The attributes whose words are the classes of a hint, in their order.
_HINT_WORDS = {
    "owner": ("name",),
    "column": ("name",),
    "next_key": ("color", "name"),
    "next_value": ("glyph", "shape"),
    "key": ("color", "glyph", "shape", "name"),
    "previous_key": ("color", "name"),
    "previous_value": ("glyph", "shape"),
}


def hint_words(name: str) -> tuple[int, ...]:
    """Token ids of the last classes of a hint, none for hints that are numbers."""
    return tuple(chain.from_iterable(attribute_ids()[attribute] for attribute in _HINT_WORDS.get(name, ())))


class AttributeHeads(nn.Module):
    """Reads what a visual token shows, through the word embeddings themselves.

    So a red box with a 7 comes to lie near e(red) + e(7), and looking something up is a match of contents. "part" has
    no words and gets vectors of its own; every attribute has one more for "none".
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(len(ATTRIBUTES), shape.hidden_size))
        self.part = nn.Parameter(torch.randn(PARTS, shape.hidden_size) * 0.25)
        self.bias = nn.Parameter(torch.zeros(len(ATTRIBUTES)))
        for name, ids in attribute_ids().items():
            self.register_buffer(f"ids_{name}", torch.tensor(ids), persistent=False)

    def forward(self, visual: Tensor, embeddings: Tensor) -> list[Tensor]:
        """visual [tokens, hidden], embeddings [vocab, hidden] -> logits [tokens, 1 + values] per attribute."""
        logits = []
        for i, name in enumerate(ATTRIBUTES):
            table = self.part if name == "part" else embeddings[getattr(self, f"ids_{name}")]
            values = visual @ table.T + self.bias[i]
            logits.append(torch.cat(((visual @ self.none[i])[:, None], values), dim=1))
        return logits


class SmallDvlm(nn.Module):
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

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        depth = math.sqrt(2 * self.shape.num_hidden_layers)
        half = self.shape.hidden_size // 2
        for layer in self.language_model.stack():
            layer.mlp["down_proj"].get_parameter("weight").div_(depth)
            # Half of the heads begin by looking at tokens like themselves: looking something up is just that. And all
            # begin by copying a part of what they look at.
            query, key, value, out = (
                layer.self_attn[name].get_parameter("weight") for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            )
            key[:half] = query[:half]
            nn.init.orthogonal_(value)
            out.copy_(value.T * _COPIED)
        nn.init.normal_(self.language_model.embed_tokens.weight, std=0.25)
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.start_head()

    @torch.no_grad()
    def start_head(self) -> None:
        """The head as a copy of the embeddings, so that what a visual token shows can be written at once.

        A word without a space before it (a JSON key) begins as the word with one, moved by a vector common to all.
        """
        embeddings = self.language_model.embed_tokens.weight
        with_space, without = twins()
        shift = embeddings[0] * 0.7
        embeddings[list(without)] = embeddings[list(with_space)] + shift
        self.language_model.lm_head.weight.copy_(embeddings)
        # Small logits to begin with.
        self.language_model.norm.weight.fill_(0.3)
        for name, hint in self.hints.items():
            weight = hint.get_parameter("weight")
            weight.zero_()
            if words := hint_words(name):
                # Words are read off the middle as they are off the end. Class 0 is "none" where there is one.
                weight[weight.shape[0] - len(words) :] = embeddings[list(words)] * 0.3

    def encode_tiles(self, patches: Tensor) -> Tensor:
        """patches [tiles, side * side, 3 * patch * patch] -> visual tokens [tiles, side * side, hidden]."""
        features: Tensor = self.projector(self.vision_tower(patches))
        return features

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [batch, tokens, hidden], positions [batch, tokens], mask [batch, 1, tokens, tokens] in
        the dtype of the matrix products.

        Returns the last hidden states before the final norm and those in the middle of the stack.
        """
        half = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((half, half), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        layers = self.language_model.stack()
        middle = hidden
        for i, layer in enumerate(layers):
            hidden = run_layer(layer, hidden, cos, sin, mask)
            if i == len(layers) // 2:
                middle = hidden
        return hidden, middle

    def logits(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.language_model.lm_head(self.language_model.norm(hidden))
        return output
