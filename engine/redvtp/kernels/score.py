"""Attention of scored rows to visual tokens for a whole batch, over row-major pages that are read in place.

    work = scoring_work(parts)                                          once for each packed forward
    lse = log_sum_exp(work, query, keys, scale)                         where the attention kernel gives none
    score_sums(work, counted, query, keys, lse, sums, scale)            in each layer

A softmax needs its normaliser only: with the log-sum-exp of a row, its attention to a token is
exp(query . key * scale - lse). So nothing of the size rows x tokens is ever stored, and only visual keys are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redvtp.kernels.choice import runs_kernels
from redvtp.kernels.scoring_work import TILE_ROWS, ScoringWork


def log_sum_exp(work: ScoringWork, query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[scored, heads] float32, of each scored row's logits over all keys of its sequence.

    query: [rows, heads, head_dim], packed. keys: [blocks, block_size, kv_heads, head_dim], one layer's pages.
    """
    if runs_kernels(query):
        from redvtp.kernels import triton_score

        return triton_score.log_sum_exp(query, keys, work.rows, work.tables, work.row_tiles, scale)
    return log_sum_exp_in_torch(work, query, keys, scale)


def score_sums(
    work: ScoringWork, counted: Sequence[int], query: Tensor, keys: Tensor, lse: Tensor, sums: Tensor, scale: float
) -> None:
    """Add one layer's attention, summed over heads and weighted, for the parts `counted`.

    query, keys: see `log_sum_exp`.
    lse: [scored, heads] float32.
    sums: [work.cells] float32; each part has [sum_rows, visual] of it.
    """
    if runs_kernels(query):
        from redvtp.kernels import triton_score

        tiles, weights = work.tiles_of(counted)
        triton_score.score_sums(query, keys, work.rows, work.slots, lse, tiles, weights, sums, scale)
    else:
        score_sums_in_torch(work, counted, query, keys, lse, sums, scale)


def log_sum_exp_in_torch(work: ScoringWork, query: Tensor, keys: Tensor, scale: float) -> Tensor:
    block_size = keys.shape[1]
    found = []
    for part in work.parts:
        blocks = part.table[: -(-part.kv_length // block_size)]
        own = keys[blocks].flatten(0, 1)[: part.kv_length]
        found.append(_logits(query[part.rows], own, scale).logsumexp(-1).T)
    return torch.cat(found)


def score_sums_in_torch(
    work: ScoringWork, counted: Sequence[int], query: Tensor, keys: Tensor, lse: Tensor, sums: Tensor, scale: float
) -> None:
    normalisers = lse.split([part.rows.numel() for part in work.parts])
    cells = sums.split([part.cells for part in work.parts])
    for index in counted:
        part = work.parts[index]
        logits = _logits(query[part.rows], keys.flatten(0, 1)[part.slots], scale)
        seen = (logits - normalisers[index].T[:, :, None]).exp_().sum(0) * part.weight
        own = cells[index].view(part.sum_rows, -1)
        if part.averaged:
            seen = torch.stack([tile.sum(0) for tile in seen.split(TILE_ROWS)])
        own += seen


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[heads, rows, keys] float32. query: [rows, heads, head_dim]; key: [keys, kv_heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().permute(1, 2, 0).repeat_interleave(group, 0)
    return query.float().transpose(0, 1) @ keys * scale
