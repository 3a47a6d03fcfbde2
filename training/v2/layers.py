"""The language model's layers with the matrix products in a precision to choose: bfloat16 where the CPU has it.

The parameters, the residual stream, norms and rotations are float32 in either case; a checkpoint does not know which
one it was trained in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from training.model import LladaLayer, _rotate


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; elsewhere they are emulated, slowly."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _joined(layer: LladaLayer, part: str, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """Several projections of the same input as one matrix: one product is faster than three."""
    modules = getattr(layer, part)
    return torch.cat([modules[name].weight for name in names]).to(dtype)


def run_layer(layer: LladaLayer, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """hidden [batch, tokens, hidden] float32; cos, sin [batch, 1, tokens, head_dim] float32; mask [batch, 1, tokens,
    tokens], added to the attention logits. The products are in the mask's dtype."""
    batch, tokens, width = hidden.shape
    dtype = mask.dtype
    normed = layer.input_layernorm(hidden).to(dtype)
    mixed = functional.linear(normed, _joined(layer, "self_attn", ("q_proj", "k_proj", "v_proj"), dtype))
    query, key, value = mixed.view(batch, tokens, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    query = (_rotate(query.float(), cos, sin) * (width // layer.heads) ** -0.5).to(dtype)
    key = _rotate(key.float(), cos, sin).to(dtype)
    # By hand: on a CPU the backward of scaled_dot_product_attention takes twice as long.
    weights = (query @ key.transpose(-1, -2) + mask).softmax(-1)
    seen = (weights @ value).transpose(1, 2).reshape(batch, tokens, width)
    hidden = hidden + functional.linear(seen, _joined(layer, "self_attn", ("o_proj",), dtype)).float()
    normed = layer.post_attention_layernorm(hidden).to(dtype)
    gate, up = functional.linear(normed, _joined(layer, "mlp", ("gate_proj", "up_proj"), dtype)).chunk(2, dim=-1)
    inner = functional.silu(gate) * up
    return hidden + functional.linear(inner, _joined(layer, "mlp", ("down_proj",), dtype)).float()
