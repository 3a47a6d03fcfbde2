"""What the scheduler remembers of a request: its plan, the cost of its next step, and its report."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from redvtp.planning import RequestPlan
from redvtp.reports import StepReport
from vllm_redvtp.output import report_dict


@dataclass(slots=True)
class DenoisingState:
    """State of one request, from arrival to end.

    plan: fixed at arrival.
    report: what travels back with the answer, one of `knobs.REPORTS`.
    visual_spans: half-open ranges of prompt tokens, one for each image.
    next_tokens: rows that the next step computes.
    resume_tokens: the same after a preemption.
    kv_tokens: tokens that hold KV cache now, or need it to go on.
    blocks_admitted, blocks_freed: KV cache blocks taken at admission, and given back since.
    last_step: engine step in which it last took a step.
    steps: denoising steps taken.
    kept: visual tokens that are left, as indices into those of the prompt.
    trace: every step, for a full report.
    """

    plan: RequestPlan
    report: str
    visual_spans: tuple[tuple[int, int], ...]
    next_tokens: int = 0
    resume_tokens: int = 0
    kv_tokens: int = 0
    blocks_admitted: int = 0
    blocks_freed: int = 0
    last_step: int = 0
    steps: int = 0
    kept: list[int] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.next_tokens = self.resume_tokens = self.kv_tokens = self.plan.kv_tokens
        self.kept = list(range(self.visual_tokens))

    @property
    def visual_tokens(self) -> int:
        """Before any pruning."""
        return self.plan.visual_tokens

    @property
    def later_tokens(self) -> int:
        """Rows that each step computes once the first is done."""
        return self.kv_tokens if self.plan.denoising.cache == "none" else self.plan.canvas_tokens

    def suspend(self) -> None:
        """Preempted: the pages are lost and must be computed again."""
        self.next_tokens = self.resume_tokens

    def record(self, report: StepReport, ms: float) -> None:
        """Note what a step did. ms: how long it took, for the whole batch."""
        self.steps += 1
        self.next_tokens, self.resume_tokens = report.next_tokens, report.resume_tokens
        self.kv_tokens = report.kv_tokens
        if report.pruning is not None:
            self.kept = [self.kept[index] for index in report.pruning.kept]
        if self.report == "full":
            self.trace.append(report_dict(report, ms))

    def summary(self) -> dict[str, Any] | None:
        """For the client, as `kv_transfer_params`: a field vLLM carries from scheduler to response untouched."""
        if self.report == "none":
            return None
        summary: dict[str, Any] = {
            "steps": self.steps,
            "prompt_tokens": self.plan.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "visual_tokens_kept": len(self.kept),
            "images": self._images(),
            "kv_blocks_admitted": self.blocks_admitted,
            "blocks_freed": self.blocks_freed,
        }
        if self.report == "full":
            summary["visual_spans"] = self.visual_spans
            summary["kept"] = self.kept
            summary["prunings"] = [step["pruning"] for step in self.trace if step["pruning"] is not None]
            summary["trace"] = self.trace
        return {"redvtp": summary}

    def _images(self) -> list[dict[str, Any]]:
        """For each image its visual tokens, how many are left, and their share."""
        images = []
        first = 0
        for start, end in self.visual_spans:
            last = first + end - start
            kept = bisect_left(self.kept, last) - bisect_left(self.kept, first)
            images.append(
                {"visual_tokens": end - start, "visual_tokens_kept": kept, "kept_share": round(kept / (end - start), 4)}
            )
            first = last
        return images
