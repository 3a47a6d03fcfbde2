"""Which family a config.json belongs to, and what every family brings along."""

from __future__ import annotations

import dataclasses

import pytest

from golden_data import checkpoint_dir
from redvtp.families import registry
from redvtp.families.family import Family
from redvtp.families.llada_v import LLADA_V
from redvtp.families.registry import FAMILIES, architectures, family_of
from redvtp.prompt import DEFAULT_SYSTEM, load_tokenizer


def test_each_family_is_found_by_its_architecture() -> None:
    for family in FAMILIES:
        assert family_of({"architectures": [family.architecture]}) is family
    assert architectures() == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("value", [None, [], ["LlavaLLaDAModelLM", "Other"], "LlavaLLaDAModelLM"])
def test_other_architectures_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not supported; supported: 'LlavaLLaDAModelLM', 'LlavaLlada"):
        family_of({"architectures": value})


def test_a_key_tells_families_of_one_architecture_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    video = dataclasses.replace(LLADA_V, name="with video", marked_by={"mm_video": True})
    monkeypatch.setattr(registry, "FAMILIES", (LLADA_V, video))
    raw = {"architectures": [LLADA_V.architecture]}
    assert family_of(raw) is family_of({**raw, "mm_video": False}) is LLADA_V
    assert family_of({**raw, "mm_video": True}) is video


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_conversations_begin_with_a_system_message_unless_they_have_one(family: Family) -> None:
    tokenizer = load_tokenizer(checkpoint_dir("tiny-llada-v"))

    def written(*messages: dict[str, str]) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=family.template.text, tokenize=False, add_generation_prompt=True
            )
        )

    user, system = {"role": "user", "content": "  Why? "}, {"role": "system", "content": DEFAULT_SYSTEM}
    assert written(user) == written(system, user)
    other = written({"role": "system", "content": "Be brief."}, user)
    assert DEFAULT_SYSTEM not in other
    assert "Why?" in other
    assert "Be brief." in other
