"""What the card reaches at its best: copying memory, and one large product. Measured steps are shares of these."""

from __future__ import annotations

import torch

from redvtp.gpucheck.machine import Machine

COPY, MATRIX = "copy_bytes_per_second", "matrix_flop_per_second"
_REPEATS = 10


def measured_rates(machine: Machine, dtype: torch.dtype) -> dict[str, float]:
    """COPY: bytes read and written a second. MATRIX: additions and multiplications a second, of a square product."""
    size, side = (1 << 24, 256) if machine.small else (1 << 30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy_ms = machine.median(lambda: target.copy_(source), _REPEATS)
    left, right = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    matrix_ms = machine.median(lambda: left @ right, _REPEATS)
    return {COPY: 2 * size / copy_ms * 1e3, MATRIX: 2 * side**3 / matrix_ms * 1e3}
