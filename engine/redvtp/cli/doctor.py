"""`redvtp doctor`: whether everything is there to serve a model, how much memory it takes, and the command to type.

    redvtp doctor examples/tiny_dvlm

Status 0 when nothing is missing, 1 when something is. Loads no weights and starts no server.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from redvtp.cli.checks import open_images, positive, say
from redvtp.doctor.findings import Finding
from redvtp.errors import refusing

if TYPE_CHECKING:
    from redvtp.doctor.checkpoint import Checkpoint
    from redvtp.doctor.machine import Machine
    from redvtp.doctor.server import ServerFacts


class _Report:
    """Findings, printed under their headings as they come."""

    def __init__(self, quiet: bool) -> None:
        self.findings: list[Finding] = []
        self._quiet = quiet

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if not self._quiet:
                if not self.findings or self.findings[-1].topic != finding.topic:
                    say(finding.topic)
                say(f"  {finding}")
            self.findings.append(finding)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.remedy]


def doctor(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 when something is missing. Raises BadInput for a flag that means nothing."""
    for flag in ("max-model-len", "max-num-seqs"):
        positive(flag, getattr(options, flag.replace("-", "_")))
    sizes = [image.size for image in open_images(options.image)]
    from redvtp.doctor.installation import installed

    report = _Report(quiet=options.json)
    report.add(installed())
    # torch takes seconds to import; what is installed stands there by then.
    from redvtp.doctor.machine import described, machine

    found = machine()
    report.add(described(found))
    facts: dict[str, Any] = {"device": asdict(found)}
    line = None
    if options.model:
        line = _look_at_model(options, report, found, sizes, facts)
    else:
        _look_at_server(report)
    _end(options, report, facts, line)
    return 1 if report.problems else 0


def _look_at_server(report: _Report) -> None:
    from redvtp.doctor.server import ServerOptions, server_facts

    findings, _ = server_facts(ServerOptions(None))
    report.add(findings)


def _look_at_model(
    options: argparse.Namespace, report: _Report, found: Machine, sizes: list[tuple[int, int]], facts: dict[str, Any]
) -> str | None:
    """The command line to serve the model with; None where it cannot be served."""
    from redvtp.doctor.checkpoint import examine
    from redvtp.doctor.server import ServerOptions, server_facts

    checkpoint = examine(options.model)
    report.add(checkpoint.findings)
    if checkpoint.config is None:
        _look_at_server(report)
        return None
    limit = checkpoint.config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > limit:
        text = f"--max-model-len {options.max_model_len} is more than the {limit} positions of the checkpoint"
        report.add([Finding("server", text, f"use {limit} or less")])
        options.max_model_len = limit
    asked = ServerOptions(options.model, options.dtype, options.max_model_len, options.max_num_seqs)
    findings, server = server_facts(asked)
    report.add(findings)
    facts["family"] = checkpoint.config.family.name
    facts["server"] = None if server is None else asdict(server)
    return _look_at_memory(options, report, found, sizes, facts, checkpoint, server)


def _look_at_memory(
    options: argparse.Namespace,
    report: _Report,
    found: Machine,
    sizes: list[tuple[int, int]],
    facts: dict[str, Any],
    checkpoint: Checkpoint,
    server: ServerFacts | None,
) -> str | None:
    from redvtp.doctor.installation import serve_command
    from redvtp.doctor.memory import MAX_NUM_SEQS, TOPIC, judged, longest_that_fits, needs_of, serve_line

    config = checkpoint.config
    assert config is not None
    dtype = options.dtype if options.dtype != "auto" else config.torch_dtype
    dtype = server.dtype if server is not None and server.dtype else dtype
    block_size = (server.block_size if server is not None else None) or 32
    lengths = options.max_model_len or config.max_length, options.max_num_seqs or MAX_NUM_SEQS
    if server is not None and server.memory_share is not None:
        found = replace(found, free=min(found.free, int(found.total * server.memory_share)))
    needs = needs_of(checkpoint, config, found, dtype, lengths, block_size)
    if needs.least > found.free and options.max_model_len is None and (fits := longest_that_fits(needs, found.free)):
        report.add([Finding(TOPIC, f"max_model_len {lengths[0]:,} of the checkpoint does not fit, {fits:,} does")])
        needs = needs_of(checkpoint, config, found, dtype, (fits, lengths[1]), block_size)
    largest = config.vision.largest_size()
    images = [(f"largest image ({largest[0]}x{largest[1]})", config.vision.counts([largest])[0])]
    with refusing():
        images += [
            (f"{path} ({width}x{height})", config.vision.counts([(width, height)])[0])
            for path, (width, height) in zip(options.image, sizes, strict=True)
        ]
    report.add(judged(needs, config, found, images))
    facts["memory"] = asdict(needs) | {"least": needs.least, "total": needs.total}
    facts["visual_tokens"] = dict(images)
    if report.problems:
        return None
    return serve_line(serve_command(), options.model, needs, found.device, options.dtype)


def _end(options: argparse.Namespace, report: _Report, facts: dict[str, Any], line: str | None) -> None:
    if options.json:
        whole = {"ok": not report.problems, "findings": [asdict(finding) for finding in report.findings]}
        say(json.dumps(whole | facts | {"serve": line}, indent=2))
        return
    if line is not None:
        say(f"serve it with\n  {line}")
    if report.problems:
        count = len(report.problems)
        say(f"{count} problem{'' if count == 1 else 's'}, marked with !; what to do stands behind ->")
    elif line is None:
        say("nothing is missing")
