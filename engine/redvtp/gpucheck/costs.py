"""The least a step has to do: its products, and the weights, keys and values that go through the memory once.

What is between the products (norms, rotary positions, activations) is left out, so a share of a rate that is computed
from these says how much of the time was unavoidable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redvtp.families.language import LanguageConfig
from redvtp.kv.blocks import kv_token_bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """flop: multiplications and additions of products. bytes: read and written."""

    flop: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence in one step.

    rows: computed. keys: attended to by each row. candidates: rows whose logits are computed.
    """

    rows: int
    keys: int
    candidates: int


def step_cost(config: LanguageConfig, itemsize: int, batch: Sequence[Work]) -> Cost:
    """itemsize: bytes of a number."""
    width, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_dim
    weights = layers * config.hidden_size * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    rows, candidates = sum(work.rows for work in batch), sum(work.candidates for work in batch)
    products = 2.0 * rows * weights + 2.0 * candidates * head
    attention = sum(4.0 * work.rows * work.keys for work in batch) * width * layers
    read = itemsize * (weights + (head if candidates else 0))
    return Cost(products + attention, read + _token_bytes(config, itemsize) * (rows + sum(work.keys for work in batch)))


def score_cost(config: LanguageConfig, itemsize: int, rows: int, visual: int, batch: int) -> Cost:
    """rows: scored in each sequence. visual: visual tokens of each. Without the log-sum-exp, which attention has."""
    width, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    keys = layers * visual * config.num_key_value_heads * config.head_dim * itemsize
    return Cost(2.0 * rows * visual * width * layers * batch, float(keys * batch))


def compaction_cost(config: LanguageConfig, itemsize: int, rows: int) -> Cost:
    """rows: that move, of all sequences."""
    return Cost(0.0, 2.0 * rows * _token_bytes(config, itemsize))


def _token_bytes(config: LanguageConfig, itemsize: int) -> int:
    return kv_token_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, itemsize)
