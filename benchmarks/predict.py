"""Predicted seconds of steps and requests: what they compute (`request_steps.py`, `work.py`) on a `Machine`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from machines import Card, Machine, seconds, seconds_by_kind
from random_checkpoint import make_image
from request_steps import Asked, Step, steps_of
from work import Code, Work, encoding_work, step_work

from redvtp.families.config import DvlmConfig
from redvtp.kv.blocks import kv_token_bytes
from redvtp.models.dvlm import Dvlm

# Of a card's memory, for weights and KV cache; the rest is for activations.
USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Predictor:
    """One model on one machine.

    tiles: of the picture that every request comes with.
    """

    config: DvlmConfig
    machine: Machine
    code: Code
    tiles: int

    def step(self, step: Step, batch: int = 1) -> float:
        """Seconds of a step that `batch` requests take together."""
        return seconds(step_work(self.config, step, batch, self.code), self.machine)

    def encoding(self, batch: int = 1) -> float:
        """Seconds of the pictures' way to visual tokens."""
        return seconds(encoding_work(self.config, batch * self.tiles, self.code), self.machine)

    def request(self, asked: Asked, batch: int = 1) -> float:
        """Seconds until `batch` requests are answered that begin and step together."""
        return self.encoding(batch) + sum(self.step(step, batch) for step in steps_of(asked))

    def by_kind(self, asked: Asked) -> dict[str, float]:
        """Where the time of one request goes."""
        return seconds_by_kind(self._all_work(asked), self.machine)

    def flops(self, asked: Asked) -> int:
        """Of one request, as torch counts them."""
        return round(sum(work.flops for work in self._all_work(asked)))

    def _all_work(self, asked: Asked) -> list[Work]:
        steps = (work for step in steps_of(asked) for work in step_work(self.config, step, 1, self.code))
        return [*encoding_work(self.config, self.tiles, self.code), *steps]


def tokens_and_tiles(config: DvlmConfig, pixels: tuple[int, int]) -> tuple[int, int]:
    """Visual tokens and tiles of a picture of this size."""
    (item,) = config.vision.items([make_image(*pixels)])
    return config.vision.counts([pixels])[0], item.inputs().shape[0]


def weight_bytes(config: DvlmConfig, itemsize: int) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        model = Dvlm(config)
    return itemsize * sum(parameter.numel() for parameter in model.parameters())


def fits(config: DvlmConfig, weights: int, card: Card, asked: Asked, batch: int, itemsize: int) -> bool:
    """Whether weights and the keys and values of `batch` requests do. All but the newest have pruned."""
    token = kv_token_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, itemsize)
    return weights + token * (asked.held + (batch - 1) * asked.held_after) <= USABLE * card.memory * 1e9
