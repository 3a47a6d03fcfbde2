"""benchmarks/real_size.py: what it checks beforehand, its checkpoint in shards, and a run at a tiny size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import real_size
import torch
from random_checkpoint import PUBLISHED, Shape, checkpoint_folder, config_of, make_checkpoint
from real_size import MemoryWatch, kv_bytes, report, shortage

from redvtp.families.config import load_config, read_config
from redvtp.models.loading import checkpoint_weights, weight_files

GIB = 1 << 30
SMALL = Shape("llada-v", 64, 128, 2, 4, 64, 1, 56)
TINY = [
    *("--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "4"),
    *("--tower-hidden", "64", "--tower-layers", "2", "--tile", "56", "--image", "90x60", "--gen-length", "8"),
]


def test_nothing_is_missing_where_there_is_enough() -> None:
    assert shortage(22 * GIB, 17 * GIB, 22 * GIB, 17 * GIB) is None


def test_what_is_missing_is_named_with_a_remedy() -> None:
    memory, disk = (shortage(20 * GIB, 17 * GIB, 22 * GIB, 17 * GIB), shortage(30 * GIB, GIB, 22 * GIB, 17 * GIB))
    assert memory is not None
    assert disk is not None
    assert memory.startswith("needs 22 GiB of memory and 20 GiB are free: ")
    assert disk == "needs 17 GiB of disk for the checkpoint and 1 GiB are free: choose another folder with --workdir"
    assert shortage(20 * GIB, GIB, 22 * GIB, 17 * GIB) == f"{memory}\n{disk}"


def test_a_machine_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there is, whatever machine this is."""
    monkeypatch.setattr(real_size, "BESIDE", psutil.virtual_memory().total)
    with pytest.raises(SystemExit, match=r"of memory and .* are free: end other programs"):
        real_size.main([*TINY, "--workdir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_cache_holds_one_longest_request_and_vllms_block() -> None:
    """32 layers, keys and values of 4,096 numbers of two bytes: 512 KiB a token, docs/models.md."""
    assert kv_bytes(read_config(config_of(PUBLISHED), Path()), 4096) == (4096 + 32) * 512 * 1024


def test_shards_hold_what_a_single_file_holds(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path, SMALL)
    saved: list[Path] = []
    sharded = make_checkpoint(tmp_path, replace(SMALL, shard_bytes=100_000), saved.append)
    assert len(saved) > 3
    assert weight_files(sharded) == saved
    expected, found = (dict(checkpoint_weights(folder)) for folder in (whole, sharded))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # One tensor may be larger than a shard should be.
    largest = max(tensor.nbytes for tensor in expected.values())
    assert max(file.stat().st_size for file in saved) < max(100_000, largest) + 10_000


def test_sizes_of_a_shape_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    shape = replace(SMALL, vocab=1000, tower_inner=80, tower_heads=2, dtype="bfloat16")
    assert checkpoint_folder(tmp_path, shape)[1] is False
    folder = make_checkpoint(tmp_path, shape)
    assert checkpoint_folder(tmp_path, shape) == (folder, True)
    config, tensors = load_config(folder), dict(checkpoint_weights(folder))
    assert tensors["lm_head.weight"].shape == (config.vocab_size, 64) == (1000, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # The sizes that go without a folder of the tower are the same.
    assert read_config(config_of(shape), tmp_path) == config


def test_the_peak_is_seen_and_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_size, "SAMPLE_SECONDS", 0.01)
    with MemoryWatch(say_seconds=0.05) as watch:
        watch.doing = "a tensor is held"
        held = torch.ones(100 << 20, dtype=torch.uint8)
        time.sleep(0.3)
        del held
    # Other processes take and give memory, too.
    assert watch.taken > 0
    assert re.search(r"^\d+ s: a tensor is held, .*B taken$", capsys.readouterr().err, re.M)


def test_the_report_has_load_steps_blocks_and_memory() -> None:
    step = {"step": 0, "kind": "full", "tokens_computed": 1550, "blocks_freed": 35, "ms": 67_040.0}
    found = {
        "trace": [step], "prompt_tokens": 1546, "visual_tokens": 1485, "visual_tokens_kept": 371, "blocks_freed": 35,
        "kv_blocks_admitted": 49,
    }  # fmt: skip
    model = {"parameters_bytes": 16 * GIB, "kv_cache_bytes": 2 * GIB}
    text = report({"model": model, "load_s": 121.4, "memory_bytes": 19 * GIB, "report": found})
    for words in ("ready after 121 s", "19 GiB of memory taken", "1,485 visual tokens, 371 kept", "35 of 49 KV blocks"):
        assert words in text
    assert re.search(r"\|\s*0 \| full\s*\|\s*1,550 \|\s*35 \|\s*67\.0 \|", text)


@pytest.mark.serving
def test_a_tiny_checkpoint_is_written_served_and_asked(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(real_size.__file__)), *TINY, "--workdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "results.json")], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "KV blocks freed" in done.stdout
    assert "being written" in done.stderr
    assert "wrote model-00000.safetensors" in done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["report"]
    assert len(found["trace"]) == found["steps"] == 3
    assert found["blocks_freed"] == sum(step["blocks_freed"] for step in found["trace"]) > 0
    assert found["visual_tokens_kept"] == found["visual_tokens"] // 4
    assert results["load_s"] > 0
