"""Writes the table of all knobs into docs/knobs.md, from the dataclasses that define them.

    python scripts/knob_table.py            # rewrite the table
    python scripts/knob_table.py --check    # status 1 if it is stale

Defaults come from the fields, meanings from the docstrings. What is allowed comes from the error message: each knob is
given a value that every knob refuses.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from vllm.sampling_params import SamplingParams

from redvtp.cli.knob_flags import meaning
from redvtp.params import PRESET_KNOBS, DenoisingParams, PruningParams
from vllm_redvtp.knob_names import KNOBS, PREFIX
from vllm_redvtp.knobs import DEFAULT_REPORT, build_params

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "knobs.md"
START = "<!-- written by scripts/knob_table.py -->"
END = "<!-- end of the table -->"
# vLLM's names; one of them can be sent in `vllm_xargs` too.
OWN_FIELDS = {
    "gen_length": "`max_tokens` or `redvtp_gen_length`",
    "temperature": "`temperature`",
    "seed": "`seed`",
    "stop": "`stop`",
    "ignore_eos": "`ignore_eos`",
}
# What None stands for, and what the engine's dataclasses do not have.
UNSET = {
    "block_length": "32, or the canvas if shorter",
    "steps": "half the canvas",
    "seed": "a new one",
    "refresh_interval": "starts of blocks, until pruned",
}
UNSET |= dict.fromkeys(PRESET_KNOBS, "the preset's") | {"importance": "none"}
REPORT = "what comes back as `kv_transfer_params`: nothing, counts, or counts and every step with its scores"
Row = tuple[str, str, str, str]


def rows() -> list[Row]:
    """(knob in a request, default, allowed, meaning) of every knob, in the order of the dataclasses."""
    made = [_row(DenoisingParams, field.name, field.default, field.name) for field in fields(DenoisingParams)]
    made += [
        _row(PruningParams, field.name, field.default, "pruning" if field.name == "preset" else field.name)
        for field in fields(PruningParams)
    ]
    made.append((f"`{PREFIX}report`", f"`{DEFAULT_REPORT}`", _refusal(_report), REPORT))
    return made


def table() -> str:
    lines = ["| knob | default | allowed | what |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows()]
    return "\n".join(lines)


def rewritten(document: str) -> str:
    """The document with an up-to-date table. Raises ValueError if the place for it is not marked."""
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{DOCUMENT.name} has no lines {START} and {END}")
    return f"{before}{start}\n\n{table()}\n\n{end}{after}"


def _row(params: type, field: str, default: object, knob: str) -> Row:
    name = OWN_FIELDS.get(knob) or f"`{PREFIX}{knob}`"
    assert knob in KNOBS or knob in OWN_FIELDS, knob
    allowed = _refusal(lambda: params(**{field: object()}))
    return name, UNSET.get(knob) or _default(default), allowed, meaning(params, field)


def _default(value: object) -> str:
    if value in ("", ()):
        return "none"
    return f"`{value}`" if isinstance(value, str) else str(value).lower()


def _refusal(make: Callable[[], object]) -> str:
    """What is allowed, from the sentence that refuses a value that is not."""
    try:
        make()
    except ValueError as error:
        found = re.fullmatch(r"\w+ must be (?:a |an )?(.*), got .*", str(error))
        if not found:
            raise
        # A bare <mask> would be an HTML tag.
        allowed = re.sub(r"(<\w+>)", r"`\1`", found[1].replace("one of ", ""))
        # Bounded by the canvas of the request, here the default one.
        return allowed.replace(f", {DenoisingParams().gen_length}]", ", canvas length]")
    raise AssertionError("a knob took a value that no knob takes")


def _report() -> object:
    return build_params(SamplingParams(extra_args={f"{PREFIX}report": object()}), 1, {})


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the table of all knobs into docs/knobs.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    now = DOCUMENT.read_text(encoding="utf-8")
    wanted = rewritten(now)
    if now == wanted:
        print(f"{DOCUMENT.name}: unchanged")
        return 0
    if check:
        print(f"{DOCUMENT} is stale; run python scripts/knob_table.py", file=sys.stderr)
        return 1
    DOCUMENT.write_text(wanted, encoding="utf-8")
    print(f"{DOCUMENT.name}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
