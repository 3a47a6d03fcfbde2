"""Floating-point operations of one request, counted by torch.

Only matrix products count (a multiply and an add are two). The ratio of two requests' counts is the speed-up that
pruning or caching could reach if nothing but arithmetic took time.
"""

from __future__ import annotations

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from redvtp.local import LocalEngine, Request


def request_flops(engine: LocalEngine, request: Request) -> int:
    """Everything from pixels to the last token. Runs the request once; the engine must have no image cache."""
    # torch's counter does not know the CPU's fused attention; the plain one consists of products that it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.generate([request])
    total: int = counter.get_total_flops()
    return total
