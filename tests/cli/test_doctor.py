"""`redvtp doctor`: whole checkpoints, damaged ones, and numbers that are those of an engine that holds the model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from golden_data import Case, checkpoint_dir
from redvtp.cli.main import main
from redvtp.doctor.checkpoint import Checkpoint, examine
from redvtp.doctor.installation import installed
from redvtp.doctor.machine import Machine
from redvtp.doctor.memory import longest_that_fits, needs_of, serve_line
from redvtp.families.config import load_config
from redvtp.local import LocalEngine
from redvtp.model_folder import looks_like_a_path, why_no_model
from redvtp.models.loading import INDEX

ROOT = Path(__file__).resolve().parents[2]
TINY_DVLM = ROOT / "examples" / "tiny_dvlm"
MODEL = checkpoint_dir("tiny-llada-v")
WIDE = Case("tiny-llada-v", "wide")


def _doctor(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["doctor", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return status, out


def _report(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status, out = _doctor(capfd, *arguments, "--json")
    report: dict[str, Any] = json.loads(out)
    assert report["ok"] == (status == 0)
    return status, report


def _problems(checkpoint: Checkpoint) -> list[str]:
    return [str(finding) for finding in checkpoint.findings if finding.remedy]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break, beside its tower."""
    for name in (MODEL.name, "siglip2-so400m-patch14-tiny56"):
        shutil.copytree(checkpoint_dir(name), tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
    return tmp_path / MODEL.name


def _shard(folder: Path) -> list[Path]:
    """The copy's weights in three files, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index: dict[str, str] = {}
    files = []
    for number in range(3):
        part = names[number::3]
        files.append(folder / f"model-{number + 1:05}-of-00003.safetensors")
        save_file({name: weights[name] for name in part}, files[-1])
        index |= dict.fromkeys(part, files[-1].name)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return files


def test_the_shipped_model_is_whole(capfd: pytest.CaptureFixture[str]) -> None:
    status, out = _doctor(capfd, TINY_DVLM)
    assert status == 0, out
    assert "family LLaDA-V (LlavaLLaDAModelLM), 6 layers" in out
    assert "vLLM finds the plugin redvtp" in out
    line = out.splitlines()[-1]
    assert shlex.split(line)[1:5] == ["serve", str(TINY_DVLM), "--plugin", "redvtp"]


@pytest.mark.parametrize("name", ["tiny-llada-v", "tiny-lavida", "tiny-lavida-dream"])
def test_bytes_are_those_of_an_engine_with_the_model(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    engine = LocalEngine(checkpoint_dir(name), dtype="bfloat16", num_blocks=4, block_size=32)
    pages = sum(pages.nbytes for pages in (*engine.cache.keys, *engine.cache.values))
    status, report = _report(capfd, checkpoint_dir(name), "--dtype", "bfloat16", "--max-model-len", "160")
    assert status == 0, report["findings"]
    memory = report["memory"]
    assert memory["weights"] == sum(parameter.nbytes for parameter in engine.model.parameters())
    assert memory["kv_token"] == pages / (4 * 32)
    # 160 tokens are five blocks; vLLM keeps one for itself.
    assert memory["one_request"] == 6 * 32 * memory["kv_token"]
    assert memory["kv_cache"] == (8 * 5 + 1) * 32 * memory["kv_token"]
    assert report["family"] == load_config(checkpoint_dir(name)).family.name
    assert report["server"]["dtype"] == "bfloat16"


def test_visual_tokens_are_the_references(capfd: pytest.CaptureFixture[str]) -> None:
    status, report = _report(capfd, MODEL, "--image", WIDE.image_files[0])
    assert status == 0
    (count,) = [count for name, count in report["visual_tokens"].items() if str(WIDE.image_files[0]) in name]
    assert count == WIDE.meta["num_visual_tokens_total"]
    status, report = _report(capfd, MODEL, "--image", WIDE.image_files[0], "--max-model-len", "128")
    assert status == 1
    (problem,) = [finding for finding in report["findings"] if finding["remedy"]]
    assert f"use --max-model-len {count + 128}" in problem["remedy"]


def test_attention_and_device_are_the_servers(capfd: pytest.CaptureFixture[str]) -> None:
    _, report = _report(capfd, MODEL)
    assert (
        report["server"]["attention"]
        == "torch, since vLLM's CPU kernel knows no head_dim 16, only "
        + (report["server"]["attention"].rpartition("only ")[2])
    )
    assert report["device"]["device"] == report["server"]["device"] == "cpu"


def test_a_missing_shard_is_named(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = _shard(copy)
    assert not _problems(examine(str(copy)))
    for file in files[1:]:
        file.unlink()
    status, out = _doctor(capfd, copy)
    assert status == 1
    (line,) = [line for line in out.splitlines() if line.strip().startswith("!")]
    assert f"lacks 2 weight files named in {INDEX}: {files[1].name}, {files[2].name} -> copy" in line
    assert "vllm serve" not in out.splitlines()[-2]


def test_everything_that_is_broken_is_said_at_once(copy: Path) -> None:
    files = _shard(copy)
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (copy / "tokenizer.json").unlink()
    problems = _problems(examine(str(copy)))
    assert len(problems) == 3
    assert problems[0] == (
        f"! {copy} has no tokenizer.json -> copy tokenizer.json and tokenizer_config.json into {copy} again"
    )
    for file, problem in zip(files[:2], problems[1:], strict=True):
        assert problem.startswith(f"! {file} is not a whole safetensors file (cut short while copying?)")


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = load_file(file)

    def problem(**changed: Any) -> str:
        weights = {name: tensor for name, tensor in (whole | changed).items() if tensor is not None}
        save_file(weights, file)
        (found,) = _problems(examine(str(copy)))
        return found

    assert "checkpoint lacks 1 tensor: model.norm.weight -> copy" in problem(**{"model.norm.weight": None})
    assert "1 tensor that the model does not: model.extra" in problem(**{"model.extra": torch.zeros(1)})
    short = whole["model.norm.weight"][:-1].clone()
    assert "model.norm.weight of shape [63] does not fit" in problem(**{"model.norm.weight": short})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures ['LlamaForCausalLM'] is not supported; supported: ",
        ),
        ({"architectures": ["LlavaLLaDAModel"]}, "did you mean 'LlavaLLaDAModelLM'? -> serve a checkpoint of a sup"),
        (
            {"rope_scaling": {"factor": 2}},
            "rope_scaling {'factor': 2} is not supported; supported: None -> take",
        ),
        ({"mm_vision_tower": "siglip-nosuch"}, "the geometry of mm_vision_tower 'siglip-nosuch' is not known"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_says_why(copy: Path, changed: dict[str, Any], said: str) -> None:
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    (problem,) = _problems(examine(str(copy)))
    assert said in problem
    config.write_text("{")
    assert "config.json is not valid JSON" in _problems(examine(str(copy)))[0]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such/folder", "there is no such folder; name one with a published checkpoint's config.json"),
        (f"{ROOT}/example/tiny_dvlm", f"there is no such folder; did you mean {TINY_DVLM}?"),
        (f"{ROOT}/examples/tiny-dvlm", f"there is no such folder; did you mean {TINY_DVLM}?"),
        (str(ROOT / "tests"), "it has no config.json; name a folder with"),
        (__file__, "is not a checkpoint folder but a file; name the folder with"),
        ("GSAI-ML/LLaDA-V", "`vllm serve GSAI-ML/LLaDA-V` would try the Hugging Face hub; fetch it with `hf download"),
    ],
)
def test_what_is_no_checkpoint_folder_is_said_with_what_is_one(
    model: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = why_no_model(model)
    assert reason is not None
    assert said in reason
    (problem,) = _problems(examine(model))
    assert problem == f"! {reason.partition('; ')[0]} -> {reason.partition('; ')[2]}"


def test_paths_are_told_from_ids_of_a_hub() -> None:
    assert all(map(looks_like_a_path, ("./m", "../m", "/m", "~/m", "a/b/c", ".")))
    assert not any(map(looks_like_a_path, ("m", "org/name", "s3://bucket/a/b", "org/name/file.gguf")))


GIB = 1 << 30
CONFIG = load_config(MODEL)


@given(free=st.integers(1, 64 * GIB), length=st.integers(256, 4096), seqs=st.integers(1, 512))
def test_the_command_line_never_takes_more_than_is_free(free: int, length: int, seqs: int) -> None:
    here = Machine("cpu", "", 64 * GIB, free)
    large = Checkpoint((), CONFIG, parameters=4 * GIB)
    needs = needs_of(large, CONFIG, here, "bfloat16", (length, seqs), 32)
    if needs.least <= free:
        assert needs.total <= free
        words = shlex.split(serve_line("vllm", "model", needs, "cpu", "auto"))
        size = int(words[words.index("--kv-cache-memory-bytes") + 1].removesuffix("M")) << 20
        assert needs.one_request <= size < needs.kv_cache + (1 << 20)
        return
    shorter = longest_that_fits(needs, free)
    if shorter:
        assert needs_of(large, CONFIG, here, "bfloat16", (shorter, seqs), 32).least <= free + 64 * needs.kv_token
    else:
        assert needs_of(large, CONFIG, here, "bfloat16", (224, seqs), 32).total > free - GIB


def test_too_little_memory_is_a_problem_with_a_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    status, out = _doctor(capfd, MODEL, "--max-num-seqs", 10**8, "--max-model-len", 4096)
    assert status == 1
    assert "does not fit: " in out
    assert "are free -> use " in out


def test_an_allow_list_that_keeps_the_plugin_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [finding for finding in installed() if finding.remedy]
    monkeypatch.setenv("VLLM_PLUGINS", "lora_hf_hub_resolver")
    (problem,) = [finding for finding in installed() if finding.remedy]
    assert "VLLM_PLUGINS=lora_hf_hub_resolver keeps the plugin redvtp out" in problem.text


def test_the_command_is_written_as_it_must_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    beside = Path(sys.executable).with_name("vllm")
    assert f"it is {beside} (or first" in "\n".join(finding.text for finding in installed())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-model-len", "0"), "--max-model-len must be an integer >= 1, got 0"),
        (("--max-num-seqs", "x"), "--max-num-seqs must be an integer >= 1, got 'x'"),
        (("--image", "nosuch.png"), "image file nosuch.png does not exist"),
    ],
)
def test_flags_without_a_meaning_are_refused(
    flags: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(MODEL), *flags]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"redvtp doctor: error: {said}\n")


def test_a_length_beyond_the_checkpoints_is_a_problem(capfd: pytest.CaptureFixture[str]) -> None:
    status, out = _doctor(capfd, MODEL, "--max-model-len", "99999")
    assert status == 1
    assert "! --max-model-len 99999 is more than the 4096 positions of the checkpoint -> use 4096 or less" in out
