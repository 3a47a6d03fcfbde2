"""`redvtp generate`: what it prints and writes, and how it refuses what it cannot serve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from image_bytes import claimed_png
from PIL import Image
from safetensors.torch import load_file, save_file

from golden_data import Case, checkpoint_dir, runs
from redvtp.cli.main import main

MODEL = checkpoint_dir("tiny-llada-v")
WIDE = Case("tiny-llada-v", "wide")
RUN = next(run for run in runs("redvtp") if run.case == WIDE and run.name == "redvtp_k25_g32_b32_s16")
FLAGS = ["--gen-length", "32", "--block-length", "32", "--steps", "16", "--keep-ratio", "0.25", "--ignore-eos"]


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    script = Path(sys.executable).with_name("redvtp")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "redvtp.cli.main"]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False)


def _in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One real run of a golden case, with all its outputs."""
    folder = tmp_path_factory.mktemp("generate")
    done = _command(
        "generate", MODEL, "--image", *WIDE.image_files, "--prompt", WIDE.question, *FLAGS,
        "--trace", folder / "trace.json", "--heatmap", folder / "kept.png", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trace = json.loads((folder / "trace.json").read_text())
    return {"summary": json.loads(done.stdout), "trace": trace, "heatmap": folder / "kept.png", "stderr": done.stderr}


def test_the_trace_has_the_documented_fields(traced: dict[str, Any]) -> None:
    trace = traced["trace"]
    assert set(trace) == {
        "model", "prompt_tokens", "visual_tokens", "visual_spans", "steps", "prunings", "output_ids", "text",
        "finish_reason",
    }  # fmt: skip
    for step in trace["steps"]:
        assert set(step) == {
            "step", "canvas_block", "kind", "tokens_computed", "kv_tokens", "kv_blocks", "blocks_freed", "canvas", "ms",
        }  # fmt: skip
    for pruning in trace["prunings"]:
        assert set(pruning) == {"step", "layer", "visual_before", "importance", "kept"}


def test_the_trace_is_the_references_run(traced: dict[str, Any]) -> None:
    trace = traced["trace"]
    assert trace["prompt_tokens"] == WIDE.meta["prompt_len"]
    assert trace["visual_tokens"] == WIDE.meta["num_visual_tokens_total"]
    start = WIDE.meta["image_token_pos"][0]
    assert trace["visual_spans"] == [[start, start + trace["visual_tokens"]]]
    assert [step["canvas"] for step in trace["steps"]] == RUN.tensor("x").tolist()
    assert [step["step"] for step in trace["steps"]] == list(range(16))
    (pruning,) = trace["prunings"]
    assert (pruning["step"], pruning["layer"], pruning["visual_before"]) == (0, None, 70)
    assert pruning["kept"] == RUN.tensor("kept").tolist()
    assert len(pruning["importance"]) == 70
    assert trace["output_ids"] == RUN.output
    assert trace["finish_reason"] == "length"


def test_the_trace_counts_tokens_and_blocks(traced: dict[str, Any]) -> None:
    steps = traced["trace"]["steps"]
    pruned = 70 - RUN.tensor("kept").numel()
    before = WIDE.meta["prompt_len"] + 32
    after = before - pruned
    assert steps[0]["tokens_computed"] == before
    assert steps[0]["blocks_freed"] == -(-before // 32) - -(-after // 32)
    for step in steps:
        assert (step["kv_tokens"], step["kv_blocks"]) == (after, -(-after // 32))
        assert step["ms"] > 0
    assert {step["tokens_computed"] for step in steps[1:]} == {after}
    assert {step["blocks_freed"] for step in steps[1:]} == {0}


def test_json_sums_the_trace_up(traced: dict[str, Any]) -> None:
    summary, trace = traced["summary"], traced["trace"]
    for field in ("text", "output_ids", "finish_reason", "prompt_tokens", "visual_tokens"):
        assert summary[field] == trace[field]
    assert summary["visual_tokens_kept"] == len(trace["prunings"][0]["kept"])
    assert summary["denoising_steps"] == 16
    assert summary["blocks_freed"] == trace["steps"][0]["blocks_freed"]


def test_the_heat_map_is_a_png_of_the_images_size(traced: dict[str, Any]) -> None:
    with Image.open(traced["heatmap"]) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size == tuple(WIDE.meta["image_sizes"][0])


def test_nothing_but_the_answer_is_on_stdout_and_no_bar_without_a_terminal(
    traced: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "%|" not in traced["stderr"]
    status, out, _ = _in_process(
        capsys, "generate", MODEL, "--image", *WIDE.image_files, "--prompt", WIDE.question, *FLAGS
    )
    assert status == 0
    assert out == traced["trace"]["text"] + "\n"


def test_a_raw_prompt_is_taken_as_it_is(traced: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in (["--raw-prompt", WIDE.prompt], ["--prompt", WIDE.prompt, "--raw-prompt"]):
        status, out, err = _in_process(
            capsys, "generate", MODEL, "--image", *WIDE.image_files, *prompt, *FLAGS, "--json"
        )
        assert status == 0, err
        assert json.loads(out)["output_ids"] == traced["trace"]["output_ids"]


def test_a_request_without_an_image_is_text_only(capsys: pytest.CaptureFixture[str]) -> None:
    run = next(run for run in runs("plain") if run.case.name == "text_only" and run.name == "plain_g32_b32_s16")
    status, out, err = _in_process(
        capsys, "generate", MODEL, "--prompt", run.case.question, *FLAGS[:6], "--ignore-eos", "--json"
    )
    assert status == 0, err
    summary = json.loads(out)
    assert summary["output_ids"] == run.output
    assert summary["visual_tokens"] == summary["visual_tokens_kept"] == 0


def test_several_images_give_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("tiny-llada-v", "two_pad_tensor")
    picture = tmp_path / "kept.png"
    status, _, err = _in_process(
        capsys, "generate", MODEL, "--image", *case.image_files, "--prompt", case.question, "--gen-length", "8",
        "--heatmap", picture,
    )  # fmt: skip
    assert status == 0, err
    (first, second) = case.meta["image_sizes"]
    with Image.open(picture) as drawn:
        assert drawn.width > first[0] + second[0]
        assert drawn.height == max(first[1], second[1])


def test_a_refusal_is_one_line_and_status_2_in_a_real_process() -> None:
    done = _command("generate", MODEL, "--prompt", "hello", "--keep-ratio", "1.5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "redvtp generate: error: --keep-ratio must be a number in (0, 1], got 1.5\n"


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal."""
    status, out, err = _in_process(capsys, "generate", *arguments)
    assert status == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-ratio", "0"], "--keep-ratio must be a number in (0, 1], got 0.0"),
        (["--keep-ratio", "1.5"], "--keep-ratio must be a number in (0, 1], got 1.5"),
        (["--keep-ratio", "x"], "--keep-ratio must be a number in (0, 1], got 'x'"),
        (["--keep-ratio", "nan"], "--keep-ratio must be a number in (0, 1], got nan"),
        (["--gen-length", "0"], "--gen-length must be an integer"),
        (["--gen-length", "2.5"], "--gen-length must be an integer"),
        (["--gen-length", "32", "--steps", "33"], "--steps must be an integer in [1, 32], got 33"),
        (["--temperature", "-1"], "--temperature must be a number >= 0, got -1.0"),
        (["--remasking", "best"], "--remasking must be one of low_confidence, entropy, margin, random, got 'best'"),
        (["--cache", "suffix"], "--cache must be one of none, prefix, dual, prefix_lm, got 'suffix'"),
        (["--pruning", "later"], "--pruning must be one of"),
        (["--score-rows", "all"], "--score-rows must be one of masked, response, prompt, prompt_response, committed"),
        (["--score-layers", "9"], "--score-layers must be layers N or a range A:B within 0:4, got '9'"),
        (["--attention-mass", "2"], "--attention-mass must be a number in (0, 1], got 2.0"),
        (["--prune-step", "31"], "--prune-step must be an integer in [0, 30] with 32 denoising steps, got 31"),
        (["--importance", "no/such.json"], "--importance no/such.json cannot be read"),
        (["--schedule", "steep"], "--schedule must be one of even, linear, shift, cosine, logit_normal, dream"),
        (["--threshold", "0"], "--threshold must be a number in (0, 1000], got 0.0"),
        (["--min-confidence", "2"], "--min-confidence must be a number in [0, 1], got 2.0"),
        (["--threshold", "1", "--min-confidence", "0.9"], "--threshold and --min-confidence exclude each other"),
        (["--schedule-shift", "-3"], "--schedule-shift must be a number in [0.001, 1000], got -3.0"),
        (["--engine", "tgi"], "--engine must be one of local, vllm, got 'tgi'"),
        (["--max-model-len", "0"], "--max-model-len must be an integer >= 1, got 0"),
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], ", got 'cuda:99'"),
        (["--kv-cache-memory-bytes", "2GB"], "--kv-cache-memory-bytes must be a number of bytes such as 800M or 4G"),
        (["--kv-cache-memory-bytes", "0"], "must be a number of bytes such as 800M or 4G, got 0"),
        (["--kv-cache-memory-bytes", "1k"], "--kv-cache-memory-bytes must be at least "),
        (
            ["--kv-cache-memory-bytes", "200K", "--gen-length", "500"],
            "tokens of KV cache, which has 96; give the engine more blocks (--kv-cache-memory-bytes)",
        ),
        (["--heatmap", "kept.png"], "--heatmap needs an --image"),
        (["--trace", "no/such/folder/trace.json"], "--trace no/such/folder/trace.json cannot be written"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate (see"),
        (["--keep-ration=0.5"], "unrecognized arguments: --keep-ration=0.5; did you mean --keep-ratio? (see"),
        (["--pruning", "redvpt"], "uniform, none, got 'redvpt'; did you mean 'redvtp'?"),
        (["--dtype", "bfloat"], "; did you mean 'bfloat16'? (see"),
        (["--engine", "vlm"], "--engine must be one of local, vllm, got 'vlm'; did you mean 'vllm'?"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _refused(capsys, MODEL, "--prompt", "hello", *flags)


def test_importance_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visual = WIDE.meta["num_visual_tokens_total"]
    file, trace = tmp_path / "importance.json", tmp_path / "trace.json"
    asked = [MODEL, "--image", *WIDE.image_files, "--prompt", "What?", "--gen-length", "8", "--pruning", "external"]
    file.write_text(json.dumps([index / visual for index in range(visual)]))
    heatmap = tmp_path / "kept.png"
    outputs = ["--trace", trace, "--heatmap", heatmap]
    status, _, err = _in_process(capsys, "generate", *asked, "--importance", file, "--keep-ratio", "0.5", *outputs)
    assert status == 0, err
    (pruning,) = json.loads(trace.read_text())["prunings"]
    assert pruning["step"] == -1
    assert pruning["kept"] == list(range(visual - visual // 2, visual))
    assert Image.open(heatmap).size == WIDE.images()[0].size
    for text, words in (
        ("[1, 2]", f"one number for each of the {visual} visual tokens of the request, got 2"),
        ("[NaN]", "--importance must be finite numbers"),
        ('{"scores": []}', "must hold a list, one number for each visual token"),
        ("[1,", "is not JSON"),
    ):
        file.write_text(text)
        assert words in _refused(capsys, *asked, "--importance", file)


def test_a_prompt_and_canvas_over_the_limit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(
        capsys, MODEL, "--image", *WIDE.image_files, "--prompt", WIDE.question, "--max-model-len", "150",
        "--gen-length", "32",
    )  # fmt: skip
    assert (
        "(132 tokens, 70 of them visual) plus --gen-length 32 exceeds --max-model-len 150; shorten --gen-length" in line
    )


def test_more_image_marks_than_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(capsys, MODEL, "--image", *WIDE.image_files, "--prompt", "like <image> this one?")
    assert "the prompt has 2 <image> marks but 1 image was given" in line


@pytest.mark.parametrize(
    ("prompt", "marks"), [("describe it", "0 <image> marks"), ("<image> <image>", "2 <image> marks")]
)
def test_a_raw_prompt_must_have_a_mark_for_each_image(
    prompt: str, marks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refused(capsys, MODEL, "--image", *WIDE.image_files, "--raw-prompt", prompt)
    assert f"the prompt has {marks} but 1 image was given" in line


def test_an_empty_raw_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt is empty" in _refused(capsys, MODEL, "--raw-prompt", "")


def test_a_file_that_is_no_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    assert "notes.txt" in _refused(capsys, MODEL, "--image", text, "--prompt", "hello")
    assert "gone.png" in _refused(capsys, MODEL, "--image", tmp_path / "gone.png", "--prompt", "hello")


def test_a_truncated_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.png"
    whole = WIDE.image_files[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cut.png" in _refused(capsys, MODEL, "--image", cut, "--prompt", "hello")


def test_a_decompression_bomb_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(claimed_png(30_000, 30_000))
    line = _refused(capsys, MODEL, "--image", bomb, "--prompt", "hello")
    assert "bomb.png" in line
    assert "pixels" in line


def test_an_image_too_large_for_pil_to_like_is_refused_by_its_size_in_one_line(tmp_path: Path) -> None:
    """Between PIL's limit and twice that, PIL only warns."""
    file = tmp_path / "large.png"
    file.write_bytes(claimed_png(11_000, 11_000))
    done = _command("generate", MODEL, "--image", file, "--prompt", "hello")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"image file {file}: image of 11000x11000 has more than 89,478,485 pixels" in line


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (20_000, 12)])
def test_an_extreme_image_is_served_or_refused_by_its_size(
    size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a crash: an answer, or one line that names the size."""
    file = tmp_path / "extreme.png"
    Image.new("RGB", size, "red").save(file)
    status, out, err = _in_process(capsys, "generate", MODEL, "--image", file, "--prompt", "hello", "--gen-length", "8")
    if status == 0:
        assert out
    else:
        assert status == 2
        assert f"{size[0]}x{size[1]}" in err
        assert len(err.splitlines()) == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break, beside its tower."""
    for name in ("tiny-llada-v", "siglip2-so400m-patch14-tiny56"):
        shutil.copytree(checkpoint_dir(name), tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "tiny-llada-v"


def test_a_checkpoint_that_lacks_a_tensor_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.image_newline"], weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    line = _refused(capsys, checkpoint, "--prompt", "hello")
    assert "lacks 2 tensors: model.image_newline, model.norm.weight" in line


def test_a_damaged_tokenizer_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    assert f"the tokenizer in {checkpoint} cannot be read" in _refused(capsys, checkpoint, "--prompt", "hello")


def test_weights_cut_short_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is not a whole safetensors file" in _refused(capsys, checkpoint, "--prompt", "hello")


def test_another_architecture_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["LlavaQwenForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    line = _refused(capsys, checkpoint, "--prompt", "hello")
    assert "LlavaQwenForCausalLM" in line
    assert "LlavaLLaDAModelLM" in line


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.json" in _refused(capsys, tmp_path, "--prompt", "hello")


def test_help_names_every_flag_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _in_process(capsys, "generate", "--help")
    assert status == 0
    for flag in ("--image", "--prompt", "--gen-length", "--keep-ratio", "--score-rows", "--prune-step", "--importance",
                 "--cache", "--trace", "--heatmap", "--json"):  # fmt: skip
        assert flag in out
    assert "--threshold" in out
