"""Tokens with vLLM's CPU attention kernel: the references', the embedded engine's, those without neighbours.

The golden checkpoints' heads are half as wide as the kernel can take, so there they are filled up with zeros, which
change no product. The shipped small model's heads are just wide enough; a server runs it on the kernel by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from vllm import LLM, SamplingParams

import golden_data
from devices import cpu_only
from golden_data import Run, checkpoint_dir
from golden_runs import denoising_of, pruning_of
from module_process import run_module
from plugin.conftest import LlmFactory, in_process_llm
from plugin.requests import free_blocks, runner_of, usable_blocks
from redvtp.denoising.step import DenoisingRunner
from redvtp.evaluation.tasks import read_tasks
from redvtp.kv.pages import PagedKVCache
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from vllm_redvtp.attention.cpu_kernel import CpuAttention, KernelCall
from vllm_redvtp.attention.packed_pages import PackedKVCache
from vllm_redvtp.knobs import RequestParams, sampling_params

pytestmark = [pytest.mark.slow, cpu_only]

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODEL = ROOT / "examples" / "tiny_dvlm"
WIDTH, HEAD_DIM = 32, 16
CACHED = [
    run
    for run in golden_data.runs()
    if run.robust and not run.uses_threshold and "noschedule" not in run.name and denoising_of(run).cache != "none"
]


class _WidePages(PackedKVCache):
    """Pages of WIDTH, for heads of HEAD_DIM."""

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        super().write(layer, slots, _wide(key), _wide(value))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().read(layer, slots)
        return key[..., :HEAD_DIM], value[..., :HEAD_DIM]


class _WideAttention(CpuAttention):
    """The kernel over `_WidePages`; counts how often it is called."""

    calls = 0

    def call(self, layer: int, work: KernelCall, query: Tensor, output: Tensor) -> None:
        _WideAttention.calls += 1
        wide = _wide(output)
        super().call(layer, work, _wide(query), wide)
        output.copy_(wide[..., :HEAD_DIM])


def _wide(heads: Tensor) -> Tensor:
    """[tokens, heads, head_dim] with zeros up to WIDTH."""
    return heads if heads.shape[-1] == WIDTH else pad(heads, (0, WIDTH - heads.shape[-1]))


def _engine_on_the_kernel(checkpoint: str, **options: Any) -> LocalEngine:
    local = LocalEngine(checkpoint_dir(checkpoint), dtype="float32", device="cpu", **options)
    config, plain = local.config, local.cache
    pages = _WidePages(
        config.num_hidden_layers, plain.num_blocks, plain.block_size, config.num_key_value_heads, WIDTH, local.dtype
    )
    attention = _WideAttention(pages, config.num_attention_heads, HEAD_DIM**-0.5)
    local.runner = DenoisingRunner(local.model, pages, local.special, attention=attention)
    return local


@pytest.mark.parametrize("checkpoint", sorted({run.case.checkpoint for run in CACHED}))
def test_the_references_tokens_come_off_the_kernel(checkpoint: str) -> None:
    """Every robust golden run that reads pages, those of a checkpoint's settings packed into one batch."""
    groups: dict[str, list[Run]] = {}
    for run in CACHED:
        if run.case.checkpoint == checkpoint:
            groups.setdefault(json.dumps(run.case.config_overrides), []).append(run)
    for overrides, runs in groups.items():
        local = _engine_on_the_kernel(checkpoint, config_overrides=json.loads(overrides))
        before = _WideAttention.calls
        answers = local.generate([_golden_request(run, local) for run in runs])
        assert _WideAttention.calls > before
        for run, answer in zip(runs, answers, strict=True):
            assert answer.output_ids == run.output, str(run)


def _golden_request(run: Run, local: LocalEngine) -> Request:
    images = tuple(run.case.images())
    template = local.config.family.template
    prompt = chat_prompt(local.tokenizer, run.case.question, num_images=len(images), template=template)
    return Request(prompt, images, denoising_of(run), pruning_of(run))


MODES: list[tuple[dict[str, Any], PruningParams]] = [
    ({"cache": "prefix"}, PruningParams(keep_ratio=0.5)),
    ({"cache": "prefix", "refresh_interval": 2}, PruningParams(keep_ratio=0.25, positions="original")),
    ({"cache": "prefix_lm"}, PruningParams(keep_ratio=0.3)),
    ({"cache": "none"}, PruningParams(preset="none")),
    ({"cache": "prefix"}, PruningParams(preset="none")),
    ({"cache": "dual"}, PruningParams(keep_ratio=0.3)),
]


def small_model_requests() -> list[Request]:
    """Questions from the model's own tasks, with every cache, pruned and not."""
    tokenizer = LocalEngine(SMALL_MODEL, dtype="float32", device="cpu", num_blocks=64).tokenizer
    tasks = read_tasks(SMALL_MODEL / "tasks" / "tasks.jsonl").tasks[:28:2]
    requests = []
    for index, task in enumerate(tasks):
        mode, pruning = MODES[index % len(MODES)]
        denoising = DenoisingParams(gen_length=24, block_length=12, steps=16, ignore_eos=True, **mode)
        images = tuple(Image.open(path).convert("RGB") for path in task.images)
        requests.append(Request(chat_prompt(tokenizer, task.question, len(images)), images, denoising, pruning))
    return requests


