"""What `vllm serve LLADA-V ...` starts with, and the command lines it refuses with a sentence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm.platforms import current_platform

from devices import CARD_CACHE_BYTES, CARD_SHARE, vllm_flags
from golden_data import checkpoint_dir
from plugin.command_line import engine_config
from plugin.conftest import in_process_llm
from vllm_redvtp.hook import BLOCK_SIZE, CARD_BLOCK_MULTIPLE, refuse_card_block_size

MODEL = checkpoint_dir("tiny-llada-v")
TOWER = checkpoint_dir("siglip2-so400m-patch14-tiny56")


def test_llada_v_gets_our_parts() -> None:
    config = engine_config(MODEL)
    assert config.scheduler_config.scheduler_cls == "vllm_redvtp.scheduling.scheduler.DiffusionScheduler"
    assert config.parallel_config.worker_cls.startswith("vllm_redvtp.worker.worker.")
    assert config.model_config.logits_processors == ["vllm_redvtp.frontend.refusals:RequestKnobs"]
    assert config.model_config.tokenizer_mode == "redvtp"
    assert config.model_config.enforce_eager
    assert config.cache_config.block_size == 32
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.scheduler_config.async_scheduling
    # Prompt and canvas go through the model in one piece.
    assert config.scheduler_config.max_num_batched_tokens >= config.model_config.max_model_len
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.0


@pytest.mark.parametrize(
    ("options", "read", "value"),
    [
        (["--block-size", "64"], lambda config: config.cache_config.block_size, 64),
        (
            ["--dtype", "bfloat16", "--kv-cache-dtype", "bfloat16"],
            lambda config: config.cache_config.cache_dtype,
            "bfloat16",
        ),
        (["--kv-cache-memory-bytes", "1000000"], lambda config: config.cache_config.kv_cache_memory_bytes, 1_000_000),
        (["--max-num-batched-tokens", "9999"], lambda config: config.scheduler_config.max_num_batched_tokens, 9999),
        (
            ["--override-generation-config", '{"temperature": 0.3}'],
            lambda config: config.model_config.get_diff_sampling_param()["temperature"],
            0.3,
        ),
        # vLLM's own defaults, asked for by name: no temperature of ours.
        (
            ["--generation-config", "vllm"],
            lambda config: config.model_config.get_diff_sampling_param().get("temperature"),
            None,
        ),
        (["--no-enable-prefix-caching"], lambda config: config.cache_config.enable_prefix_caching, False),
        (["--no-enable-chunked-prefill"], lambda config: config.scheduler_config.enable_chunked_prefill, False),
        (["--no-async-scheduling"], lambda config: config.scheduler_config.async_scheduling, False),
        (
            ["--media-io-kwargs", '{"image": {"image_mode": "RGB"}}'],
            lambda config: config.model_config.multimodal_config.media_io_kwargs["image"]["image_mode"],
            "RGB",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_operators_choice_stands(options: list[str], read: Callable[[Any], Any], value: Any) -> None:
    assert read(engine_config(MODEL, *options)) == value


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--pipeline-parallel-size", "2"], r"of LLaDA-V: pipeline parallelism \(--pipeline-parallel-size\)"),
        (["--enable-lora"], r"of LLaDA-V: LoRA \(--enable-lora\)"),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            r"of LLaDA-V: KV connectors \(--kv-transfer-config\)",
        ),
        (
            ["--ec-transfer-config", '{"ec_connector": "ExampleConnector", "ec_role": "ec_both"}'],
            r"of LLaDA-V: encoder connectors \(--ec-transfer-config\)",
        ),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            r"of LLaDA-V: speculative decoding \(--speculative-config\)",
        ),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8: a quantised KV cache is not supported for diffusion"),
        (
            ["--dtype", "bfloat16", "--kv-cache-dtype", "float16"],
            "--kv-cache-dtype float16: another type than the weights' is not supported .* are bfloat16 as the weights",
        ),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3 does not divide the 4 KV heads"),
        (["--skip-tokenizer-init"], "LLaDA-V needs its tokenizer"),
        (["--enable-prompt-embeds"], "--enable-prompt-embeds is not supported for LLaDA-V"),
        (
            ["--enable-prefix-caching"],
            "--enable-prefix-caching cannot work with diffusion decoding of LLaDA-V: keys and values of a prompt",
        ),
        (["--enable-chunked-prefill"], "--enable-chunked-prefill cannot work with .* LLaDA-V: attention is bidirect"),
        (
            ["--async-scheduling"],
            "--async-scheduling cannot work with .* of LLaDA-V: a pruning decides",
        ),
        (["--additional-config", '{"redvtp": {"keep_ratio": 2}}'], r"-config: redvtp.keep_ratio must be a .*, got 2"),
        (["--additional-config", '{"redvtp": {"pruning": "redvpt"}}'], "redvtp.pruning must .*; did you mean 'redvtp'"),
        (
            ["--additional-config", '{"redvtp": {"threshold": 1, "min_confidence": 0.9}}'],
            "--additional-config: redvtp.threshold and redvtp.min_confidence exclude each other",
        ),
        (
            ["--additional-config", '{"redvtp": {"keepratio": 1}}'],
            "knob redvtp.keepratio; did you mean redvtp.keep_ratio",
        ),
        (["--additional-config", '{"redvtp": {"redvtp_cache": "dual"}}'], "did you mean redvtp.cache"),
        (["--additional-config", '{"redvtp": {"attntion": "cpu"}}'], "did you mean redvtp.attention"),
        (["--additional-config", '{"redvtp": {"budget": 1}}'], "unknown knob redvtp.budget; allowed: attention_mass, "),
        (["--additional-config", '{"redvtp": 0.5}'], "'redvtp' must be an object of knobs, got 0.5"),
        (["--additional-config", '{"redvpt": {"cache": "dual"}}'], "unknown key 'redvpt'; did you mean \"redvtp\"?"),
        (
            ["--additional-config", '{"redvtp_cache": "dual"}'],
            r"--additional-config: unknown key 'redvtp_cache'; did you mean \{\"redvtp\": \{\"cache\": \.\.\.\}\}\?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_that_cannot_work_is_refused(options: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine_config(MODEL, *options)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_block_size_that_no_card_can_use_is_refused_before_anything_is_loaded(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM's own sentence comes after the weights: "No valid attention backend"."""
    assert engine_config(MODEL, "--block-size", str(size)).cache_config.block_size == size
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    with pytest.raises(ValueError, match=f"--block-size must be a multiple of 16 on a graphics card, got {size}"):
        engine_config(MODEL, "--block-size", str(size))


