"""What every verb of a step works with, and the record of one sequence's step that they hand on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend, LayerAttention, layer_attention
from redvtp.attention.layout import Layout
from redvtp.attention.scores import AttentionScores
from redvtp.clock import Clock
from redvtp.denoising.forward import Continuation
from redvtp.denoising.ranks import Ranks
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step_plan import StepPlan
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.prompt import SpecialTokens
from redvtp.reports import PruningReport


@dataclass(frozen=True, slots=True)
class Context:
    """One model over one paged cache.

    attention: the backend over `pages`.
    ranks: the collectives of tensor-parallel ranks.
    clock: what scoring and compaction take.
    """

    model: Dvlm
    pages: KVPages
    special: SpecialTokens
    attention: AttentionBackend
    ranks: Ranks
    clock: Clock

    @property
    def device(self) -> torch.device:
        return self.model.device

    def attend(self, layout: Layout) -> LayerAttention:
        """The attention of a forward, or of a stretch of its layers."""
        return layer_attention(self.attention.prepare(layout))


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a step dropped behind a layer.

    importance: [visual] float32, of the tokens before.
    kept: [kept] int64, ascending, into those.
    """

    importance: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True)
class LayerExit:
    """How a step went on behind the layer where visual tokens left it.

    layer: the last one that ran on all rows.
    continuation: the rows that went on.
    dropped: None where visual tokens were only hidden from the deeper layers.
    """

    layer: int
    continuation: Continuation
    dropped: Dropped | None = None


@dataclass(slots=True)
class SequenceStep:
    """One sequence in one step, filled in verb by verb.

    sequence: the request.
    plan: what the step computes. Set by `begin`, again by `encode_prompts` where that decided a token.
    number: of the step, from 0.
    canvas_block: the canvas block it works on.
    canvas_positions: canvas positions it computes.
    blocks_before: KV blocks held before it.
    row_layers: rows through the language model, summed over the layers they went through.
    scores: attention of its rows to the visual tokens. Set by `forward`; None where it is not measured.
    scored_rows: [rows] int64 on the CPU, the rows of the sequence whose attention that is.
    exit: set by `forward` where rows left on the way.
    counting: [gen_length] bool, canvas rows whose attention counts. Set by `commit`; None where nothing is scored.
    undecided: whether the canvas has a position left that is worth pruning for. Set by `commit` where that matters.
    pruning: what was dropped. Set by `prune`.
    """

    sequence: Sequence
    plan: StepPlan
    number: int
    canvas_block: int
    canvas_positions: int
    blocks_before: int
    row_layers: int = 0
    scores: AttentionScores | None = None
    scored_rows: Tensor | None = None
    exit: LayerExit | None = None
    counting: Tensor | None = None
    undecided: bool = True
    pruning: PruningReport | None = None

    @property
    def dropped_inside(self) -> Dropped | None:
        """What the step dropped behind its exit layer."""
        return None if self.exit is None else self.exit.dropped
