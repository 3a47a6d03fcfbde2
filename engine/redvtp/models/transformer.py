"""The language model of every family: a Llama-shaped transformer without a causal mask, over packed tokens.

Families differ in tensor names and in biases only: the family's weight names and `LanguageConfig` say how.

Attention is an argument of each step (see redvtp.attention), so the model is independent of pages, batches and
pruning. The linears are plain `nn.Linear`s; tensor parallelism and quantisation replace them by `TP_PLAN`. So are
`Operations`: a driver with fused kernels hands in its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from redvtp.attention.interface import LayerAttention
from redvtp.families.language import LanguageConfig
from redvtp.kv.rotary import Rotary
from redvtp.models.operations import TORCH, Operations, Rotate

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
    """RMS normalisation, see `Operations`."""

    def __init__(self, hidden_size: int, eps: float, operations: Operations) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self._operations = operations

    def forward(self, hidden: Tensor) -> Tensor:
        return self._operations.rms_norm(hidden, self.weight, self.eps)


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

    def forward(self, hidden: Tensor, rotate: Rotate, layer: int, attention: LayerAttention) -> Tensor:
        tokens = hidden.shape[0]
        query = self.q_proj(hidden).view(tokens, -1, self.head_dim)
        query, key = rotate(query, self.k_proj(hidden).view(tokens, -1, self.head_dim))
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

    def __init__(self, shape: LanguageConfig, operations: Operations) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps, operations)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps, operations)
        self.mlp = GatedMlp(shape)

    def forward(self, hidden: Tensor, rotate: Rotate, layer: int, attention: LayerAttention) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotate, layer, attention)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Transformer(nn.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, shape: LanguageConfig, operations: Operations = TORCH) -> None:
        super().__init__()
        self.operations = operations
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(TransformerLayer(shape, operations) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps, operations)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.rotary = Rotary(shape.head_dim, shape.rope_theta)

    def forward(
        self, hidden: Tensor, positions: Tensor, attention: LayerAttention, layers: range | None = None
    ) -> Tensor:
        """hidden [tokens, hidden] input embeddings, positions [tokens] -> [tokens, hidden], before the final norm.

        layers: a range of the layers; a later range takes the output of the one before. None: all layers.
        """
        rotate = self.operations.rotation(*(angle.to(hidden.dtype) for angle in self.rotary.angles(positions)))
        for index in layers if layers is not None else range(len(self.layers)):
            hidden = self.layers[index](hidden, rotate, index, attention)
        return hidden

    def logits(self, hidden: Tensor, vocab: int) -> Tensor:
        """Logits [rows, vocab] of the first `vocab` ids for hidden rows [rows, hidden] that left the last layer."""
        output: Tensor = self.lm_head(self.norm(hidden))[:, :vocab]
        return output