def test_block_sizes_of_cards_are_those_of_vllms_kernels() -> None:
    """Where one of them takes others, the plugin refuses too much."""
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    for backend in (TritonAttentionBackend, FlexAttentionBackend):
        taken = [size for size in range(1, 129) if backend.supports_block_size(size)]
        assert taken == list(range(CARD_BLOCK_MULTIPLE, 129, CARD_BLOCK_MULTIPLE))
    for size in (16, 48, 64, BLOCK_SIZE):
        refuse_card_block_size(size)


def test_servers_of_tests_take_a_small_part_of_a_card() -> None:
    """Several are up at once; vLLM's default is nearly the whole card for each."""
    config = engine_config(MODEL, *vllm_flags(cards=1)).cache_config
    assert config.gpu_memory_utilization == CARD_SHARE
    assert config.kv_cache_memory_bytes == CARD_CACHE_BYTES
    assert vllm_flags(cards=0) == []


def test_default_outside_of_our_part_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    # `redvtp generate --engine vllm`, in this process before, makes vLLM quiet.
    caplog.set_level(logging.WARNING, logger="vllm")
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        engine_config(MODEL, "--additional-config", '{"keep_ratio": 0.25, "cache": "dual", "ascend": {}}')
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    (said,) = [record.getMessage() for record in caplog.records if "additional-config" in record.getMessage()]
    assert '{"redvtp": {"keep_ratio": ...}}' in said


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break, beside its tower."""
    for source in (MODEL, TOWER):
        # copyfile: the permissions of the source may forbid writing.
        shutil.copytree(source, tmp_path / source.name, copy_function=shutil.copyfile)
        (tmp_path / source.name).chmod(0o755)
    return tmp_path / MODEL.name


def _change_config(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_checkpoint_that_lacks_tensors_is_refused_by_their_names(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.image_newline"], weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint lacks 2 tensors: model\.image_newline, model\.norm\.weight"):
        in_process_llm(str(checkpoint))


def test_wrong_architecture_is_refused_by_its_name(checkpoint: Path) -> None:
    """Its model_type alone would do."""
    _change_config(checkpoint, architectures=["LlavaLladaForSomethingElse"])
    with pytest.raises(ValueError, match=r"LlavaLladaForSomethingElse.* not supported.*LlavaLLaDAModelLM"):
        engine_config(checkpoint)


def test_checkpoint_the_engine_cannot_run_is_refused_by_key_and_value(checkpoint: Path) -> None:
    _change_config(checkpoint, mm_projector_type="linear")
    with pytest.raises(ValueError, match=r"mm_projector_type.*linear.*mlp2x_gelu"):
        engine_config(checkpoint)
