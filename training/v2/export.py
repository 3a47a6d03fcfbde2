"""From a training's state to a checkpoint in LLaDA-V's layout.

    python -m training.v2.export --folder training/runs/small --to examples/small_dvlm

Takes the averaged weights, leaves the auxiliary heads out, and writes float16 safetensors under LLaDA-V's names with
its config keys, the tokenizer, and the tower's own folder, which LLaDA-V's config only names. Safe while training runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from redvtp.families.llada_v import LLADA_V
from training.export import TOWER_FOLDER, config, engine_name, preprocessor_config, tower_config
from training.v2.evaluate import load_average
from training.v2.model import SmallDvlm
from training.v2.vocab import save_tokenizer, special_id

_TOWER = "model.vision_tower.vision_tower.vision_model."
_TRAINING_ONLY = ("attributes.", "hints.", "hint_norm.")


def checkpoint_tensors(model: SmallDvlm) -> dict[str, Tensor]:
    """Every tensor under LLaDA-V's name, float16."""
    tensors = {
        LLADA_V.weights.theirs(engine_name(name)): parameter.detach().to(torch.float16).contiguous()
        for name, parameter in model.named_parameters()
        if not name.startswith(_TRAINING_ONLY)
    }
    # LLaDA-V's checkpoint carries the tower's final norm though nothing reads it.
    width = model.shape.tower_hidden
    tensors[f"{_TOWER}post_layernorm.weight"] = torch.ones(width, dtype=torch.float16)
    tensors[f"{_TOWER}post_layernorm.bias"] = torch.zeros(width, dtype=torch.float16)
    return tensors


def export(folder: Path, target: Path) -> int:
    """Returns the number of parameters written."""
    model = load_average(folder)
    tensors = checkpoint_tensors(model)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    save_tokenizer(target)
    special = {"bos_token_id": special_id("<|startoftext|>"), "eos_token_id": special_id("<|endoftext|>")}
    _write(target / "generation_config.json", {"_from_model_config": True, **special})
    _write(target / "config.json", config(model.shape) | special)
    _write(target / TOWER_FOLDER / "config.json", tower_config(model.shape))
    _write(target / TOWER_FOLDER / "preprocessor_config.json", preprocessor_config(model.shape))
    return sum(tensor.numel() for tensor in tensors.values())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/small"), help="the training's folder")
    parser.add_argument("--to", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args()
    parameters = export(args.folder, args.to)
    size = (args.to / "model.safetensors").stat().st_size
    print(f"{args.to}: {parameters:,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
