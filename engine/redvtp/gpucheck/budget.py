"""The time there is. Parts ask before each piece of work, so the command ends in time and says what it left out."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """end: time.monotonic() by which everything must be done."""

    end: float

    @classmethod
    def of_minutes(cls, minutes: float) -> Budget:
        return cls(time.monotonic() + 60 * minutes)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def share(self, part: float) -> Budget:
        """One that ends when this share of what is left has gone."""
        return Budget(time.monotonic() + part * max(0.0, self.left))

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether work of about so many seconds can still begin."""
        return self.left > seconds
