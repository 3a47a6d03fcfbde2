"""What the scheduler remembers of a request: its plan, the cost of its next step, and the story told at the end."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from redvtp.reports import StepReport
from vllm_redvtp.output import report_dict
from vllm_redvtp.planning import RequestPlan


@dataclass(slots=True)
class DenoisingState:
    """plan: fixed at arrival. visual_spans: half-open ranges of prompt tokens, one for each image.

    next_tokens: what the next step will compute, resume_tokens: the same after a preemption. kv_tokens: held now, or
    needed to go on. kept: the visual tokens that are left, as indices into those of the prompt.
    last_step: the engine step in which it last took a step.
    canvas_done: the engine has nothing left to do, though vLLM has not ended the request yet.
    """

    plan: RequestPlan
    visual_spans: tuple[tuple[int, int], ...]
    next_tokens: int = 0
    resume_tokens: int = 0
    kv_tokens: int = 0
    blocks_admitted: int = 0
    blocks_freed: int = 0
    last_step: int = 0
    steps: int = 0
    kept: list[int] = field(default_factory=list)
    canvas_done: bool = False
    trace: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.next_tokens = self.resume_tokens = self.kv_tokens = self.plan.kv_tokens
        self.kept = list(range(self.visual_tokens))

    @property
    def visual_tokens(self) -> int:
        """Before any pruning."""
        return sum(end - start for start, end in self.visual_spans)

    @property
    def later_tokens(self) -> int:
        """What its steps compute once the first is done."""
        return self.kv_tokens if self.plan.denoising.cache == "none" else self.plan.canvas_tokens

    def suspend(self) -> None:
        """Preempted: what the pages held must be computed again."""
        self.next_tokens = self.resume_tokens

    def record(self, report: StepReport, ms: float) -> None:
        """Take over what a step did. ms: how long it took, whatever else was in its batch."""
        self.steps += 1
        self.next_tokens, self.resume_tokens = report.next_tokens, report.resume_tokens
        self.kv_tokens = report.kv_tokens
        self.canvas_done = report.finished
        if report.pruning is not None:
            self.kept = [self.kept[index] for index in report.pruning.kept]
        if self.plan.params.report == "full":
            self.trace.append(report_dict(report, ms))

    def summary(self) -> dict[str, Any] | None:
        """For the client, as `kv_transfer_params`: a field vLLM carries from scheduler to response untouched."""
        if self.plan.params.report == "none":
            return None
        told: dict[str, Any] = {
            "steps": self.steps,
            "prompt_tokens": self.plan.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "visual_tokens_kept": len(self.kept),
            "images": self._images(),
            "kv_blocks_admitted": self.blocks_admitted,
            "blocks_freed": self.blocks_freed,
        }
        if self.plan.params.report == "full":
            told["visual_spans"] = self.visual_spans
            told["kept"] = self.kept
            told["prunings"] = [step["pruning"] for step in self.trace if step["pruning"] is not None]
            told["trace"] = self.trace
        return {"redvtp": told}

    def _images(self) -> list[dict[str, Any]]:
        """What each image had, what is left of it, and the share that is."""
        told = []
        first = 0
        for start, end in self.visual_spans:
            last = first + end - start
            kept = bisect_left(self.kept, last) - bisect_left(self.kept, first)
            told.append(
                {"visual_tokens": end - start, "visual_tokens_kept": kept, "kept_share": round(kept / (end - start), 4)}
            )
            first = last
        return told