def vllm_inputs(requests: list[Request]) -> tuple[list[Any], list[SamplingParams]]:
    prompts = [{"prompt": request.prompt, "multi_modal_data": {"image": list(request.images)}} for request in requests]
    return prompts, [sampling_params(RequestParams(one.denoising, one.pruning, "summary")) for one in requests]


def answers_of(llm: LLM, requests: list[Request], preempt_every: int = 0) -> list[list[int]]:
    """All requests together; preempt_every: engine steps after which all that run lose their blocks, 0 for never."""
    prompts, samplings = vllm_inputs(requests)
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        llm.llm_engine.add_request(str(number), prompt, sampling)
    finished: dict[str, Any] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        steps += 1
        if preempt_every and steps % preempt_every == 0:
            assert llm.reset_prefix_cache(reset_running_requests=True)
    return [list(finished[str(number)].outputs[0].token_ids) for number in range(len(requests))]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return small_model_requests()


@pytest.fixture(scope="module")
def expected(requests: list[Request]) -> list[list[int]]:
    """The embedded engine's tokens: its attention is torch's."""
    local = LocalEngine(SMALL_MODEL, dtype="float32", device="cpu")
    assert isinstance(local.cache, PagedKVCache)
    return [answer.output_ids for answer in local.generate(requests)]


@pytest.fixture
def kernel_llm(llm_factory: LlmFactory) -> Iterator[LLM]:
    llm = llm_factory(str(SMALL_MODEL))
    assert isinstance(runner_of(llm)._engine.context.pages, PackedKVCache), (
        "the kernel is the default where it can be had"
    )
    yield llm
    assert free_blocks(llm) == usable_blocks(llm)


def test_server_on_the_kernel_gives_the_embedded_engines_tokens(
    kernel_llm: LLM, requests: list[Request], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    call = CpuAttention.call

    def watched(self: CpuAttention, layer: int, work: KernelCall, query: Tensor, output: Tensor) -> None:
        calls.append(work.index)
        call(self, layer, work, query, output)

    monkeypatch.setattr(CpuAttention, "call", watched)
    assert answers_of(kernel_llm, requests) == expected
    assert calls


def test_alone_a_request_gets_the_same_tokens(kernel_llm: LLM, requests: list[Request]) -> None:
    together = answers_of(kernel_llm, requests[:4])
    assert [answers_of(kernel_llm, [request])[0] for request in requests[:4]] == together


@pytest.mark.parametrize("every", [1, 3])
def test_preemption_changes_no_token(
    kernel_llm: LLM, requests: list[Request], expected: list[list[int]], every: int
) -> None:
    assert answers_of(kernel_llm, requests, preempt_every=every) == expected


def test_torch_can_be_asked_for(llm_factory: LlmFactory, requests: list[Request], expected: list[list[int]]) -> None:
    llm = llm_factory(str(SMALL_MODEL), additional_config={"redvtp": {"attention": "torch"}})
    assert isinstance(runner_of(llm)._engine.context.pages, PagedKVCache)
    assert answers_of(llm, requests) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served_from_the_kernel(dtype: str, llm_factory: LlmFactory, requests: list[Request]) -> None:
    llm = llm_factory(str(SMALL_MODEL), dtype=dtype)
    assert isinstance(runner_of(llm)._engine.context.pages, PackedKVCache)
    together = answers_of(llm, requests[:2])
    assert all(len(answer) == 24 for answer in together)


def test_where_the_kernel_cannot_serve_torch_does(llm: LLM) -> None:
    """The golden checkpoints' heads are too narrow."""
    assert isinstance(runner_of(llm)._engine.context.pages, PagedKVCache)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "cpu",
            "-config: redvtp.attention 'cpu' cannot be used: vLLM's CPU kernel knows no head_dim 16, .*; use 'auto'",
        ),
        ("eager", "--additional-config: redvtp.attention must be one of auto, torch, triton, flash, cpu, got 'eager'"),
        (
            "flash",
            "redvtp.attention 'flash' cannot be used: FlashAttention is for NVIDIA's cards, not for cpu; use 'auto'",
        ),
        ("triton", "redvtp.attention 'triton' cannot be used: Triton's kernels are for graphics cards, not for cpu"),
        ("touch", "got 'touch'; did you mean 'torch'"),
        (["torch"], "redvtp.attention must be one of auto, torch, triton, flash, cpu"),
    ],
)
def test_attention_that_cannot_be_had_is_refused_at_the_start(asked: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_process_llm(str(checkpoint_dir("tiny-llada-v")), additional_config={"redvtp": {"attention": asked}})


def test_other_block_sizes_are_torchs(
    llm_factory: LlmFactory, requests: list[Request], expected: list[list[int]]
) -> None:
    llm = llm_factory(str(SMALL_MODEL), block_size=16)
    assert isinstance(runner_of(llm)._engine.context.pages, PagedKVCache)
    assert answers_of(llm, requests[:3]) == expected[:3]


def test_two_ranks_give_the_same_tokens(expected: list[list[int]], tmp_path: Path) -> None:
    """Half of the heads each; in a process of its own, since vLLM's parallel groups are globals."""
    found = tmp_path / "answers.json"
    said = run_module("plugin.two_ranks_kernel", found)
    assert "response steps on vLLM's CPU kernel" in said
    assert json.loads(found.read_text()) == expected
