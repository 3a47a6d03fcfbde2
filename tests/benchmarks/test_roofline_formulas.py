"""What benchmarks/roofline.py says a request computes, against the engine and against torch's counters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flops import request_flops
from machines import Cost, Machine, seconds
from measure import stepping
from predict import Predictor, weight_bytes
from random_checkpoint import PUBLISHED, Shape, config_of, make_checkpoint, make_image
from request_steps import CACHES, Asked, Step, steps_of
from work import ATTENTION, ELEMENTWISE, KINDS, PRODUCTS, Code, Work, linears_work, product, step_work

from benchmarks.torch_calls import TorchCalls
from conftest import EngineFactory
from golden_data import Case
from redvtp.families.config import read_config
from redvtp.local import Generation, LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

FLOAT32 = Code(4)
FREE = Machine("free", dict.fromkeys(KINDS, Cost(0, 0)), overlaps=False, gap=0)


def asked_of(request: Request, generation: Generation) -> Asked:
    keep = None if request.pruning.preset == "none" else request.pruning.keep_ratio
    return Asked(generation.prompt_tokens, generation.visual_tokens, request.denoising, keep)


def requested(case: Case, cache: str, keep: float | None, steps: int = 12) -> Request:
    denoising = DenoisingParams(gen_length=24, block_length=8, steps=steps, ignore_eos=True, cache=cache)
    pruning = PruningParams("none") if keep is None else PruningParams("redvtp", keep)
    return Request(case.prompt, tuple(case.images()), denoising, pruning)


@pytest.mark.parametrize("steps", [3, 12, 24])
@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("cache", CACHES)
def test_steps_are_those_that_the_engine_takes(
    engine: EngineFactory, cache: str, keep: float | None, steps: int
) -> None:
    request = requested(Case("tiny-llada-v", "wide"), cache, keep, steps)
    (generation,) = engine("tiny-llada-v").generate([request])
    asked = asked_of(request, generation)
    predicted = list(steps_of(asked))
    assert [step.rows for step in predicted] == [report.tokens_computed for report in generation.steps]
    # What a step holds afterwards is what the next one attends to.
    assert [step.keys for step in predicted[1:]] == [report.kv_tokens for report in generation.steps[:-1]]
    assert [step.full for step in predicted] == [report.kind == "full" for report in generation.steps]


@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("cache", CACHES)
def test_flops_are_those_that_torch_counts(engine: EngineFactory, cache: str, keep: float | None) -> None:
    request = requested(Case("tiny-llada-v", "wide"), cache, keep)
    # No cache of visual tokens: the counted run looks at its picture, too.
    tiny = engine("tiny-llada-v", vision_cache_bytes=0)
    counted = request_flops(tiny, request)
    (generation,) = tiny.generate([request])
    tiles = sum(item.inputs().shape[0] for item in tiny.config.vision.items(request.images))
    predictor = Predictor(tiny.config, FREE, FLOAT32, tiles)
    assert predictor.flops(asked_of(request, generation)) == counted


def test_a_cache_that_is_not_predicted_is_refused() -> None:
    with pytest.raises(ValueError, match="cache must be one of none, prefix, dual, got 'prefix_lm'"):
        list(steps_of(Asked(10, 5, DenoisingParams(gen_length=8, cache="prefix_lm"))))


def test_a_product_reads_its_weight_and_its_rows_and_writes_its_result() -> None:
    assert product(3, 5, 7, itemsize=2) == Work(PRODUCTS, 2 * 3 * 5 * 7, 2 * (5 * 7 + 3 * 5 + 3 * 7), 1)


def test_bytes_of_weights_are_those_of_the_model(engine: EngineFactory) -> None:
    tiny = engine("tiny-llada-v")
    assert weight_bytes(tiny.config, 4) == sum(parameter.nbytes for parameter in tiny.model.parameters())
    layer = tiny.model.language_model.layers[0]
    linears = [module.weight.nbytes for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(int(work.bytes) for work in linears_work(tiny.config, 0, FLOAT32)) == sorted(linears)


def test_the_published_model_has_the_published_size() -> None:
    """16.9 GB, docs/models.md."""
    assert weight_bytes(read_config(config_of(PUBLISHED), Path()), 2) == pytest.approx(16.9e9, rel=0.005)


@pytest.mark.parametrize(
    ("cache", "keep", "number"), [("none", None, 0), ("prefix", None, 1), ("none", 0.25, 0), ("prefix", 0.25, 0)]
)
def test_launches_and_bytes_are_those_of_torchs_calls(
    tmp_path: Path, cache: str, keep: float | None, number: int
) -> None:
    """A full step, one that reads pages, one that scores, and one that scores and moves pages."""
    shape = Shape("llada-v", 128, 384, 3, 2, 64, 1, 56)
    engine = LocalEngine(make_checkpoint(tmp_path, shape), dtype="float32", device="cpu", vision_cache_bytes=0)
    prompt = chat_prompt(engine.tokenizer, "What is shown?", num_images=1)
    denoising = DenoisingParams(gen_length=32, block_length=32, steps=8, ignore_eos=True, cache=cache)
    pruning = PruningParams("none") if keep is None else PruningParams("redvtp", keep)
    with stepping(engine, Request(prompt, (make_image(200, 100),), denoising, pruning)) as start:
        sequence = start()
        asked = Asked(sequence.prompt.length, sequence.prompt.num_visual, denoising, keep)
        for _ in range(number):
            engine.runner.step([sequence])
        with TorchCalls() as calls:
            engine.runner.step([sequence])
    works = step_work(engine.config, list(steps_of(asked))[number], 1, FLOAT32)
    assert sum(work.launches for work in works) == pytest.approx(calls.count, rel=0.03)
    assert sum(work.bytes for work in works) == pytest.approx(calls.bytes, rel=0.05)


def test_arithmetic_and_memory_overlap_on_some_machines_only() -> None:
    costs = dict.fromkeys(KINDS, Cost(1.0, 0.1))
    works = [Work(PRODUCTS, 3, 20, 2), Work(ATTENTION, 4, 70, 1), Work(ELEMENTWISE, 0, 10, 1)]
    assert seconds(works, Machine("gpu", costs, overlaps=True, gap=0.5)) == pytest.approx(3 + 7 + 1 + 4 * 0.5)
    assert seconds(works, Machine("cpu", costs, overlaps=False, gap=0.5)) == pytest.approx(5 + 11 + 1 + 4 * 0.5)


def test_a_slow_host_hides_behind_work_as_long_as_there_is_any() -> None:
    machine = Machine("gpu", dict.fromkeys(KINDS, Cost(1.0, 0.0)), overlaps=True, gap=0.0, host=0.5)
    assert seconds([Work(PRODUCTS, 10, 0, 4)], machine) == 10
    assert seconds([Work(PRODUCTS, 1, 0, 4)], machine) == 2


def test_a_batch_shares_its_weights_and_nothing_else(engine: EngineFactory) -> None:
    config, step = engine("tiny-llada-v").config, Step(4, 40, 4)
    one, eight = (step_work(config, step, batch, FLOAT32) for batch in (1, 8))
    assert sum(work.flops for work in eight) == 8 * sum(work.flops for work in one)
    weights = sum(work.bytes for work in linears_work(config, 0, FLOAT32)) * config.num_hidden_layers
    head = config.hidden_size * config.vocab_size * 4
    saved = 8 * sum(work.bytes for work in one) - sum(work.bytes for work in eight)
    assert saved == 7 * (weights + head)
