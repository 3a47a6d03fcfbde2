"""A step of a batch is a few operations for all of it: what grows with the number of requests stays small."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import blocks_needed
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.vision.images import open_image

SMALL_MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_dvlm"
# Half of what a response step of eight requests took when attention was a loop over requests (1,380 calls).
MOST_CALLS_OF_EIGHT = 690
# Reads of an attribute, which compute nothing.
READS = ("__get__", "numel")


class _Calls(TorchFunctionMode):
    """Counts calls into torch from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[getattr(function, "__name__", str(function))] += 1
        return function(*args, **(kwargs or {}))


def _sequences(local: LocalEngine, count: int) -> list[Sequence]:
    lines = (SMALL_MODEL / "tasks" / "tasks.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines[: 3 * count : 3]]
    denoising = DenoisingParams(gen_length=32, steps=32, cache="prefix", ignore_eos=True)
    sequences = []
    for task in tasks:
        image = open_image(SMALL_MODEL / "tasks" / task["image"])
        prompt = chat_prompt(local.tokenizer, task["question"], 1)
        request = Request(prompt, (image,), denoising, PruningParams(keep_ratio=0.25))
        sequence = local.sequence(request, local.tokenize(request), [])
        blocks = local.blocks.allocate(blocks_needed(sequence.total_length, local.cache.block_size))
        assert blocks is not None
        sequence.resume(blocks)
        sequences.append(sequence)
    return sequences


def _calls_of_a_response_step(local: LocalEngine, count: int) -> int:
    batch = _sequences(local, count)
    for _ in range(3):
        local.runner.step(batch)
    with _Calls() as calls:
        reports = local.runner.step(batch)
    assert all(report.kind == "response" for report in reports)
    return sum(number for name, number in calls.counts.items() if name not in READS)


def test_a_response_step_of_eight_requests_takes_half_the_calls(record_property: Callable[[str, object], None]) -> None:
    local = LocalEngine(SMALL_MODEL, dtype="float32", device="cpu", max_num_seqs=16)
    one, eight = _calls_of_a_response_step(local, 1), _calls_of_a_response_step(local, 8)
    record_property("calls", {"one": one, "eight": eight})
    assert eight <= MOST_CALLS_OF_EIGHT
    assert (eight - one) / 7 < 40
