"""Cuts the compact golden data of this directory out of the full set beside the repository.

`python tests/golden/curate.py [--source ../shared/golden]` rewrites `ckpt/` and `goldens/` here; README.md says what
is kept and how the full set came to be. Layout and names are those of the full set: a test reads either through
`golden_data.py`. Token ids are stored as int16 and JSON without white space; nothing else about a value changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
BUDGET = 8_000_000

# tiny-lavida-b is left out: a checkpoint is over a megabyte, and it adds one tile geometry.
CHECKPOINTS = ("tiny-llada-v", "tiny-llada-v-b", "tiny-lavida", "tiny-lavida-dream")
# Their geometry is needed; the weights of one are enough to tell that nobody loads them.
TOWERS = ("siglip2-so400m-patch14-tiny56", "siglip2-so400m-patch14-tiny60", "siglip-so400m-patch14-tiny74")
TOWER_WITH_WEIGHTS = "siglip2-so400m-patch14-tiny56"
# Every other case of these checkpoints is here.
LEFT_OUT = {
    ("tiny-llada-v-b", "tall"),
    ("tiny-llada-v-b", "wide"),
    ("tiny-lavida", "large"),
    ("tiny-lavida", "tall"),
}

# Kept for every case; what is bulky is kept for a few.
BASE_TENSORS = {"input_ids", "visual_tokens", "prompt_embeds"}
LOGITS = {"fwd_logits_resp", "fwd_prefix_logits_resp", "fwd_logits_resp_unshifted"}
WITH_LOGITS = {
    ("tiny-llada-v", "tall"),
    ("tiny-llada-v", "two_pad_tensor"),
    ("tiny-lavida", "wide"),
    ("tiny-lavida-dream", "wide"),
}
WITH_PIXELS = {
    ("tiny-llada-v", "pad_list"),
    ("tiny-llada-v", "two_pad_tensor"),
    ("tiny-llada-v-b", "small_square"),
}
WITH_ATTENTION = {("tiny-llada-v", "tall"), ("tiny-llada-v-b", "small_square")}
# One tile: small enough for what is between the pixels and the visual tokens, and for the pages of a prompt.
WITH_STAGES = {("tiny-lavida", "pad_list")}
STAGES = {"vision_features", "projected_features", "pooled_features", "prefix_k_layer0", "prefix_v_layer3"}

RUN_TENSORS = {"x", "output", "importance", "kept"}
# Logits of the first step after a pruning. Those of a first step are in the base file.
RUN_LOGITS = {
    ("tiny-llada-v-b", "small_square", "redvtp_k25_g32_b32_s16/logits_step1"),
    ("tiny-lavida", "wide", "redvtp_k25_g32_s16/logits_step1"),
}
RUN_FIELDS = ("params", "keep_ratio", "output", "output_text", "n_model_steps", "prune", "float64_agrees", "robust")


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def compact(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Token ids and indices (all below 2**15 in the tiny checkpoints) as int16; floats as they are."""
    if tensor.is_floating_point():
        return tensor.contiguous()
    if tensor.numel() and (int(tensor.max()) > 32767 or int(tensor.min()) < -32768):
        raise ValueError(f"{name} does not fit int16")
    return tensor.to(torch.int16).contiguous()


def copy_case(source: Path, target: Path, checkpoint: str, case: str) -> None:
    target.mkdir(parents=True)
    for image in sorted(source.glob("image*.png")):
        shutil.copyfile(image, target / image.name)
    keep = set(BASE_TENSORS)
    if (checkpoint, case) in WITH_PIXELS:
        keep.add("pixel_values")
    if (checkpoint, case) in WITH_ATTENTION:
        keep.add("fwd_attn_resp_mean")
    if (checkpoint, case) in WITH_LOGITS:
        keep |= LOGITS
    if (checkpoint, case) in WITH_STAGES:
        keep |= STAGES
    base = load_file(source / "base.safetensors")
    save_file({name: compact(name, base[name]) for name in sorted(keep & base.keys())}, target / "base.safetensors")
    write_json(target / "base.json", json.loads((source / "base.json").read_text()))
    for kind in ("plain", "redvtp", "fast"):
        if not (source / f"{kind}.json").exists():
            continue
        tensors = load_file(source / f"{kind}.safetensors")
        names = [
            name
            for name in sorted(tensors)
            if name.split("/")[1] in RUN_TENSORS or (checkpoint, case, name) in RUN_LOGITS
        ]
        names = [name for name in names if not name.startswith("as_published")]
        save_file({name: compact(name, tensors[name]) for name in names}, target / f"{kind}.safetensors")
        runs = json.loads((source / f"{kind}.json").read_text())["runs"]
        compacted = {name: compact_run(run) for name, run in runs.items() if not name.startswith("as_published")}
        write_json(target / f"{kind}.json", {"runs": compacted})


def compact_run(run: dict[str, Any]) -> dict[str, Any]:
    """The fields a test reads; of the per-step list only the canvas block and whether the step was a refreshing one."""
    kept = {field: run[field] for field in RUN_FIELDS if field in run}
    if "steps" in run:
        kept["steps"] = [{key: step[key] for key in ("block", "i", "full") if key in step} for step in run["steps"]]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--source", type=Path, default=HERE.parents[1] / ".." / "shared" / "golden", help="the full set"
    )
    source = parser.parse_args().source
    if not (source / "ckpt").is_dir():
        sys.exit(f"no golden data at {source}; pass --source")
    for part in ("ckpt", "goldens", "schedules"):
        shutil.rmtree(HERE / part, ignore_errors=True)
    for name in CHECKPOINTS + TOWERS:
        (HERE / "ckpt" / name).mkdir(parents=True)
        for file in sorted((source / "ckpt" / name).iterdir()):
            if name in TOWERS and name != TOWER_WITH_WEIGHTS and file.suffix == ".safetensors":
                continue
            shutil.copyfile(file, HERE / "ckpt" / name / file.name)
    for checkpoint in CHECKPOINTS:
        for case in sorted((source / "goldens" / checkpoint).iterdir()):
            if (checkpoint, case.name) not in LEFT_OUT:
                copy_case(case, HERE / "goldens" / checkpoint / case.name, checkpoint, case.name)
    (HERE / "schedules").mkdir()
    for file in sorted((source / "schedules").iterdir()):
        write_json(HERE / "schedules" / file.name, json.loads(file.read_text()))
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(f"{size / 2**20:.2f} MiB in {HERE.name}/")
    if size > BUDGET:
        sys.exit(f"that is more than the {BUDGET:,} bytes that may be committed")


if __name__ == "__main__":
    main()
