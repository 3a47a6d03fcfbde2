"""What is kept of a prompt: its embeddings and positions, and which rows are visual tokens.

Frozen: a pruning makes a new one. All indices are absolute within the prompt as it is now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.device import to_device


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """The prompt's rows that are left.

    embeds: [prompt, hidden], visual tokens in place.
    positions: [prompt] int64 on the CPU.
    visual_rows: [visual] int64 on the CPU, ascending, the rows that are visual tokens.
    group_of: [visual] int64 on the CPU, the image each of them belongs to.
    groups: visual tokens of each image before any pruning.
    canvas_position: position of the first canvas token.
    """

    embeds: Tensor
    positions: Tensor
    visual_rows: Tensor
    group_of: Tensor
    groups: tuple[int, ...]
    canvas_position: int

    @classmethod
    def whole(cls, embeds: Tensor, visual_spans: tuple[tuple[int, int], ...]) -> KeptPrompt:
        """The whole prompt. embeds: [prompt, hidden]; visual_spans: half-open rows, one for each image."""
        groups = tuple(end - start for start, end in visual_spans)
        return cls(
            embeds,
            torch.arange(embeds.shape[0]),
            torch.tensor([row for start, end in visual_spans for row in range(start, end)], dtype=torch.int64),
            torch.arange(len(groups)).repeat_interleave(torch.tensor(groups, dtype=torch.int64)),
            groups,
            embeds.shape[0],
        )

    @property
    def length(self) -> int:
        return self.embeds.shape[0]

    @property
    def num_visual(self) -> int:
        return self.visual_rows.numel()

    def keep_mask(self, kept: Tensor) -> Tensor:
        """[prompt] bool, the rows that remain with only the visual tokens `kept` ([kept] int64, ascending)."""
        mask = torch.ones(self.length, dtype=torch.bool)
        mask[self.visual_rows] = False
        mask[self.visual_rows[kept]] = True
        return mask

    def text_rows(self) -> Tensor:
        """[text] int64, the rows that are no visual tokens."""
        return self.keep_mask(self.visual_rows[:0]).nonzero()[:, 0]

    def keep(self, kept: Tensor, positions: str) -> KeptPrompt:
        """With only the visual tokens `kept` ([kept] int64, ascending). positions: see PruningParams."""
        mask = self.keep_mask(kept)
        is_visual = torch.zeros_like(mask)
        is_visual[self.visual_rows] = True
        rows = mask.nonzero()[:, 0]
        embeds = self.embeds.index_select(0, to_device(rows, self.embeds.device))
        compact = positions == "compact"
        return KeptPrompt(
            embeds,
            torch.arange(rows.numel()) if compact else self.positions.index_select(0, rows),
            is_visual[mask].nonzero()[:, 0],
            self.group_of[kept],
            self.groups,
            embeds.shape[0] if compact else self.canvas_position,
        )
