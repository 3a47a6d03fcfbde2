"""The language model of every family: a Llama-shaped transformer without a causal mask, over packed tokens.

Families differ in tensor names and in biases only: the family's weight names and `LanguageConfig` say how.

Attention is an argument of each step (see redvtp.attention), so the model is independent of pages, batches and
pruning. The linears are plain `nn.Linear`s; tensor parallelism and quantisation replace them by `TP_PLAN`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from redvtp.attention.interface import LayerAttention
from redvtp.families.language import LanguageConfig
from redvtp.kv.rotary import Rotary, apply_rotary

# How each linear of a layer splits over tensor-parallel ranks, by its leaf name.
TP_PLAN: dict[str, str] = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
}


class RmsNorm(nn.Module):
    """RMS normalisation in float32; the weight is applied after the cast back (reference: LLaDA)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        normed = functional.rms_norm(hidden.float(), (hidden.shape[-1],), None, self.eps)
        return normed.to(hidden.dtype) * self.weight


class SelfAttention(nn.Module):
    """Projections of one attention layer. Head counts follow from the projections' widths, which ranks may split."""

    def __init__(self, shape: LanguageConfig) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: LayerAttention) -> Tensor:
        tokens = hidden.shape[0]
        query = apply_rotary(self.q_proj(hidden).view(tokens, -1, self.head_dim), cos, sin)
        key = apply_rotary(self.k_proj(hidden).view(tokens, -1, self.head_dim), cos, sin)
        value = self.v_proj(hidden).view(tokens, -1, self.head_dim)
        output: Tensor = self.o_proj(attention(layer, query, key, value).reshape(tokens, -1))
        return output


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gated = functional.silu(self.gate_proj(hidden), inplace=True).mul_(self.up_proj(hidden))
        output: Tensor = self.down_proj(gated)
        return output


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, shape: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GatedMlp(shape)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: LayerAttention) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, layer, attention)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Transformer(nn.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, shape: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(TransformerLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.rotary = Rotary(shape.head_dim, shape.rope_theta)

    def forward(
        self, hidden: Tensor, positions: Tensor, attention: LayerAttention, layers: range | None = None
    ) -> Tensor:
        """hidden [tokens, hidden] input embeddings, positions [tokens] -> [tokens, hidden], before the final norm.

        layers: a range of the layers; a later range takes the output of the one before. None: all layers.
        """
        cos, sin = (angle.to(hidden.dtype) for angle in self.rotary.angles(positions))
        for index in layers if layers is not None else range(len(self.layers)):
            hidden = self.layers[index](hidden, cos, sin, index, attention)
        return hidden

    def logits(self, hidden: Tensor, vocab: int) -> Tensor:
        """Logits [rows, vocab] of the first `vocab` ids for hidden rows [rows, hidden] that left the last layer."""
        output: Tensor = self.lm_head(self.norm(hidden))[:, :vocab]
        return output
