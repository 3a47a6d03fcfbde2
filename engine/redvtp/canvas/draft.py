"""Infilling: a draft of the answer whose `<mask>` marks the model fills in and whose other tokens never change.

The canvas of such a request is the draft and nothing else, so its length is the draft's. The engine, the command and
the server all lay it out here.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from redvtp.errors import InvalidRequest, Knob
from redvtp.params import MASK_MARK, DenoisingParams


def draft_tokens(
    tokenizer: PreTrainedTokenizerBase, draft: str, mask_id: int, limit: int | None = None
) -> tuple[int, ...]:
    """Ids of a draft: the text between the marks tokenised piece by piece, the mask id for each mark.

    Raises InvalidRequest for more than `limit` of them.
    """
    first, *others = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in draft.split(MASK_MARK))
    tokens = (*first, *(token for piece in others for token in (mask_id, *piece)))
    if limit is not None and len(tokens) > limit:
        length = Knob("gen_length")
        raise InvalidRequest(
            Knob("draft"), f" has {len(tokens)} tokens, more than ", length, f" {limit}; raise ", length
        )
    return tokens


def lay_out(
    tokenizer: PreTrainedTokenizerBase, denoising: DenoisingParams, mask_id: int
) -> tuple[DenoisingParams, tuple[int, ...]]:
    """A request's parameters with the length its canvas will have, and the tokens on it (none without a draft).

    End tokens do not end a draft: the client wrote what stands behind them.
    """
    if not denoising.draft:
        return denoising, ()
    tokens = draft_tokens(tokenizer, denoising.draft, mask_id, denoising.gen_length)
    return replace(denoising, gen_length=len(tokens), ignore_eos=True), tokens
