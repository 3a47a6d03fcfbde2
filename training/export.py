"""From a training's state to a checkpoint in LLaDA-V's layout.

    python -m training.export --folder training/runs/tiny --to examples/tiny_dvlm

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
from training.model import Shape, TinyDvlm
from training.vocab import save_tokenizer, special_id

# The training's names for the parts of the vision module -> the engine's.
_VISION = {"vision_tower.": "vision.tower.", "projector.": "vision.projector.", "image_newline": "vision.newline"}
TOWER_FOLDER = "siglip-tiny-patch16-64"
_TOWER = "model.vision_tower.vision_tower.vision_model."
_TRAINING_ONLY = ("attributes.", "hints.", "hint_norm.")


def load_average(folder: Path) -> TinyDvlm:
    """The model of a training's folder with its averaged weights."""
    state = torch.load(folder / "state.pt", weights_only=True)
    model = TinyDvlm(Shape(**state["shape"]))
    model.load_state_dict({**state["model"], **state["average"]})
    return model.eval()


def config(shape: Shape) -> dict[str, Any]:
    """`config.json`, with the keys of GSAI-ML/LLaDA-V."""
    tiles = range(1, 6)
    return {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": special_id("<|startoftext|>"),
        "eos_token_id": special_id("<|endoftext|>"),
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_attention_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
        "tokenizer_model_max_length": 2048,
        "add_faster_video": False,
        "add_time_instruction": False,
        "delay_load": False,
        "faster_token_stride": 10,
        "force_sample": False,
        # 25 tiles: a grid of the largest pinpoint is not scaled down.
        "image_aspect_ratio": "anyres_max_25",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[i * shape.tile, j * shape.tile] for i in tiles for j in tiles],
        "image_split_resolution": None,
        "mm_hidden_size": shape.tower_hidden,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_FOLDER,
        "mm_vision_tower_lr": None,
        "pos_skipping_range": 4096,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float16",
        "transformers_version": "4.43.4",
        "use_cache": False,
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "vision_tower_pretrained": None,
    }


def tower_config(shape: Shape) -> dict[str, Any]:
    """The tower repository's `config.json`: one layer more than the checkpoint holds, as with the real one."""
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.tower_hidden,
            "image_size": shape.tile,
            "intermediate_size": shape.tower_intermediate,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": shape.tower_heads,
            "num_channels": 3,
            "num_hidden_layers": shape.tower_layers,
            "patch_size": shape.patch,
        },
    }


def preprocessor_config(shape: Shape) -> dict[str, Any]:
    """The tower repository's `preprocessor_config.json`."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": shape.tile, "width": shape.tile},
    }


def checkpoint_tensors(model: TinyDvlm) -> dict[str, Tensor]:
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


def engine_name(name: str) -> str:
    """The engine's name of a parameter of the training model."""
    for ours, engine in _VISION.items():
        if name.startswith(ours):
            return engine + name.removeprefix(ours)
    return name


def export(folder: Path, target: Path) -> None:
    model = load_average(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(model), target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    save_tokenizer(target)
    generation = {"bos_token_id": special_id("<|startoftext|>"), "eos_token_id": special_id("<|endoftext|>")}
    _write(target / "generation_config.json", {"_from_model_config": True, **generation})
    _write(target / "config.json", config(model.shape))
    _write(target / TOWER_FOLDER / "config.json", tower_config(model.shape))
    _write(target / TOWER_FOLDER / "preprocessor_config.json", preprocessor_config(model.shape))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/tiny"), help="the training's folder")
    parser.add_argument("--to", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args()
    export(args.folder, args.to)
    size = (args.to / "model.safetensors").stat().st_size
    print(f"{args.to}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
