"""What a client may ask of one request: how to denoise, and how to prune.

The same two dataclasses stand behind the command line, the offline API and the server's knobs, so a value is checked
once and refused with the same sentence everywhere. The messages are fit for an HTTP 400: knob, value, what is allowed.
Each writes its knobs as `Knob`, since they have other names in the command and over HTTP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from redvtp.errors import InvalidRequest, Knob
from redvtp.presets import PRESET_TABLE
from redvtp.values import check_integer, check_one_of, check_share, check_text, fits_float32, is_number, refused

CACHES = ("none", "prefix", "dual", "prefix_lm")
# Those that keep pages from one step of a canvas block to the next, and refresh them.
BLOCK_CACHES = ("prefix", "dual")
REMASKINGS = ("low_confidence", "entropy", "margin", "random")
# Those whose confidence is a number in [0, 1] that says how sure the model is.
BOUNDED_REMASKINGS = ("low_confidence", "margin")
SCHEDULES = ("even", "linear", "shift", "cosine", "logit_normal", "dream")
PRESETS = (*PRESET_TABLE, "none")
# Pruning knobs whose meaning depends on the preset.
PRESET_KNOBS = (
    "score_rows",
    "score_layers",
    "attention_mass",
    "prune_step",
    "prune_steps",
    "prune_layer",
    "importance",
)
# Field -> its name as a knob and a flag, where the two differ: outside PruningParams `preset` would not say of what.
KNOB_NAMES = {"preset": "pruning"}
POSITIONS = ("compact", "original")
SCORE_ROWS = ("masked", "response", "prompt", "prompt_response", "committed")
SCOPES = ("all", "image")

# One of these in a draft is one token to fill in.
MASK_MARK = "<mask>"
DEFAULT_BLOCK_LENGTH = 32
# A canvas above this is a typing error: one tensor row for each token is laid out at once.
MAX_GEN_LENGTH = 1 << 16
# Beyond these a schedule is a single jump, and float32 cannot represent the curve.
SCHEDULE_SHIFTS = (0.001, 1000)
# Up to 1 the factor rule has its theory; at this one it asks for nothing within any usual canvas block.
MAX_THRESHOLD = 1000
# A layer, or a range of them.
_LAYERS = re.compile(r"\d{1,4}(:\d{1,4})?")


@dataclass(frozen=True, slots=True)
class DenoisingParams:
    """How a canvas is decided (LLaDA-V's `generate`, arXiv 2505.16933; `prefix`, `dual` and `threshold`: Fast-dLLM,
    arXiv 2505.22618; schedules, confidences and `prefix_lm`: LaViDa, arXiv 2505.16839).

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
    cache: `none` recomputes every token at every step; `prefix` keeps the K/V of the prompt and of finished blocks,
    `dual` those of later blocks too, so that a step computes one canvas block only; `prefix_lm` computes the prompt
    once, without the canvas in its view, and after that only the canvas.
    refresh_interval: with `prefix` and `dual`, everything is recomputed at the start of each canvas block and after
    every so many steps within it. None recomputes at the start of blocks, and once visual tokens were dropped only the
    canvas: the prompt's keys and values still know of those.

    Raises InvalidRequest naming the knob, the value and what is allowed.
    """

    # The first sentence on each field above is the help of its flag: keep the form `name: text`.
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
    refresh_interval: int | None = None

    def __post_init__(self) -> None:
        check_integer("gen_length", self.gen_length, 1, MAX_GEN_LENGTH)
        if self.block_length is not None:
            check_integer("block_length", self.block_length, 1, self.gen_length)
        if self.steps is not None:
            check_integer("steps", self.steps, 1, self.gen_length)
            if self.steps < self.num_blocks:
                raise InvalidRequest(
                    Knob("steps"),
                    f" must be at least the number of canvas blocks ({self.num_blocks} blocks of "
                    f"{self.resolved_block_length} in ",
                    Knob("gen_length"),
                    f" {self.gen_length}), got {self.steps}",
                )
        if not is_number(self.temperature) or self.temperature < 0:
            raise refused("temperature", "a number >= 0", self.temperature)
        if self.seed is not None:
            check_integer("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        check_one_of("schedule", self.schedule, SCHEDULES)
        low, high = SCHEDULE_SHIFTS
        if not is_number(self.schedule_shift) or not low <= self.schedule_shift <= high:
            raise refused("schedule_shift", f"a number in [{low}, {high}]", self.schedule_shift)
        check_one_of("remasking", self.remasking, REMASKINGS)
        self._check_confidence_rule()
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise refused("stop", "non-empty strings", self.stop)
        for stop in self.stop:
            check_text("stop", stop)
        if not isinstance(self.suffix, str):
            raise refused("suffix", "a string", self.suffix)
        check_text("suffix", self.suffix)
        if not isinstance(self.draft, str) or (self.draft and MASK_MARK not in self.draft):
            raise refused("draft", f"text with at least one {MASK_MARK} to fill in", self.draft)
        check_text("draft", self.draft)
        if not isinstance(self.ignore_eos, bool):
            raise refused("ignore_eos", "true or false", self.ignore_eos)
        check_one_of("cache", self.cache, CACHES)
        if self.refresh_interval is not None:
            check_integer("refresh_interval", self.refresh_interval, 1)

    def _check_confidence_rule(self) -> None:
        rule, least = self.threshold, self.min_confidence
        if rule is not None and (not is_number(rule) or not 0 < rule <= MAX_THRESHOLD):
            raise refused("threshold", f"a number in (0, {MAX_THRESHOLD}]", rule)
        if least is not None and (not is_number(least) or not 0 <= least <= 1):
            raise refused("min_confidence", "a number in [0, 1]", least)
        if rule is not None and least is not None:
            raise InvalidRequest(
                Knob("threshold"),
                " and ",
                Knob("min_confidence"),
                f" exclude each other, got {rule} and {least}; leave one of them out",
            )
        if self.by_confidence and self.remasking not in BOUNDED_REMASKINGS:
            name = "threshold" if least is None else "min_confidence"
            allowed = " or ".join(BOUNDED_REMASKINGS)
            bounded = f" {allowed} (confidences in [0, 1]), got {self.remasking}"
            raise InvalidRequest(Knob(name), " needs ", Knob("remasking"), bounded)

    @property
    def by_confidence(self) -> bool:
        """Whether a step commits by confidence, so the number of steps is not known in advance."""
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
    """When and how visual tokens are dropped. What None stands for is the preset's (`redvtp.presets`).

    preset: which tokens are dropped, and when; docs/pruning.md says which when. `redvtp` prunes once, after the first
    denoising step, by attention (arXiv 2511.12428, section 3). `llada-fastv` (arXiv 2601.20168) and `fastv` (arXiv
    2403.06764) prune inside that step, half way down or behind the second layer. `late` prunes after half of the steps,
    or where confidence decides with half of the canvas decided; `progressive` in several prunings. `zipvl` (arXiv
    2410.08584) drops as much as the attention allows. `layer-skip` (arXiv 2511.15098) drops nothing but spares the
    deeper layers the visual tokens. `attention-free` and `external` prune before the first forward, by the visual
    features alone or by the request's `importance`. `random` and `uniform` (evenly spaced) are controls. `none` keeps
    every visual token.
    keep_ratio: share of the request's visual tokens kept, in (0, 1]; at least one stays. 1 keeps everything, whatever
    the preset.
    positions: `compact` renumbers the survivors 0..n-1 (the reference), `original` keeps the positions they had.
    score_rows: whose attention counts: response positions that are still undecided after the step (`masked`), the whole
    `response`, the `prompt`'s text, `prompt_response`, or what the step has just `committed`.
    score_layers: which layers' attention counts, one (`7`) or a range without its end (`12:24`).
    attention_mass: keep the smallest set of tokens that holds this share of all importance, instead of keep_ratio.
    min_keep_ratio: the least that attention_mass may keep, as a share of the request's visual tokens.
    max_keep_ratio: the most that attention_mass may keep.
    prune_step: the denoising step, from 0, after which tokens are dropped for the first time.
    prune_steps: over how many steps, one after the other, the share falls to keep_ratio.
    prune_layer: drop inside the step, behind this layer (from 0); with `layer-skip` the last one with visual tokens.
    prune_scope: the best of `all` images together, or of each `image` by itself.
    importance: one number for each visual token of the request, for `external`.

    Raises InvalidRequest naming the knob, the value and what is allowed.
    """

    preset: str = "redvtp"
    keep_ratio: float = 0.5
    positions: str = "compact"
    score_rows: str | None = None
    score_layers: str | None = None
    attention_mass: float | None = None
    min_keep_ratio: float = 0.05
    max_keep_ratio: float = 1.0
    prune_step: int | None = None
    prune_steps: int | None = None
    prune_layer: int | None = None
    prune_scope: str = "all"
    importance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("preset", self.preset, PRESETS)
        check_share("keep_ratio", self.keep_ratio)
        check_one_of("positions", self.positions, POSITIONS)
        if self.score_rows is not None:
            check_one_of("score_rows", self.score_rows, SCORE_ROWS)
        if self.score_layers is not None and not _LAYERS.fullmatch(str(self.score_layers)):
            raise refused("score_layers", "a layer N or a range A:B", self.score_layers)
        if self.attention_mass is not None:
            check_share("attention_mass", self.attention_mass)
        check_share("min_keep_ratio", self.min_keep_ratio)
        check_share("max_keep_ratio", self.max_keep_ratio)
        if self.min_keep_ratio > self.max_keep_ratio:
            limit = f" ({self.max_keep_ratio}), got {self.min_keep_ratio}"
            raise InvalidRequest(Knob("min_keep_ratio"), " must be at most ", Knob("max_keep_ratio"), limit)
        if self.prune_step is not None:
            check_integer("prune_step", self.prune_step, 0)
        if self.prune_steps is not None:
            check_integer("prune_steps", self.prune_steps, 1)
        if self.prune_layer is not None:
            check_integer("prune_layer", self.prune_layer, 0)
        check_one_of("prune_scope", self.prune_scope, SCOPES)
        if not isinstance(self.importance, tuple) or not all(map(fits_float32, self.importance)):
            raise refused("importance", "finite numbers", self.importance)
