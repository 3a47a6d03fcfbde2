"""Words of the tiny model's world, and its tokenizer: one token per word, digit or capital, bytes for everything else.

The tokenizer has the layout of LLaDA's (byte-level BPE, the same special tokens) but no merges: a piece that is in the
vocabulary is one token, any other piece falls apart into bytes, so every text can be encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redvtp.prompt import DEFAULT_SYSTEM

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
NAMES = (
    *("age", "bus", "date", "fee", "gate", "item", "lot", "page"),
    *("qty", "room", "seat", "tax", "unit", "year", "zip", "desk"),
)
DIGITS = "0123456789"
# Without the capitals that look like a digit or like each other in 12 pixels.
LETTERS = "ABCDEFHJKLMNPRSTUVWXYZ"
GLYPHS = DIGITS + LETTERS

# Every sentence the model is trained on is made of these words and the ones above.
_SENTENCES = (
    DEFAULT_SYSTEM,
    "What color is the box with the digit",
    "Which digit is in the box?",
    "How many boxes are there?",
    "List all boxes row by row.",
    "What color is the shape? Which shape is it?",
    "How many circles squares triangles stars diamonds crosses are there?",
    "List all shapes row by row.",
    "What is the value of Transcribe the form. Which field holds",
    "What does the sign say? Read the sign. Transcribe all signs row by row.",
    "Yes yes No no none",
)

SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|reserved_token_0|>",
    "<|reserved_token_1|>",
    "<|reserved_token_2|>",
    "<|reserved_token_3|>",
    "<|mdm_mask|>",
    "<role>",
    "</role>",
    "<|arithmetic_start|>",
    "<|arithmetic_end|>",
    "<|number_start|>",
    "<|number_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

# Words with their leading space; digits and capitals one by one, so that numbers and codes are spelled.
_PIECES = r"\n\n|\n| ?\p{Lu}?\p{Ll}+|\p{N}|\p{Lu}| ?[^\s\p{L}\p{N}]+|\s"
_PIECES_PYTHON = r"\n\n|\n| ?[A-Z]?[a-z]+|[0-9]|[A-Z]| ?[^\sA-Za-z0-9]+|\s"

_CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def _byte_level(piece: str) -> str:
    """The piece as byte-level BPE spells it (only ASCII is ever asked for)."""
    return piece.replace(" ", "\u0120").replace("\n", "\u010a")


def build_tokenizer(
    words: Sequence[str] = (*COLORS, *SHAPES, *NAMES), sentences: Sequence[str] = _SENTENCES
) -> PreTrainedTokenizerFast:
    """Always the same tokenizer for the same words; `save_tokenizer` writes it.

    words: one token each with a space before them. sentences: their pieces are one token each.
    """
    words = [f" {word}" for word in words]
    words += [piece for text in sentences for piece in re.findall(_PIECES_PYTHON, text)]
    words += ["system", "user", "assistant", "\n\n"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*alphabet, *(_byte_level(word) for word in words)]))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # An answer that begins with a word begins with its space; nobody wants to read that.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        cls_token="[CLS]",
        additional_special_tokens=list(SPECIALS[8:15]),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])


def single(text: str) -> int:
    """The id of a text that is one token."""
    (token,) = encode(text)
    return token


@cache
def special_id(text: str) -> int:
    return int(tokenizer().get_vocab()[text])


@cache
def attribute_ids() -> dict[str, tuple[int, ...]]:
    """For each attribute a visual token can show, the word tokens of its values, in label order without "none"."""
    return {
        "color": tuple(single(f" {word}") for word in COLORS),
        "glyph": tuple(single(glyph) for glyph in GLYPHS),
        "shape": tuple(single(f" {word}") for word in SHAPES),
        "name": tuple(single(f" {word}") for word in NAMES),
    }


def save_tokenizer(folder: Path, made: PreTrainedTokenizerFast | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as LLaDA's repository has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (made or tokenizer()).save_pretrained(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"add_bos_token": False, "add_eos_token": False, "chat_template": _CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "pad_token": SPECIALS[1], "cls_token": SPECIALS[2]}
    special_map = {**names, "additional_special_tokens": list(SPECIALS[8:15])}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map, indent=2) + "\n", encoding="utf-8")
