"""Bookkeeping of `LocalEngine`: requests that wait, requests that run, and the blocks they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import BlockPool
from redvtp.planning import RequestPlan
from redvtp.prompt import PromptTokens
from redvtp.request import Generation


@dataclass(frozen=True)
class Waiting:
    """A request that has its plan and no blocks. number: its place among the requests of the call."""

    number: int
    generation: Generation
    prompt: PromptTokens
    plan: RequestPlan


@dataclass
class Running:
    """An admitted request. blocks: what it holds now. admitted: time.perf_counter() of its admission."""

    sequence: Sequence
    generation: Generation
    blocks: list[int]
    admitted: float


class HeldBlocks:
    """Blocks that admitted requests hold. When no call of the engine is under way there must be none."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._held: set[int] = set()
        self._calls = 0

    @contextmanager
    def of_a_call(self) -> Iterator[None]:
        """Within it, a call admits requests. Raises RuntimeError when the engine is idle and blocks are missing."""
        self._check()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
        self._check()

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None when there are not enough."""
        blocks = self._pool.allocate(count)
        self._held.update(blocks or ())
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        self._pool.free(blocks)
        self._held.difference_update(blocks)

    def _check(self) -> None:
        if not self._calls and self._held:
            raise RuntimeError(f"{len(self._held)} KV cache blocks were not given back by requests that have ended")
