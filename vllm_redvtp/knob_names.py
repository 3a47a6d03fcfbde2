"""The names of knobs: in a request, among the server's defaults, in a message, and misspelt.

A knob comes in `vllm_xargs` (HTTP) or `SamplingParams.extra_args` (offline). It is a field of the engine's
DenoisingParams or PruningParams with the prefix `redvtp_`; a new field is a new knob.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from redvtp.errors import InvalidRequest, spelled
from redvtp.params import KNOB_NAMES, DenoisingParams, PruningParams
from redvtp.values import nearest, shown

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

PREFIX = "redvtp_"
# vLLM has its own names for these. gen_length has two: max_tokens, and a knob.
FROM_SAMPLING = frozenset({"temperature", "seed", "stop", "ignore_eos"})
DENOISING = frozenset(field.name for field in fields(DenoisingParams)) - FROM_SAMPLING
_OF_THE_API = FROM_SAMPLING | {"max_tokens"}
# Knob -> field.
PRUNING = {KNOB_NAMES.get(field.name, field.name): field.name for field in fields(PruningParams)}
REPORT = "report"
KNOBS = tuple(sorted({*DENOISING, *PRUNING, REPORT}))

# How alike a name must be to a knob's to be refused although it does not begin with our prefix. Other plugins have
# extra arguments too: `step` and `cached` may be theirs, `keep_ration` is not.
_ALIKE = 0.9


def knob_values(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The redvtp knobs among a request's extra arguments, prefix removed. Raises InvalidRequest for an unknown one.

    Other names are left alone, unless they are a knob without the prefix or in another spelling: a knob that silently
    has no effect costs its user more than a refusal.
    """
    values = {}
    for name, value in (extra_args or {}).items():
        knob = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and knob in KNOBS:
            values[knob] = value
        elif (meant := _meant(name)) is not None:
            raise InvalidRequest(f"unknown knob {shown(name)}; did you mean {PREFIX}{meant}?")
        elif name.lower().startswith(PREFIX):
            raise InvalidRequest(f"unknown knob {shown(name)}; {_alternatives(knob)}")
    return values


def check_default_names(names: Iterable[str], others: Iterable[str]) -> None:
    """Raises InvalidRequest for a server default that is no knob. others: what else may stand beside the defaults."""
    allowed = (*KNOBS, *others)
    for name in names:
        if name in allowed:
            continue
        meant = nearest(name.lower().removeprefix(PREFIX), allowed)
        hint = f"did you mean redvtp.{meant}?" if meant is not None else f"allowed: {', '.join(allowed)}"
        raise InvalidRequest(f"unknown knob redvtp.{name}; {hint}")


def in_request(error: ValueError, sampling: SamplingParams | None) -> str:
    """The message of a refused request, with the names by which a request sets each knob."""
    typed = sampling is not None and f"{PREFIX}gen_length" in (sampling.extra_args or {})

    def spell(name: str) -> str:
        if name == "gen_length" and not typed:
            return "max_tokens"
        name = KNOB_NAMES.get(name, name)
        return f"{PREFIX}{name}" if name in KNOBS else name

    return spelled(error, spell)


def _alternatives(knob: str) -> str:
    if knob in _OF_THE_API:
        return f"{knob} is a field of the request itself"
    return f"allowed: {', '.join(PREFIX + each for each in KNOBS)}"


def _meant(name: str) -> str | None:
    """The knob that another name stands for, if it is certain enough."""
    plain = name.lower().replace("-", "_")
    if plain.removeprefix(PREFIX) in KNOBS:
        return plain.removeprefix(PREFIX)
    if plain.startswith(PREFIX):
        return nearest(plain.removeprefix(PREFIX), KNOBS)
    # Of a name that is not ours by its prefix, two words or more must agree.
    known = [each for knob in KNOBS for each in (knob, PREFIX + knob) if "_" in each]
    found = nearest(plain, known, _ALIKE)
    return found.removeprefix(PREFIX) if found is not None else None
