"""Flags that several benchmarks share: the random model's sizes, and values written in one word."""

from __future__ import annotations

import argparse

from random_checkpoint import Shape


def model_flags(parser: argparse.ArgumentParser, usual: Shape) -> argparse._ArgumentGroup:
    """The sizes of a random checkpoint, with those of `usual` as defaults; `shape_of` reads them back. Returns their
    group of flags."""
    group = parser.add_argument_group("random model")
    group.add_argument("--hidden", type=int, default=usual.hidden, help="width of the language model")
    group.add_argument("--intermediate", type=int, default=usual.intermediate, help="width of its MLP")
    group.add_argument("--layers", type=int, default=usual.layers, help="its layers")
    group.add_argument("--heads", type=int, default=usual.heads, help="its attention heads")
    group.add_argument("--tower-hidden", type=int, default=usual.tower_hidden, help="width of the vision tower")
    group.add_argument("--tower-layers", type=int, default=usual.tower_layers, help="layers of the tower that are run")
    group.add_argument("--tile", type=int, default=usual.tile, help="side of the tower's input in pixels")
    return group


def shape_of(options: argparse.Namespace, family: str) -> Shape:
    return Shape(
        family, options.hidden, options.intermediate, options.layers, options.heads,
        options.tower_hidden, options.tower_layers, options.tile,
    )  # fmt: skip


def size(text: str) -> tuple[int, int]:
    """Pixels across and down, from WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def percent(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be whole percent in [1, 100], got {text!r}")
    return int(text)
