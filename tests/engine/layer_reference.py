"""A slow decoding loop, written out, for caches and for policies that take visual tokens out of some layers.

Every layer keeps the keys (before rotation) and values of all rows; who may be seen where is a mask, and attention is
plain softmax. No pages, no packing, no stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from redvtp.canvas.proposals import Choice, propose, select
from redvtp.denoising.commit import candidate_logits
from redvtp.denoising.sequence import Sequence
from redvtp.kv.rotary import apply_rotary
from redvtp.local import LocalEngine
from redvtp.noise import Draws


@dataclass
class SlowDecoder:
    """Decodes the request of a fresh sequence. drops: {step: visual tokens left after it}, behind `layer` of that step;
    with withdraw nothing is dropped, but behind `layer` nobody sees a visual token. positions: see PruningParams.

    rows_run: for each step, for each layer, how many rows it ran on. importances, kept: of the drops.
    """

    local: LocalEngine
    sequence: Sequence
    layer: int
    drops: dict[int, int] = field(default_factory=dict)
    withdraw: bool = False
    positions: str = "compact"
    rows: str = "masked"

    def __post_init__(self) -> None:
        config = self.local.config
        self.model = self.local.model.language_model
        self.canvas, self.denoising = self.sequence.canvas.copy(), self.sequence.denoising
        self.embeds = self.sequence.prompt.embeds.clone()
        self.visual = torch.zeros(self.embeds.shape[0], dtype=torch.bool)
        self.visual[self.sequence.prompt.visual_rows] = True
        self.places = torch.arange(self.embeds.shape[0] + self.canvas.gen_length)
        empty = torch.zeros(self.places.numel(), config.num_key_value_heads, config.head_dim)
        self.keys = [empty.clone() for _ in range(config.num_hidden_layers)]
        self.values = [empty.clone() for _ in range(config.num_hidden_layers)]
        self.just_dropped = False
        self.canvases: list[list[int]] = []
        self.rows_run: list[list[int]] = []
        self.importances: list[Tensor] = []
        self.kept: list[list[int]] = []

    @torch.inference_mode()
    def run(self) -> SlowDecoder:
        while not self.canvas.finished:
            self.step()
        return self

    def step(self) -> None:
        canvas, prompt, shifted = self.canvas, self.embeds.shape[0], self.sequence.shifted_logits
        start, first, end = 0, 0, self.places.numel()
        self.rows_run.append([0] * len(self.keys))
        if self.denoising.cache == "prefix_lm":
            first = prompt
            if canvas.steps_done == 0:
                hidden, _ = self.layers(0, prompt, None)
                if shifted:
                    canvas.decide(0, int(self.logits(hidden[-1:])[:, : self.local.special.vocab].argmax()))
        elif self.denoising.cache in ("prefix", "dual"):
            dropped = self.embeds.shape[0] < self.sequence.prompt.embeds.shape[0]
            if self.just_dropped or (dropped and not canvas.step_in_block):
                # The canvas alone, for its pages are not what they should be.
                start, first = canvas.block_start, prompt - int(shifted)
            elif canvas.step_in_block % (self.denoising.refresh_interval or canvas.gen_length):
                start = canvas.block_start
                first = prompt + start - int(shifted)
                if self.denoising.cache == "dual" and canvas.steps_done not in self.drops:
                    end = prompt + canvas.block_end
        hidden, survives = self.layers(first, end, self.drops.get(canvas.steps_done))
        self.just_dropped = survives is not None
        about = canvas.masked_rows(start) - (end - prompt) - int(shifted)
        logits = self.logits(hidden[(hidden.shape[0] + about).clamp(min=0)])
        proposals = propose(logits, self.local.special.vocab, [Choice(0.0, "low_confidence", Draws(0, 0))],
                            [about])  # fmt: skip
        chosen = select(proposals.confidence, canvas.tokens_to_commit())
        canvas.commit(canvas.masked_rows(start)[chosen], proposals.tokens[chosen])
        self.canvases.append(canvas.tokens.tolist())
        if survives is not None:
            self.keys = [keys[survives] for keys in self.keys]
            self.values = [values[survives] for values in self.values]
            self.embeds, self.visual = self.embeds[survives[:prompt]], self.visual[survives[:prompt]]
            self.places = self.moved(survives)[survives]

    def layers(self, first: int, end: int, keep: int | None) -> tuple[Tensor, Tensor | None]:
        """Rows first..end of prompt and canvas through all layers, in view of what earlier steps wrote; what survives
        of all rows if `keep` visual tokens are to stay."""
        rows = torch.cat((self.embeds, self.local.model.embed(self.canvas.tokens)))
        # A prompt that is computed alone sees no canvas.
        seen = end if first == 0 else self.places.numel()
        own, there, places = torch.arange(first, end), torch.arange(seen), self.places
        hidden, survives = rows[own], None
        for index, layer in enumerate(self.model.layers):
            hidden, weights = self.attend(layer, index, hidden, own, there, places)
            self.rows_run[-1][index] += own.numel()
            if index != self.layer or not bool(self.visual.any()):
                continue
            if keep is not None:
                survives = self.choose(weights, own, keep)
                places = self.moved(survives)
            gone = torch.zeros(self.places.numel(), dtype=torch.bool)
            if survives is not None:
                gone = ~survives
            elif self.withdraw:
                gone[: self.visual.numel()] = self.visual
            hidden, own, there = hidden[~gone[own]], own[~gone[own]], there[~gone[there]]
        return hidden, survives

    def attend(
        self, layer: torch.nn.Module, index: int, hidden: Tensor, own: Tensor, there: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def attention(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.keys[index][own], self.values[index][own] = key, value
            cos, sin = self.model.rotary.angles(places[there])
            group = query.shape[1] // key.shape[1]
            keys = apply_rotary(self.keys[index][there], cos, sin).repeat_interleave(group, dim=1)
            values = self.values[index][there].repeat_interleave(group, dim=1)
            cos, sin = self.model.rotary.angles(places[own])
            scores = torch.einsum("qhd,khd->hqk", apply_rotary(query, cos, sin), keys) / query.shape[-1] ** 0.5
            seen.append(scores.softmax(-1))
            return torch.einsum("hqk,khd->qhd", seen[0], values)

        def unturned(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return query, key

        # Keys are kept as they were before rotation, so the layer itself must not rotate.
        return layer(hidden, unturned, index, attention), seen[0]

    def choose(self, weights: Tensor, own: Tensor, keep: int) -> Tensor:
        canvas_rows = self.canvas.masked() if self.rows == "masked" else torch.ones(self.canvas.gen_length).bool()
        looking = own.numel() - self.canvas.gen_length + canvas_rows.nonzero()[:, 0]
        visual = self.visual.nonzero()[:, 0]
        importance = weights.mean(0)[looking][:, visual].mean(0)
        kept = importance.topk(keep).indices.sort().values
        self.importances.append(importance)
        self.kept.append(kept.tolist())
        survives = torch.ones(self.places.numel(), dtype=torch.bool)
        survives[visual] = False
        survives[visual[kept]] = True
        return survives

    def moved(self, survives: Tensor) -> Tensor:
        return survives.cumsum(0) - 1 if self.positions == "compact" else self.places

    def logits(self, hidden: Tensor) -> Tensor:
        return candidate_logits(self.local.runner.context, hidden)
