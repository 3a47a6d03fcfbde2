"""The families that are served. A new one is added here, after its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redvtp.families.family import Family
from redvtp.families.fields import unsupported
from redvtp.families.lavida import LAVIDA
from redvtp.families.lavida_dream import LAVIDA_DREAM
from redvtp.families.llada_v import LLADA_V

FAMILIES: tuple[Family, ...] = (LLADA_V, LAVIDA, LAVIDA_DREAM)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, from its config.json.

    Of families that share an architecture, the one with the most keys in `Family.marked_by` wins; all must agree.
    Raises ValueError for an architecture that is not supported.
    """
    architectures = raw.get("architectures")
    fitting = [
        family
        for family in FAMILIES
        if isinstance(architectures, (list, tuple)) and list(architectures) == [family.architecture]
        if all(key in raw and raw[key] == value for key, value in family.marked_by.items())
    ]
    if not fitting:
        raise unsupported("architectures", architectures, [family.architecture for family in FAMILIES])
    return max(fitting, key=lambda family: len(family.marked_by))


def architectures() -> frozenset[str]:
    """All architectures that are served."""
    return frozenset(family.architecture for family in FAMILIES)
