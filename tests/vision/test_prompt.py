"""Prompts: the reference's text and ids, and the arithmetic of marks, placeholders and spans."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from golden_data import LAVIDA, LLADA_V, Case, cases, checkpoint_dir
from redvtp.families.config import load_config
from redvtp.prompt import (
    IMAGE_MARK,
    build_prompt_tokens,
    chat_prompt,
    load_tokenizer,
    split_prompt,
)

# What the reference writes into the ids where an image stands.
IMAGE_INDEX = -200


@cache
def _tokenizer(checkpoint: str = "tiny-llada-v") -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoint_dir(checkpoint))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_template_is_the_references(case: Case) -> None:
    template = load_config(case.model_dir).family.template
    prompt = chat_prompt(_tokenizer(case.checkpoint), case.question, len(case.image_files), template=template)
    assert prompt == case.prompt


@pytest.mark.parametrize("case", cases(*LLADA_V, *LAVIDA), ids=str)
def test_template_is_the_checkpoints_own_chat_template(case: Case) -> None:
    """A server that renders messages with the checkpoint's template gives the model the same prompt."""
    tokenizer = _tokenizer(case.checkpoint)
    prompt = chat_prompt(tokenizer, case.question, len(case.image_files))
    turns = [part.split("<|end_header_id|>\n\n") for part in prompt.split("<|start_header_id|>")[1:3]]
    messages = [{"role": role, "content": content.removesuffix("<|eot_id|>")} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize("case", cases(), ids=str)
def test_ids_are_the_references(case: Case) -> None:
    pieces = split_prompt(_tokenizer(case.checkpoint), case.prompt, len(case.image_files))
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [IMAGE_INDEX, *piece]
    assert ids == case.base("input_ids").tolist()


def test_question_is_trimmed_and_system_can_be_left_out() -> None:
    prompt = chat_prompt(_tokenizer(), "  Why?\n", 0, system=False)
    assert prompt == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_pieces_after_a_mark_lose_their_first_token_only_behind_bos() -> None:
    tokenizer = _tokenizer()
    tail = tokenizer("\nWhat is shown?", add_special_tokens=False)["input_ids"]
    with_bos = split_prompt(tokenizer, f"<|startoftext|>Look{IMAGE_MARK}\nWhat is shown?", 1)
    without = split_prompt(tokenizer, f"Look{IMAGE_MARK}\nWhat is shown?", 1)
    assert with_bos[1] == tail[1:]
    assert without[1] == tail


def test_empty_pieces_stay_empty() -> None:
    assert split_prompt(_tokenizer(), f"<|startoftext|>{IMAGE_MARK}{IMAGE_MARK}", 2)[1:] == [[], []]


@pytest.mark.parametrize(
    ("marks", "images", "message"),
    [
        (2, 1, "the prompt has 2 <image> marks but 1 image was given"),
        (0, 1, "the prompt has 0 <image> marks but 1 image was given"),
        (1, 3, "the prompt has 1 <image> mark but 3 images were given"),
    ],
)
def test_marks_and_images_must_agree(marks: int, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_prompt(_tokenizer(), "a" + IMAGE_MARK * marks, images)


@given(pieces=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5), data=st.data())
def test_spans_hold_exactly_the_placeholders(pieces: list[list[int]], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=len(pieces) - 1, max_size=len(pieces) - 1))
    prompt = build_prompt_tokens(pieces, counts, placeholder_id=0)
    assert [end - start for start, end in prompt.visual_spans] == counts
    inside = {position for start, end in prompt.visual_spans for position in range(start, end)}
    assert inside == {position for position, token in enumerate(prompt.ids) if token == 0}
    assert [token for token in prompt.ids if token] == [token for piece in pieces for token in piece]


def test_number_of_pieces_must_fit_the_images() -> None:
    with pytest.raises(ValueError, match="2 prompt pieces do not surround 2 images"):
        build_prompt_tokens([[1], [2]], [3, 3], 0)


@pytest.mark.parametrize(
    ("checkpoint", "end_ids", "suppressed"),
    [
        ("tiny-llada-v", (577, 593), (576, 577, 591, 592)),
        ("tiny-lavida", (577, 593), ()),
        ("tiny-lavida-dream", (577,), ()),
    ],
)
def test_special_tokens_of_the_tiny_tokenizer_are_those_of_the_golden_data(
    checkpoint: str, end_ids: tuple[int, ...], suppressed: tuple[int, ...]
) -> None:
    special = load_config(checkpoint_dir(checkpoint)).special_tokens(_tokenizer(checkpoint))
    assert (special.mask_id, special.end_ids) == (584, end_ids)
    assert special.suppressed == suppressed
    assert special.placeholder_id == 580
    assert special.vocab == 594


def test_tokenizer_without_the_special_tokens_is_refused_by_name() -> None:
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(BPE(vocab={"a": 0}, merges=[]))
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftext|>", "<|endoftext|>", "<|eot_id|>"]})
    with pytest.raises(ValueError, match=r"lacks 4 special tokens of LLaDA-V: <\|mdm_mask\|>, <\|start_header_id\|>"):
        load_config(checkpoint_dir("tiny-llada-v")).special_tokens(tokenizer)


@pytest.mark.parametrize(("key", "token"), [("mask_token_id", None), ("mask_token_id", 594), ("eos_token_id", None)])
def test_dream_checkpoint_without_its_special_ids_is_refused(key: str, token: int | None) -> None:
    config = load_config(checkpoint_dir("tiny-lavida-dream"), {key: token})
    with pytest.raises(ValueError, match=rf"must have a {key} that the tokenizer has \(of 594 tokens\), got {token}"):
        config.special_tokens(_tokenizer("tiny-lavida-dream"))


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
