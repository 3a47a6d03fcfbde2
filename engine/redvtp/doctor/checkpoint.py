"""Whether a checkpoint folder is complete, and of which family. Reads headers of weight files, never the weights.

Names and shapes of tensors are checked by `load_weights`, as when the model is loaded, into a model without memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from redvtp.doctor.findings import Finding, readable
from redvtp.families.config import DvlmConfig, read_config
from redvtp.families.fields import read_json
from redvtp.families.registry import family_of
from redvtp.model_folder import reason_and_remedy
from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import header, load_weights, weight_files

TOPIC = "checkpoint"
_AGAIN = "copy the files of the published checkpoint into {folder} again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read of one.

    findings: in order.
    config: None where it cannot be served.
    parameters: numbers in the weights that serving keeps in memory.
    weight_bytes: of weights that are quantised; None where `parameters` says how large they are.
    """

    findings: tuple[Finding, ...]
    config: DvlmConfig | None = None
    parameters: int = 0
    weight_bytes: int | None = None


def examine(model: str) -> Checkpoint:
    """Looks at config, tokenizer and weights; goes on after a problem where the rest can still be judged."""
    wrong = reason_and_remedy(model)
    if wrong is not None:
        return Checkpoint((Finding(TOPIC, *wrong),))
    folder = Path(model)
    remedy = f"copy config.json of the published checkpoint into {folder} again"
    try:
        raw = read_json(folder / "config.json")
        remedy = "serve a checkpoint of a supported family, see docs/families.md"
        family = family_of(raw)
        remedy = "take config.json, and the vision tower's folder that it names, as they were published"
        config = read_config(raw, folder)
    except ValueError as error:
        return Checkpoint((Finding(TOPIC, str(error), remedy), *_weights(folder, None)))
    findings = [Finding(TOPIC, f"family {family.name} ({family.architecture}), {config.num_hidden_layers} layers")]
    findings += [_tokenizer(folder, config)]
    with torch.device("meta"):
        skeleton = Dvlm(config)
    if "quantization_config" in raw:
        findings += [Finding(TOPIC, "its weights are quantised: vLLM checks their tensors when it loads them")]
        findings += _weights(folder, None)
        return Checkpoint(tuple(findings), config, weight_bytes=_size(folder))
    findings += _weights(folder, skeleton)
    return Checkpoint(tuple(findings), config, sum(parameter.numel() for parameter in skeleton.parameters()))


def _tokenizer(folder: Path, config: DvlmConfig) -> Finding:
    try:
        tokenizer = config.family.load_tokenizer(folder)
        config.special_tokens(tokenizer)
    except ValueError as error:
        return Finding(TOPIC, str(error), f"copy tokenizer.json and tokenizer_config.json into {folder} again")
    return Finding(TOPIC, f"tokenizer of {len(tokenizer):,} tokens, with all special tokens of the family")


def _weights(folder: Path, skeleton: Dvlm | None) -> list[Finding]:
    """skeleton: the model that the tensors must fit; None checks the files alone."""
    again = _AGAIN.format(folder=folder)
    try:
        paths = weight_files(folder)
    except ValueError as error:
        return [Finding(TOPIC, str(error), again)]
    headers: list[dict[str, Tensor]] = []
    problems = []
    for path in paths:
        try:
            headers.append(header(path))
        except ValueError as error:
            problems.append(Finding(TOPIC, str(error), again))
    if problems:
        return problems
    if skeleton is not None:
        try:
            load_weights(skeleton, chain.from_iterable(tensors.items() for tensors in headers))
        except ValueError as error:
            return [Finding(TOPIC, str(error), again)]
    count = sum(map(len, headers))
    files = f"{len(paths)} weight file{'' if len(paths) == 1 else 's'}"
    return [Finding(TOPIC, f"{files} with {count:,} tensors, {readable(_size(folder))}, none cut short or missing")]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
