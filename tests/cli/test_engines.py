"""`redvtp generate --engine vllm`: the same answers, traces and pictures as `--engine local`, and refusals as clear."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vllm.utils.argparse_utils import human_readable_int

from devices import cpu_only
from golden_data import Case, Run, checkpoint_dir, runs
from redvtp.cli.knob_flags import byte_count, flag_of
from redvtp.cli.main import main
from redvtp.errors import BadInput
from redvtp.params import CACHES, DenoisingParams, PruningParams
from redvtp.prompt import load_tokenizer
from redvtp.trace import Trace
from vllm_redvtp.knobs import RequestParams, build_params, sampling_params
from vllm_redvtp.offline import refuse_device
from vllm_redvtp.quiet import logs_on_stderr, start_up_noise

pytestmark = pytest.mark.slow

MODEL = checkpoint_dir("tiny-llada-v")
WIDE = Case("tiny-llada-v", "wide")
TWO = Case("tiny-llada-v", "two_pad_tensor")


def _golden(kind: str, has: str = "gen_length", case: str = "") -> Run:
    """The first golden run of a kind that the command can be asked for. has: a keyword of the reference's call."""
    return next(
        run
        for run in runs(kind, checkpoints=("tiny-llada-v",))
        if run.robust
        and has in run.params
        and run.uses_threshold == (has == "threshold")
        and not run.case.config_overrides
        if run.case.name == case or not case
        if has == "gen_length" or run.output
    )


GOLDEN = {
    "redvtp": _golden("redvtp"),
    "prefix_cache": _golden("fast", "prefix_refresh_interval"),
    "threshold": _golden("fast", "threshold"),
    "suffix": _golden("plain", "generation_suffix"),
    "stop": _golden("plain", "stopping_criteria"),
    "text_only": _golden("plain", case="text_only"),
}


def _flags(run: Run) -> list[str]:
    """A golden run as the command's flags."""
    params = run.params
    flags = ["--gen-length", params["gen_length"], "--block-length", params["block_length"], "--steps", params["steps"]]
    if run.case.image_files:
        flags += ["--image", *run.case.image_files]
    if "prefix_refresh_interval" in params:
        flags += ["--cache", "prefix", "--refresh-interval", params["prefix_refresh_interval"]]
    if run.uses_threshold:
        flags += ["--threshold", params["threshold"]]
    if "generation_suffix" in params:
        flags += ["--suffix", params["generation_suffix"]]
    if params.get("stopping_criteria"):
        flags += ["--stop", *params["stopping_criteria"]]
    flags += ["--pruning", "none"] if run.keep_ratio is None else ["--keep-ratio", run.keep_ratio]
    # The reference ends at the stop strings it is given and at nothing else.
    return [*map(str, flags), "--ignore-eos", "--prompt", run.case.question]


def _generate(engine: str, folder: Path, *flags: object) -> Trace:
    """The trace of a run that must succeed, `ms` checked and taken out."""
    file = folder / f"{engine}.json"
    arguments = [MODEL, "--engine", engine, "--dtype", "float32", "--trace", file, *flags]
    assert main(["generate", *map(str, arguments)]) == 0
    return _timeless(json.loads(file.read_text()))


def _vllm_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}


def _timeless(trace: Any) -> Trace:
    for step in trace["steps"]:
        assert step.pop("ms") > 0
    checked: Trace = trace
    return checked


@pytest.fixture
def both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Trace]:
    """both(*flags): run in both engines, which must print and trace the same; returns the trace."""

    def run(*flags: object) -> Trace:
        local = _generate("local", tmp_path, *flags)
        said = capfd.readouterr()
        settings = _vllm_settings()
        assert _generate("vllm", tmp_path, *flags) == local
        assert capfd.readouterr() == said == (local["text"] + "\n", "")
        assert _vllm_settings() == settings
        return local

    return run


@pytest.mark.parametrize("run", GOLDEN.values(), ids=GOLDEN)
def test_golden_run_is_the_same_in_both_engines(run: Run, both: Callable[..., Trace]) -> None:
    trace = both(*_flags(run))
    assert trace["output_ids"] == run.output
    assert [step["canvas"] for step in trace["steps"]] == run.tensor("x").tolist()[: len(trace["steps"])]


