"""The queue of the embedded engine: every request is answered or the caller learns why, and every block comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import golden_data
from devices import DEVICE
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams
from redvtp.prompt import chat_prompt

MODEL = golden_data.checkpoint_dir("tiny-llada-v")


def _engine(**options: Any) -> LocalEngine:
    return LocalEngine(MODEL, dtype="float32", device=DEVICE, **options)


def _request(local: LocalEngine, **denoising: Any) -> Request:
    params = {"gen_length": 16, "ignore_eos": True, **denoising}
    return Request(chat_prompt(local.tokenizer, "What?", 0), (), DenoisingParams(**params))


def test_generate_without_free_blocks_says_so_instead_of_returning_empty_answers() -> None:
    local = _engine(num_blocks=16)
    held = local.blocks.allocate(16)
    assert held is not None
    with pytest.raises(RuntimeError, match=r"request 0 needs \d+ KV cache blocks and 0 of 16 are free"):
        local.generate([_request(local), _request(local)])
    local.blocks.free(held)
    assert [answer.finish_reason for answer in local.generate([_request(local)])] == ["length"]


def test_generate_while_a_stream_holds_the_blocks_says_so_and_the_stream_goes_on() -> None:
    local = _engine(max_num_seqs=2)
    one = -(-len(local.tokenize(_request(local)).ids) // 32)
    local = _engine(max_num_seqs=2, num_blocks=2 * (one + 1))
    stream = local.stream(_request(local, steps=steps) for steps in (2, 16, 16))
    number, _ = next(stream)
    assert number == 0
    with pytest.raises(RuntimeError, match="finish or close the other streams"):
        local.generate([_request(local, gen_length=96)])
    assert sorted(number for number, _ in stream) == [1, 2]
    assert local.blocks.num_free == local.blocks.num_blocks


def test_a_closed_stream_gives_its_blocks_back() -> None:
    local = _engine(max_num_seqs=2)
    stream = local.stream(_request(local, steps=steps) for steps in (2, 16))
    next(stream)
    assert local.blocks.num_free < local.blocks.num_blocks
    stream.close()  # type: ignore[attr-defined]
    assert local.blocks.num_free == local.blocks.num_blocks


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_block_is_lost_when_building_a_sequence_fails(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    local = _engine(max_num_seqs=3, num_blocks=64)
    embed, calls = local.model.embed_prompt, 0

    def embed_or_fail(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise torch.OutOfMemoryError("planted")
        return embed(*arguments)

    monkeypatch.setattr(local.model, "embed_prompt", embed_or_fail)
    with pytest.raises(torch.OutOfMemoryError):
        local.generate([_request(local)] * 3)
    assert local.blocks.num_free == 64
    assert len(local.generate([_request(local)] * 3)) == 3


def test_no_block_is_lost_when_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    local = _engine(max_num_seqs=2, num_blocks=64)

    def fail(*_: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(local.runner, "step", fail)
    with pytest.raises(RuntimeError, match="planted"):
        local.generate([_request(local)] * 2)
    assert local.blocks.num_free == 64


def test_an_idle_engine_notices_blocks_that_did_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine checks itself, so that a leak shows where it happens and not as a server that slows down."""
    local = _engine(num_blocks=64)
    monkeypatch.setattr(local._held, "give_back", lambda blocks: None)
    with pytest.raises(RuntimeError, match=r"\d+ KV cache blocks were not given back"):
        local.generate([_request(local)])
    with pytest.raises(RuntimeError, match="were not given back"):
        local.generate([_request(local)])


@pytest.mark.parametrize("number", [0, -1])
def test_a_batch_of_no_requests_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"max_num_seqs must be at least 1, got {number}"):
        _engine(max_num_seqs=number)
