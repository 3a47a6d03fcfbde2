"""What attention must know of one packed forward: whose rows are whose, and where each sequence's keys are.

Rows of all sequences lie one after another, without padding. `redvtp.denoising.packing` makes layouts; backends read
them. What the host knows is in `spans`, so that no backend has to read from the device; kernels take the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from redvtp.attention.scores import AttentionScores


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a packed forward.

    start, end: its rows in the packed tensors.
    kv_length: keys it attends to, those of its rows among them.
    reads_pages: False where its rows bring all its keys, as in a full step.
    kv_rows: [kv_length] int64 on the device, the tokens of its pages that have its keys; None for the first kv_length
        ones.
    write_end: the token behind the last one that it writes.
    """

    start: int
    end: int
    kv_length: int
    reads_pages: bool
    kv_rows: Tensor | None = None
    write_end: int = 0

    @property
    def rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """One packed forward, or a stretch of its layers.

    spans: one for each sequence, in packed order.
    block_tables: [sequences, blocks] int64, each padded with 0 behind its sequence's blocks.
    slots: for each sequence [blocks * block_size] int64, the slots of its blocks in order.
    block_size: tokens in a block.
    write_slots: [rows] int64, where the packed keys and values go. None where the backend writes no pages.
    scores: (index of a sequence, sums to fill), several for one sequence where it is scored in several ways.
    """

    spans: tuple[Span, ...]
    block_tables: Tensor
    slots: tuple[Tensor, ...]
    block_size: int
    write_slots: Tensor | None
    scores: tuple[tuple[int, AttentionScores], ...] = field(default=())

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [span.rows for span in self.spans]

    def kv_slots(self, index: int) -> Tensor:
        """[kv_length] int64, the slots of all keys that sequence `index` attends to."""
        span = self.spans[index]
        slots = self.slots[index]
        return slots[: span.kv_length] if span.kv_rows is None else slots[span.kv_rows]
