"""What our model runner reports to our scheduler beside vLLM's fields. Plain data: it travels between processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from redvtp.reports import StepReport


@dataclass
class DenoisingOutput(ModelRunnerOutput):
    """reports: request id -> what its step did. errors: request id -> why it cannot go on (the others can).

    step_ms: how long the step took, for the whole batch. seconds: of parts of it, see `redvtp.clock`.
    """

    reports: dict[str, StepReport] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    step_ms: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def report_dict(report: StepReport, ms: float) -> dict[str, Any]:
    """A report as JSON-ready data for `kv_transfer_params`."""
    return asdict(report) | {"ms": ms}
