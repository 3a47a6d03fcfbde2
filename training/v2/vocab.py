"""Words of version 2's world and its tokenizer: version 1's layout with more words, pictures in a row, and JSON."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from redvtp.prompt import DEFAULT_SYSTEM
from training.vocab import COLORS, DIGITS, GLYPHS, LETTERS, NAMES, SHAPES, build_tokenizer
from training.vocab import save_tokenizer as save_any_tokenizer

__all__ = ["COLORS", "DIGITS", "GLYPHS", "LETTERS", "NAMES", "SHAPES"]

# What pages, forms and tables are printed with. The first sixteen are version 1's names, so labels agree.
WORDS = (
    *NAMES,
    *("ant", "bag", "cup", "day", "egg", "fan", "gum", "hat", "ink", "jam", "key", "lamp", "map", "net", "oak", "pen"),
    *("rug", "sun", "tea", "urn", "van", "web", "yak", "zoo", "arm", "bed", "cat", "dog", "ear", "fox", "gas", "hen"),
    *("ice", "jar", "kit", "log", "mud", "nut", "owl", "pig", "rain", "salt", "toy", "vase", "wall", "bell", "drum"),
    "fork",
)
DIRECTIONS = ("left", "right", "up", "down")
ORDINALS = ("first", "second", "last")

_SENTENCES = (
    DEFAULT_SYSTEM,
    "Which digit is in the box?",
    "What color is the box with the digit",
    "What color is the shape? Which shape is it?",
    "How many boxes are there? How many things are there?",
    "How many circles squares triangles stars diamonds crosses are there?",
    "How many lines does the form have? How many signs are there? How many rows does the table have?",
    "List all boxes row by row. List all shapes row by row.",
    "What is the of Transcribe the form. Transcribe the table. Transcribe both forms.",
    "Read the sign. Transcribe all signs row by row. Read the page. Read line of the page.",
    "Which word follows? Which picture has the star? in the first picture? of the second picture.",
    "Which way does the box move? Which color comes after? List the colors in order. What color is the box in the last",
    "Describe the clip. Give the form as JSON. Give the row as JSON.",
    '{"a":1,"b":2}',
    "Yes yes No no none",
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = (*COLORS, *SHAPES, *WORDS, *DIRECTIONS, *ORDINALS)
    # JSON keys follow a quotation mark and so come without a space.
    return build_tokenizer(words, (*_SENTENCES, *WORDS))


@cache
def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
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
        "name": tuple(single(f" {word}") for word in WORDS),
    }


@cache
def twins() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the words that are tokens both with a space before them and without: (with, without)."""
    return tuple(single(f" {word}") for word in WORDS), tuple(single(word) for word in WORDS)


def save_tokenizer(folder: Path) -> None:
    save_any_tokenizer(folder, tokenizer())