def test_several_images_in_a_raw_prompt_with_drawn_tokens(both: Callable[..., Trace]) -> None:
    trace = both(
        "--image", *TWO.image_files, "--raw-prompt", TWO.prompt, "--gen-length", "12", "--temperature", "0.8",
        "--seed", "7",
    )  # fmt: skip
    (first, second) = trace["visual_spans"]
    assert first[1] <= second[0]


def test_temperature_and_seed_reach_the_model_as_given(both: Callable[..., Trace]) -> None:
    """vLLM itself refuses temperatures over 2, and takes seed -1 for none."""
    both("--prompt", "hello", "--gen-length", "8", "--temperature", "3", "--seed", "-1")


def test_stop_string_inside_a_token_ends_neither_engine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], both: Callable[..., Trace]
) -> None:
    """vLLM's front-end would end at the text; a canvas is searched for tokens."""
    flags = ("--prompt", "hello", "--gen-length", "8", "--ignore-eos")
    whole = _generate("local", tmp_path, *flags)
    capfd.readouterr()
    tokenizer = load_tokenizer(MODEL)
    inside = next(
        letter
        for letter in whole["text"]
        if letter.isascii()
        and letter.isalpha()
        and not set(tokenizer.encode(letter, add_special_tokens=False)) & set(whole["output_ids"])
    )
    assert both(*flags, "--stop", inside) == whole


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command as a user runs it, with all its outputs."""
    folder = tmp_path_factory.mktemp("vllm")
    arguments = [
        "generate", MODEL, "--image", *WIDE.image_files, "--prompt", WIDE.question, "--gen-length", "16", "--engine",
        "vllm", "--json", "--trace", folder / "trace.json", "--heatmap", folder / "kept.png",
    ]  # fmt: skip
    command = [sys.executable, "-m", "redvtp.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False), folder


def test_vllm_prints_json_and_nothing_else(vllm_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = vllm_run
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    summary, trace = json.loads(line), json.loads((folder / "trace.json").read_text())
    assert summary["text"] == trace["text"]
    assert summary["denoising_steps"] == len(trace["steps"])
    assert summary["visual_tokens_kept"] == len(trace["prunings"][0]["kept"])
    assert summary["ms"] == pytest.approx(sum(step["ms"] for step in trace["steps"]))


def test_both_engines_write_the_same_trace_and_heat_map(
    vllm_run: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    """With no --dtype: it is the checkpoint's in both, not vLLM's idea of it."""
    _, folder = vllm_run
    arguments = [
        "generate", MODEL, "--image", *WIDE.image_files, "--prompt", WIDE.question, "--gen-length", "16",
        "--trace", tmp_path / "trace.json", "--heatmap", tmp_path / "kept.png",
    ]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    local, vllm = (json.loads((path / "trace.json").read_text()) for path in (tmp_path, folder))
    assert _timeless(vllm) == _timeless(local)
    assert (folder / "kept.png").read_bytes() == (tmp_path / "kept.png").read_bytes()


def _refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal by the engine vllm."""
    status = main(["generate", *map(str, arguments), "--engine", "vllm"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    return line


def test_vllm_refuses_what_does_not_fit_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    question = ("--image", *WIDE.image_files, "--prompt", WIDE.question)
    line = _refused(capfd, MODEL, *question, "--max-model-len", "150", "--gen-length", "32")
    assert "70 of them visual) plus --gen-length 32 exceeds --max-model-len 150; shorten --gen-length or" in line
    assert "parameter=" not in line


def test_vllm_refuses_an_engine_setting_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    line = _refused(capfd, MODEL, "--prompt", "hello", "--max-model-len", "1000000")
    assert line.startswith("redvtp generate: error: User-specified max_model_len (1000000) is greater than")


def test_vllm_refuses_marks_without_images_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    line = _refused(capfd, MODEL, "--raw-prompt", "what is <image>?")
    assert line.endswith("the prompt has 1 <image> mark but 0 images were given")


def test_vllm_takes_the_size_of_the_cache(both: Callable[..., Trace], capfd: pytest.CaptureFixture[str]) -> None:
    both("--prompt", "hello", "--gen-length", "8", "--max-model-len", "256", "--kv-cache-memory-bytes", "1M")
    line = _refused(capfd, MODEL, "--prompt", "hello", "--max-model-len", "256", "--kv-cache-memory-bytes", "70K")
    assert "KV cache" in line


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0"])
def test_a_device_that_vllm_would_take_anyway_is_not_refused(name: str | None) -> None:
    refuse_device(name, "cuda")


@pytest.mark.parametrize(
    ("name", "here", "sentence"),
    [
        ("cuda:1", "cuda", "--device cuda:1 cannot be used: vLLM takes the first GPU that it sees; set CUDA_VISIBLE_"),
        ("cpu", "cuda", "--device cpu cannot be used: vLLM is built for cuda here; leave it out, or use --engine"),
        ("cuda", "cpu", "--device cuda cannot be used: vLLM is built for cpu here; leave it out, or use --engine"),
    ],
)
def test_a_device_that_vllm_would_not_take_is_refused(name: str, here: str, sentence: str) -> None:
    with pytest.raises(BadInput) as refusal:
        refuse_device(name, here)
    assert refusal.value.spelled(flag_of).startswith(sentence)


@cpu_only
def test_vllm_refuses_a_device_that_it_is_not_built_for_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    line = _refused(capfd, MODEL, "--prompt", "hello", "--device", "cuda:1")
    assert line.startswith("redvtp generate: error: --device cuda:1 cannot be used: vLLM is built for cpu here")


@pytest.mark.parametrize("text", ["800", "1k", "1K", "49M", "2200M", "3m", "4G", "7g"])
def test_a_size_is_read_as_vllm_reads_it(text: str) -> None:
    assert byte_count(text) == human_readable_int(text)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break, beside its tower."""
    for name in ("tiny-llada-v", "siglip2-so400m-patch14-tiny56"):
        shutil.copytree(checkpoint_dir(name), tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "tiny-llada-v"


def test_vllm_refuses_a_broken_checkpoint_in_one_line(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    weights = load_file(file)
    del weights["model.image_newline"]
    save_file(weights, file)
    assert "lacks 1 tensor: model.image_newline" in _refused(capfd, checkpoint, "--prompt", "hello")
    file.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole safetensors file" in _refused(capfd, checkpoint, "--prompt", "hello")
    file.unlink()
    assert "no weights in" in _refused(capfd, checkpoint, "--prompt", "hello")


def test_vllm_refuses_another_architecture_in_one_line(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    line = _refused(capfd, checkpoint, "--prompt", "hello")
    assert "LlamaForCausalLM" in line
    assert "LlavaLLaDAModelLM" in line


def test_start_up_noise_is_shown_after_a_bug_only(capfd: pytest.CaptureFixture[str]) -> None:
    def start(error: Exception) -> None:
        with logs_on_stderr(), start_up_noise(BadInput):
            os.write(1, b"to stdout\n")
            os.write(2, b"to stderr\n")
            raise error

    with pytest.raises(BadInput):
        start(BadInput("mend this"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RuntimeError):
        start(RuntimeError("a bug"))
    assert capfd.readouterr() == ("", "to stdout\nto stderr\n")


@given(
    gen_length=st.integers(1, 64),
    temperature=st.floats(0, 4),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
    cache=st.sampled_from(CACHES),
    suffix=st.text(max_size=4),
    ignore_eos=st.booleans(),
    keep_ratio=st.floats(0, 1, exclude_min=True),
    data=st.data(),
)
def test_sampling_params_are_read_back_as_they_were(
    gen_length: int, cache: str, suffix: str, keep_ratio: float, data: st.DataObject, **sampling: Any
) -> None:
    block_length = data.draw(st.none() | st.integers(1, gen_length))
    steps = data.draw(st.none() | st.integers(-(-gen_length // (block_length or 32)), gen_length))
    wanted = RequestParams(
        DenoisingParams(gen_length, block_length, steps, cache=cache, suffix=suffix, **sampling),
        PruningParams("redvtp", keep_ratio, "original"),
        "full",
    )
    assert build_params(sampling_params(wanted), gen_length, {}) == wanted
