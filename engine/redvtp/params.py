"""What a client may ask of one request: how to denoise, and how to prune.

The same two dataclasses stand behind the command line, the offline API and the server's knobs, so a value is checked
once and refused with the same sentence everywhere. The messages are fit for an HTTP 400: knob, value, what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CACHES = ("none", "prefix", "prefix_lm")
REMASKINGS = ("low_confidence", "entropy", "margin", "random")
# Those whose confidence is a number in [0, 1] that says how sure the model is.
BOUNDED_REMASKINGS = ("low_confidence", "margin")
SCHEDULES = ("even", "linear", "shift", "cosine", "logit_normal", "dream")
PRESETS = ("redvtp", "random", "uniform", "none")
POSITIONS = ("compact", "original")

# One of these in a draft is one token to fill in.
MASK_MARK = "<mask>"
DEFAULT_BLOCK_LENGTH = 32
# A canvas above this is a typing error, not a wish: one tensor row for each token is laid out at once.
MAX_GEN_LENGTH = 1 << 16
# Longer text fits no canvas and no context; tokenising megabytes to find that out would hold up a server.
MAX_TEXT_LENGTH = 1 << 16
# Beyond these a schedule is a single jump, and float32 no longer knows the curve.
SCHEDULE_SHIFTS = (0.001, 1000)
# Up to 1 the factor rule has its theory; at this one it asks for nothing within any usual canvas block.
MAX_THRESHOLD = 1000
_SHOWN_LENGTH = 120


def shown(value: object) -> str:
    """A refused value as a message shows it: what a client sends may be megabytes long."""
    text = value[: _SHOWN_LENGTH + 1] if isinstance(value, str) else value
    text = repr(text)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be an integer {allowed}, got {shown(value)}")


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, float) and math.isfinite(value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def _text(name: str, value: str) -> None:
    if len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"{name} must have at most {MAX_TEXT_LENGTH:,} characters, got {len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer and no wire format takes.
        raise ValueError(f"{name} must be valid Unicode, got {shown(value)}") from None


@dataclass(frozen=True, slots=True)
class DenoisingParams:
    """How a canvas is decided (LLaDA-V's `generate`, arXiv 2505.16933; `prefix` and `threshold`: Fast-dLLM, arXiv
    2505.22618; schedules, confidences and `prefix_lm`: LaViDa, arXiv 2505.16839).

    gen_length: canvas length in tokens.
    block_length: canvas positions decoded together; None is min(32, gen_length). The last canvas block may be shorter.
    steps: denoising steps in all, spread evenly over the canvas blocks; None is half of gen_length, at least one a
    block. Without effect where `threshold` or `min_confidence` is set.
    temperature: of the Gumbel noise on the logits; 0 is greedy.
    seed: of that noise and of `random` remasking; None draws a new one for each request.
    schedule: how a block's tokens spread over its steps: `even`, one of LaViDa's curves (`linear`, `shift`, `cosine`,
    `logit_normal`), or `dream`, by Dream's time steps.
    schedule_shift: of `shift`; above 1 most tokens are decided late, below 1 early.
    remasking: which candidates a step commits: those with the highest probability (`low_confidence`), the lowest
    `entropy`, the largest `margin` between the two best tokens, or `random` ones.
    threshold: the factor f of Fast-dLLM's parallel decoding: each step commits its most confident proposal, and the
    n-th most confident (n = 2, 3, ...) as long as all before it passed and its confidence is at least 1 - f / (n + 1).
    Larger is faster and rougher. It takes the place of `steps` and `schedule`; a step for each token is the most it
    takes. Needs remasking `low_confidence` or `margin`; excludes `min_confidence`.
    min_confidence: the plain rule of other engines instead: each step commits all proposals of at least this
    confidence, and always the most confident one. All else as for `threshold`.
    stop: strings that end the answer wherever they appear on the canvas; not part of it.
    suffix: text after the canvas, seen by every step and never overwritten. The embedded engine returns it after the
    answer, a server does not repeat it.
    draft: the answer with a `<mask>` for every token that is to be filled in; the rest of it never changes. The canvas
    is then as long as the draft, which gen_length only limits, and the model's end tokens do not end it.
    ignore_eos: the model's end tokens do not end the answer.
    cache: `none` recomputes every token at every step; `prefix` keeps the K/V of the prompt and of finished blocks;
    `prefix_lm` computes the prompt once, without the canvas in its view, and after that only the canvas.
    refresh_interval: with `prefix`, every so many steps of a canvas block everything is recomputed.

    Raises ValueError naming the knob, the value and what is allowed.
    """

    gen_length: int = 64
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    schedule: str = "even"
    schedule_shift: float = 3.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    min_confidence: float | None = None
    stop: tuple[str, ...] = ()
    suffix: str = ""
    draft: str = ""
    ignore_eos: bool = False
    cache: str = "none"
    refresh_interval: int = 32

    def __post_init__(self) -> None:
        _integer("gen_length", self.gen_length, 1, MAX_GEN_LENGTH)
        if self.block_length is not None:
            _integer("block_length", self.block_length, 1, self.gen_length)
        if self.steps is not None:
            _integer("steps", self.steps, 1, self.gen_length)
            if self.steps < self.num_blocks:
                raise ValueError(
                    f"steps must be at least the number of canvas blocks ({self.num_blocks} blocks of "
                    f"{self.resolved_block_length} in gen_length {self.gen_length}), got {self.steps}"
                )
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a number >= 0, got {shown(self.temperature)}")
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        _one_of("schedule", self.schedule, SCHEDULES)
        low, high = SCHEDULE_SHIFTS
        if not _is_number(self.schedule_shift) or not low <= self.schedule_shift <= high:
            raise ValueError(f"schedule_shift must be a number in [{low}, {high}], got {shown(self.schedule_shift)}")
        _one_of("remasking", self.remasking, REMASKINGS)
        self._check_confidence_rule()
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be non-empty strings, got {shown(self.stop)}")
        for stop in self.stop:
            _text("stop", stop)
        if not isinstance(self.suffix, str):
            raise ValueError(f"suffix must be a string, got {shown(self.suffix)}")
        _text("suffix", self.suffix)
        if not isinstance(self.draft, str) or (self.draft and MASK_MARK not in self.draft):
            raise ValueError(f"draft must be text with at least one {MASK_MARK} to fill in, got {shown(self.draft)}")
        _text("draft", self.draft)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {shown(self.ignore_eos)}")
        _one_of("cache", self.cache, CACHES)
        _integer("refresh_interval", self.refresh_interval, 1)

    def _check_confidence_rule(self) -> None:
        rule, least = self.threshold, self.min_confidence
        if rule is not None and (not _is_number(rule) or not 0 < rule <= MAX_THRESHOLD):
            raise ValueError(f"threshold must be a number in (0, {MAX_THRESHOLD}], got {shown(rule)}")
        if least is not None and (not _is_number(least) or not 0 <= least <= 1):
            raise ValueError(f"min_confidence must be a number in [0, 1], got {shown(least)}")
        if rule is not None and least is not None:
            raise ValueError(
                f"threshold and min_confidence exclude each other, got {rule} and {least}; leave one of them out"
            )
        if self.by_confidence and self.remasking not in BOUNDED_REMASKINGS:
            name = "threshold" if least is None else "min_confidence"
            allowed = " or ".join(BOUNDED_REMASKINGS)
            raise ValueError(f"{name} needs remasking {allowed} (confidences in [0, 1]), got {self.remasking}")

    @property
    def by_confidence(self) -> bool:
        """Whether a step commits whatever it is sure enough of, so that nobody knows beforehand how many there are."""
        return self.threshold is not None or self.min_confidence is not None

    @property
    def resolved_block_length(self) -> int:
        return self.block_length if self.block_length is not None else min(DEFAULT_BLOCK_LENGTH, self.gen_length)

    @property
    def num_blocks(self) -> int:
        return -(-self.gen_length // self.resolved_block_length)

    @property
    def resolved_steps(self) -> int:
        """Steps in all; the most there can be where confidence decides."""
        if self.by_confidence:
            return self.gen_length
        return self.steps if self.steps is not None else max(self.num_blocks, self.gen_length // 2)


@dataclass(frozen=True, slots=True)
class PruningParams:
    """When and how visual tokens are dropped (RedVTP, arXiv 2511.12428, section 3).

    preset: `redvtp` prunes once, after the first denoising step, by attention; `random` and `uniform` (evenly spaced)
    prune then without looking, to compare with; `none` keeps every visual token.
    keep_ratio: share of the request's visual tokens kept, in (0, 1]; at least one stays.
    positions: `compact` renumbers the survivors 0..n-1 (the reference), `original` keeps the positions they had.

    Raises ValueError naming the knob, the value and what is allowed.
    """

    preset: str = "redvtp"
    keep_ratio: float = 0.5
    positions: str = "compact"

    def __post_init__(self) -> None:
        _one_of("pruning", self.preset, PRESETS)
        if not _is_number(self.keep_ratio) or not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be a number in (0, 1], got {shown(self.keep_ratio)}")
        _one_of("positions", self.positions, POSITIONS)
