"""A checkpoint's language model quantised to int8, as llm-compressor writes it, and what its linears should compute."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Leaf names of the linears in a layer, of LLaDA's and of LaViDa's naming.
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "attn_out", "ff_proj", "ff_out",
)  # fmt: skip
LAYER_PREFIXES = ("model.layers.", "model.transformer.blocks.")
# One linear that stays as it is, by its name in either checkpoint; recipes leave some out.
LEFT_OUT = ("model.layers.3.mlp.down_proj", "model.transformer.blocks.3.ff_out")
# The tower has a q_proj too.
IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*mm_projector.*", *LEFT_OUT]
# Seven bits of eight: on CPUs without VNNI oneDNN adds products of two pairs in 16 bits, and pairs of larger weights
# saturate there (3 to 8 % of error; measured with vLLM's kernel alone on an AVX2 machine).
LARGEST_WEIGHT = 63
# What a static scheme's activations are taken to lie between.
STATIC_RANGE = (-6.0, 10.0)


@dataclass(frozen=True)
class Scheme:
    """dynamic: each activation row brings its own scale; otherwise one scale and zero point in the checkpoint."""

    dynamic: bool

    def config(self) -> dict[str, object]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        activations: dict[str, object] = {"num_bits": 8, "type": "int", "dynamic": self.dynamic}
        activations |= {"symmetric": self.dynamic, "strategy": "token" if self.dynamic else "tensor"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": IGNORED,
        }

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of one linear, `name` without `.weight`."""
        values, scale = quantise_weight(weight)
        made = {f"{name}.weight": values, f"{name}.weight_scale": scale}
        if not self.dynamic:
            step, zero_point = static_activation()
            made |= {
                f"{name}.input_scale": torch.tensor([step]),
                f"{name}.input_zero_point": torch.tensor([zero_point], dtype=torch.int8),
            }
        return made

    def apply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [rows, in] through the quantised linear of a float weight [out, in], the slow obvious way."""
        values, scale = quantise_weight(weight)
        if self.dynamic:
            steps = rows.abs().amax(1, keepdim=True) / 127
            quantised = (rows / steps).round().clamp(-128, 127)
            return (quantised * steps) @ (values.float() * scale).T
        step, zero_point = static_activation()
        quantised = (rows / step + zero_point).round().clamp(-128, 127)
        return ((quantised - zero_point) * step) @ (values.float() * scale).T


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and its scale of every row, [out, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True) / LARGEST_WEIGHT
    return (weight.float() / scale).round().to(torch.int8), scale


def static_activation() -> tuple[float, int]:
    low, high = STATIC_RANGE
    step = (high - low) / 255
    return step, round(-128 - low / step)


def quantise(source: Path, folder: Path, scheme: Scheme) -> Path:
    """A copy of the checkpoint with the linears of its language model in int8."""
    shutil.copytree(source, folder)
    # The tower's geometry lies beside a checkpoint.
    tower = json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    shutil.copytree(source.parent / Path(tower).name, folder.parent / Path(tower).name)
    (weights,) = folder.glob("*.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(weights).items():
        leaf = name.removesuffix(".weight")
        if name.startswith(LAYER_PREFIXES) and name != leaf and leaf.split(".")[-1] in LINEARS and leaf not in LEFT_OUT:
            tensors |= scheme.tensors(leaf, tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config()}))
    return folder
