"""Stop strings that other tokens spell: found in a tail of the answer, as in the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams

import golden_data
from redvtp.prompt import load_tokenizer
from vllm_redvtp.scheduling.endings import spells_stop

TOKENIZER = load_tokenizer(golden_data.checkpoint_dir("tiny-llada-v"))
SPECIAL = sorted(TOKENIZER.all_special_ids)
ORDINARY = [token for token in range(len(TOKENIZER)) if token not in SPECIAL]


class _Counting:
    """A tokenizer that notes how many tokens it decodes."""

    all_special_ids = TOKENIZER.all_special_ids

    def __init__(self) -> None:
        self.most = 0

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        self.most = max(self.most, len(ids))
        return str(TOKENIZER.decode(list(ids), **options))


def _whole(ids: list[int], sampling: SamplingParams) -> bool:
    text = TOKENIZER.decode(ids, skip_special_tokens=sampling.skip_special_tokens, clean_up_tokenization_spaces=False)
    return any(stop in str(text) for stop in sampling.stop or ())


def _first_hit(pieces: list[list[int]], sampling: SamplingParams, whole: bool) -> int | None:
    seen: list[int] = []
    for number, piece in enumerate(pieces):
        seen += piece
        if _whole(seen, sampling) if whole else spells_stop(TOKENIZER, seen, len(piece), sampling):
            return number
    return None


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(ORDINARY), st.sampled_from(SPECIAL)), max_size=6), min_size=1, max_size=30
    ),
    st.data(),
)
def test_the_tail_finds_a_stop_in_the_same_step_as_the_whole_answer(pieces: list[list[int]], data: Any) -> None:
    text = str(TOKENIZER.decode([token for piece in pieces for token in piece], skip_special_tokens=True))
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 6))].replace("\ufffd", "") or "never"
    sampling = SamplingParams(stop=[stop, "not in it"], skip_special_tokens=data.draw(st.booleans()))
    assert _first_hit(pieces, sampling, whole=False) == _first_hit(pieces, sampling, whole=True)


def test_a_stop_across_skipped_tokens_is_found() -> None:
    left, right = (
        TOKENIZER.encode("ab", add_special_tokens=False)[0],
        TOKENIZER.encode("cd", add_special_tokens=False)[0],
    )
    ids = [left, *SPECIAL * 40, right]
    stop = str(TOKENIZER.decode([left]))[-1] + str(TOKENIZER.decode([right]))[0]
    assert spells_stop(TOKENIZER, ids, 1, SamplingParams(stop=[stop]))


@pytest.mark.parametrize("length", [128, 4096])
def test_only_the_tail_of_an_answer_is_decoded(length: int) -> None:
    """The whole answer was decoded at every step, 14 ms for 4,096 tokens."""
    counting = _Counting()
    ids = (ORDINARY * (length // len(ORDINARY) + 1))[:length]
    assert not spells_stop(counting, ids, 2, SamplingParams(stop=["never there", "nor this"]))
    assert 0 < counting.most <= 64


def test_without_stop_strings_nothing_is_decoded() -> None:
    counting = _Counting()
    assert not spells_stop(counting, ORDINARY, 2, SamplingParams())
    assert not spells_stop(counting, ORDINARY, 0, SamplingParams(stop=["a"]))
    assert counting.most == 0
