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
BUDGET = 8 * 1024 * 1024

CHECKPOINTS = ("tiny-llada-v", "tiny-llada-v-b")
TOWERS = ("siglip2-so400m-patch14-tiny56", "siglip2-so400m-patch14-tiny60")

# Kept for every case; `pixel_values` and the attention rows are bulky and kept for a few.
BASE_TENSORS = {"input_ids", "visual_tokens", "prompt_embeds", "fwd_logits_resp"}
WITH_PIXELS = {
    ("tiny-llada-v", "tall"),
    ("tiny-llada-v", "pad_list"),
    ("tiny-llada-v", "two_pad_tensor"),
    ("tiny-llada-v-b", "small_square"),
}
WITH_ATTENTION = {("tiny-llada-v", "tall"), ("tiny-llada-v-b", "small_square")}

RUN_TENSORS = {"x", "output", "importance", "kept"}
# Logits of the first step after a pruning. Those of a first step are `fwd_logits_resp` of the base file.
RUN_LOGITS = {"redvtp_k25_g32_b32_s16/logits_step1"}
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
    base = load_file(source / "base.safetensors")
    save_file({name: compact(name, base[name]) for name in sorted(keep & base.keys())}, target / "base.safetensors")
    write_json(target / "base.json", json.loads((source / "base.json").read_text()))
    for kind in ("plain", "redvtp", "fast"):
        if not (source / f"{kind}.json").exists():
            continue
        tensors = load_file(source / f"{kind}.safetensors")
        names = [name for name in sorted(tensors) if name.split("/")[1] in RUN_TENSORS or name in RUN_LOGITS]
        save_file({name: compact(name, tensors[name]) for name in names}, target / f"{kind}.safetensors")
        runs = json.loads((source / f"{kind}.json").read_text())["runs"]
        write_json(target / f"{kind}.json", {"runs": {name: compact_run(run) for name, run in runs.items()}})


def compact_run(run: dict[str, Any]) -> dict[str, Any]:
    """The fields a test reads; of the per-step list only the canvas block and whether the step was a refreshing one."""
    kept = {field: run[field] for field in RUN_FIELDS if field in run}
    kept["steps"] = [{"block": step["block"], "i": step["i"], "full": step["full"]} for step in run["steps"]]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--source", type=Path, default=HERE.parents[1] / ".." / "shared" / "golden", help="the full set"
    )
    source = parser.parse_args().source
    if not (source / "ckpt").is_dir():
        sys.exit(f"no golden data at {source}; pass --source")
    for part in ("ckpt", "goldens"):
        shutil.rmtree(HERE / part, ignore_errors=True)
    for name in CHECKPOINTS + TOWERS:
        (HERE / "ckpt" / name).mkdir(parents=True)
        for file in sorted((source / "ckpt" / name).iterdir()):
            shutil.copyfile(file, HERE / "ckpt" / name / file.name)
    for checkpoint in CHECKPOINTS:
        for case in sorted((source / "goldens" / checkpoint).iterdir()):
            copy_case(case, HERE / "goldens" / checkpoint / case.name, checkpoint, case.name)
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(f"{size / 2**20:.2f} MiB in {HERE.name}/")
    if size > BUDGET:
        sys.exit(f"that is more than the {BUDGET >> 20} MiB that may be committed")


if __name__ == "__main__":
    main()
