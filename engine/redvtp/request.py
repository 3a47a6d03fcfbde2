"""What the embedded engine is given and gives back: a request and its generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL.Image import Image

from redvtp.params import DenoisingParams, PruningParams
from redvtp.reports import StepReport


@dataclass(frozen=True)
class Request:
    """prompt: the full templated text, with an `<image>` mark for each of `images` (PIL, RGB)."""

    prompt: str
    images: tuple[Image, ...] = ()
    denoising: DenoisingParams = field(default_factory=DenoisingParams)
    pruning: PruningParams = field(default_factory=PruningParams)


@dataclass
class Generation:
    """A finished request.

    steps, step_ms: one entry for each denoising step; step_ms is shared by the whole batch.
    seconds: from its admission to its end, the vision tower and all other work in between included.
    """

    request: Request
    prompt_tokens: int
    visual_spans: tuple[tuple[int, int], ...]
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    steps: list[StepReport] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def visual_tokens(self) -> int:
        return sum(end - start for start, end in self.visual_spans)
