"""Names of tensors in a checkpoint and in `redvtp.models.dvlm.Dvlm`, as one table read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# (in the checkpoint, in Dvlm): a name, or what a name begins with.
Pairs = tuple[tuple[str, str], ...]

LAYERS = "language_model.layers."


@dataclass(frozen=True, slots=True)
class WeightNames:
    """How a checkpoint names its tensors.

    prefixes: what names begin with; the first pair that fits wins.
    in_layer: names inside a layer of the language model, where they differ from ours.
    ignored: pattern of names of tensors that are in the checkpoint and not used.
    """

    prefixes: Pairs
    in_layer: Pairs = ()
    ignored: str = r"(?!)"

    def ours(self, name: str) -> str | None:
        """The checkpoint's name -> the name in Dvlm; None for an ignored tensor.

        A name that no prefix fits comes back unchanged: `load_weights` refuses it by that name.
        """
        return None if re.match(self.ignored, name) else _translate(name, self.prefixes, self.in_layer)

    def theirs(self, name: str) -> str:
        """The name in Dvlm -> the checkpoint's name."""
        return _translate(name, _reversed(self.prefixes), _reversed(self.in_layer))


def _reversed(pairs: Pairs) -> Pairs:
    return tuple((ours, theirs) for theirs, ours in pairs)


def _translate(name: str, prefixes: Iterable[tuple[str, str]], in_layer: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if not name.startswith(old):
            continue
        rest = name.removeprefix(old)
        if LAYERS in (old, new):
            index, _, leaf = rest.partition(".")
            rest = f"{index}.{_translate(leaf, in_layer, ())}"
        return new + rest
    return name
