"""Muon for the weight matrices, AdamW for everything else, and a running average of the weights.

Muon (Jordan et al., 2024) is written out here because torch's own works in bfloat16, which is emulated, slowly, on a
CPU without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one; matrices of one shape are done together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                buffers = torch.stack([self.state[parameter]["momentum"] for parameter in parameters])
                buffers.lerp_(gradients, 1 - group["momentum"])
                updates = _orthogonal(gradients.lerp(buffers, group["momentum"]).flatten(2))
                scale = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
                for parameter, buffer, update in zip(parameters, buffers, updates, strict=True):
                    self.state[parameter]["momentum"].copy_(buffer)
                    parameter.mul_(1 - 0.01 * group["lr"]).sub_(update.view(shape), alpha=group["lr"] * scale)


def _orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on [n, rows, cols]: singular values to about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    found: Tensor = x.mT if tall else x
    return found


class Average:
    """An exponential average of a model's parameters: what is evaluated and exported."""

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """step: updates so far; the first ones count for more, or the average would lag behind the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1 - decay)
