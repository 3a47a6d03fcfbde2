"""benchmarks/decode.py: a run at a tiny size, and torch's FLOP counts against what the steps report."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from flops import request_flops

from benchmarks.reported_flops import reported_flops
from golden_data import Case, checkpoint_dir
from redvtp.local import LocalEngine, Request
from redvtp.params import PRESETS, DenoisingParams, PruningParams

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DECODE = str(BENCHMARKS / "decode.py")
TINY = [
    *("--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "4"),
    *("--tower-hidden", "64", "--tower-layers", "2", "--tile", "56", "--image", "90x60"),
    *("--gen-length", "8", "--block-length", "8", "--steps", "4", "--keep", "50", "25"),
    *("--repeats", "2", "--threads", "1", "--device", "cpu", "--quiet"),
]


def test_the_benchmark_reports_every_setting(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "decode.py", *TINY, "--workdir", tmp_path, "--json", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("FLOP ceiling", "KV blocks", "Peak memory of the first step", "Where a step's time goes", "accuracy"):
        assert words in done.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["cache"], row["setting"]): row for row in results["rows"]}
    assert list(rows) == [
        (cache, name) for cache in ("none", "prefix") for name in ("dense", "redvtp 50%", "redvtp 25%")
    ]
    dense = rows["none", "dense"]
    assert (dense["ratio"], dense["ceiling"], dense["reached"], dense["agreement"]) == (1, 1, 1, 1)
    for row in rows.values():
        assert len(row["latencies_s"]) == 2
        assert row["peak_bytes"] > 0
        assert row["ceiling"] >= 1
    assert rows["none", "redvtp 25%"]["ceiling"] > rows["none", "redvtp 50%"]["ceiling"] > 1
    prompt, visual = results["request"]["prompt_tokens"], results["request"]["visual_tokens"]
    for keep, name in ((0.5, "redvtp 50%"), (0.25, "redvtp 25%")):
        after = prompt - visual + int(visual * keep) + 8
        assert rows["prefix", name]["kv_blocks_at_end"] == -(-after // 32)


def test_lavida_is_measured_behind_a_prompt_encoded_once(tmp_path: Path) -> None:
    command = [DECODE, *TINY, "--family", "lavida", "--workdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, "--json", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["cache"], row["setting"]): row for row in results["rows"]}
    names = ("dense", "redvtp 50%", "redvtp 25%")
    assert list(rows) == [(cache, name) for cache in ("none", "prefix_lm") for name in names]
    assert rows["prefix_lm", "dense"]["ceiling"] > rows["none", "dense"]["ceiling"] == 1
    prompt, visual = results["request"]["prompt_tokens"], results["request"]["visual_tokens"]
    # 90x60 pixels on two tiles of 4x4 patches pooled to 2x2: one tile of the whole, two rows of four with newlines.
    assert visual == 4 + 2 * (4 + 1)
    after = prompt - visual + int(visual * 0.25) + 8
    assert rows["prefix_lm", "redvtp 25%"]["kv_blocks_at_end"] == -(-after // 32)


def test_long_lavida_answers_compute_what_each_cache_leaves(tmp_path: Path) -> None:
    """Several canvas blocks, with the caches LaViDa can be run with, policies and a confidence rule in one table."""
    command = [DECODE, *TINY, "--family", "lavida", "--workdir", str(tmp_path), "--repeats", "1"]
    command += ["--gen-length", "16", "--block-length", "4", "--steps", "16", "--keep", "25", "--thresholds", "1"]
    command += ["--cache", "none", "prefix", "dual", "prefix_lm", "--policies", "redvtp", "zipvl", "attention-free"]
    done = subprocess.run(
        [sys.executable, *command, "--json", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["cache"], row["threshold"], row["setting"]): row for row in results["rows"]}
    caches, names = ("none", "prefix", "dual", "prefix_lm"), ("dense", "redvtp 25%", "zipvl", "attention-free 25%")
    assert list(rows) == [(cache, threshold, name) for cache in caches for threshold in (None, 1) for name in names]
    for (_, threshold, _), row in rows.items():
        assert row["steps"] == 16 if threshold is None else row["steps"] <= 16
        # Here the few visual tokens hold less attention than zipvl wants: it scores and drops nothing.
        assert row["ceiling"] >= 1 or row["policy"] == "zipvl"

    visual, total = results["request"]["visual_tokens"], results["request"]["prompt_tokens"] + 16
    fewer = total - (visual - int(visual * 0.25))
    by_blocks = [16 - step // 4 * 4 for step in range(16)]
    # A block begins with a full step, or with the whole canvas where the prompt's pages know of tokens that are gone.
    refreshed = [rows_left if step % 4 else total for step, rows_left in enumerate(by_blocks)]
    once_pruned = [rows_left if step % 4 else 16 for step, rows_left in enumerate(by_blocks)]
    expected = {
        ("none", "dense"): [total] * 16,
        ("none", "redvtp 25%"): [total] + [fewer] * 15,
        ("none", "attention-free 25%"): [fewer] * 16,
        ("prefix", "dense"): refreshed,
        ("prefix", "redvtp 25%"): [total, *once_pruned[1:]],
        ("dual", "dense"): [total, 4, 4, 4] * 4,
        ("dual", "redvtp 25%"): [total, 16, 4, 4] + [16, 4, 4, 4] * 3,
        ("prefix_lm", "dense"): [total] + [16] * 15,
        ("prefix_lm", "redvtp 25%"): [total] + [16] * 15,
        ("prefix_lm", "attention-free 25%"): [fewer] + [16] * 15,
    }
    assert {(cache, name): rows[cache, None, name]["tokens_computed"] for cache, name in expected} == expected


def test_every_policy_gets_a_ceiling_from_the_tokens_it_computed(tmp_path: Path) -> None:
    command = [DECODE, *TINY, "--policies", "redvtp", "uniform", "--cache", "none", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--workdir", tmp_path, "--json", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["setting"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "redvtp 50%", "redvtp 25%", "uniform 50%", "uniform 25%"]
    total = results["request"]["prompt_tokens"] + 8
    for row in rows.values():
        dropped = results["request"]["visual_tokens"] - row["visual_tokens_kept"]
        assert row["tokens_computed"] == [total, *[total - dropped] * 3]
    # The same tokens, but nobody looks at them first.
    assert rows["uniform 25%"]["flops"] < rows["redvtp 25%"]["flops"] < rows["uniform 50%"]["flops"]


def test_thresholds_stand_beside_fixed_steps(tmp_path: Path) -> None:
    command = [DECODE, *TINY, "--cache", "none", "--repeats", "1", "--keep", "25"]
    done = subprocess.run(
        [sys.executable, *command, "--thresholds", "1000", "--workdir", tmp_path, "--json", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["threshold"], row["setting"]) for row in rows] == [
        (threshold, setting) for threshold in (None, 1000) for setting in ("dense", "redvtp 25%")
    ]
    # This one asks for nothing: the whole block at once, before anything is pruned.
    assert [row["steps"] for row in rows] == [4, 4, 1, 1]
    assert rows[2]["ceiling"] > rows[1]["ceiling"] > 1


def test_a_wrong_size_is_refused_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "decode.py", "--image", "wide", "--workdir", tmp_path],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 2
    assert "must be WIDTHxHEIGHT in pixels, got 'wide'" in done.stderr


@pytest.mark.parametrize(
    "pruning",
    [PruningParams("none"), PruningParams("redvtp", 0.3), PruningParams("uniform", 0.3)],
    ids=lambda pruning: pruning.preset,
)
@pytest.mark.parametrize(
    ("cache", "refresh_interval"), [("none", 32), ("prefix", 32), ("prefix", 3), ("dual", 5), ("prefix_lm", 32)]
)
@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida"])
@pytest.mark.parametrize("name", ["square", "wide"])
def test_counted_flops_are_those_torch_sees(
    checkpoint: str,
    name: str,
    cache: str,
    refresh_interval: int,
    pruning: PruningParams,
) -> None:
    denoising = DenoisingParams(
        gen_length=24, block_length=8, steps=12, ignore_eos=True, cache=cache, refresh_interval=refresh_interval
    )
    counted, seen = _flops(Case(checkpoint, name), denoising, pruning)
    assert counted == seen


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "external"])
def test_flops_of_every_policy_are_counted(preset: str, cache: str) -> None:
    denoising = DenoisingParams(gen_length=24, block_length=8, steps=12, ignore_eos=True, cache=cache)
    counted, seen = _flops(Case("tiny-lavida", "wide"), denoising, PruningParams(preset, 0.3))
    # Rows that leave half way are reported rounded up, and choosing by features is not counted.
    assert counted == pytest.approx(seen, rel=0.01 if preset == "attention-free" else 0.005)


@cache
def _engine(checkpoint: str) -> LocalEngine:
    """It computes every image anew."""
    return LocalEngine(checkpoint_dir(checkpoint), dtype="float32", device="cpu", vision_cache_bytes=0)


def _flops(case: Case, denoising: DenoisingParams, pruning: PruningParams) -> tuple[int, int]:
    """A request's, counted from its reports and seen by torch."""
    engine = _engine(case.checkpoint)
    request = Request(case.prompt, tuple(case.images()), denoising, pruning)
    seen = request_flops(engine, request)
    (generation,) = engine.generate([request])
    assert len(generation.steps) == denoising.steps
    tiles = sum(item.inputs().shape[0] for item in engine.config.vision.items(request.images))
    return reported_flops(engine.config, generation, engine.special.mask_id, tiles), seen
