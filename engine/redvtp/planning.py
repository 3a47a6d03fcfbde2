"""What a request will need, worked out by one function for every process.

`LocalEngine` plans before it takes blocks. Under vLLM the front-end plans to refuse with HTTP 400, the scheduler to
take blocks and the workers to build the sequence. All get the same plan from the same request, so they need not talk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from redvtp.canvas.draft import lay_out
from redvtp.errors import InvalidRequest, Knob
from redvtp.params import DenoisingParams, PruningParams
from redvtp.pruning.policy import Policy
from redvtp.pruning.resolve import policy_for


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request with nothing left open.

    denoising: gen_length is the length of the canvas; that of the draft where there is one.
    policy: of the pruning; None keeps every visual token.
    stop_ids: the stop strings as token sequences.
    suffix_ids: tokens after the canvas.
    draft_ids: what stands on the canvas at first, the mask id at each gap; empty without a draft.
    prompt_tokens: of the whole prompt, visual ones included.
    group_lengths: visual tokens of each image.
    """

    denoising: DenoisingParams
    policy: Policy | None
    stop_ids: tuple[tuple[int, ...], ...]
    suffix_ids: tuple[int, ...]
    draft_ids: tuple[int, ...]
    prompt_tokens: int
    group_lengths: tuple[int, ...]

    @property
    def visual_tokens(self) -> int:
        """Before any pruning."""
        return sum(self.group_lengths)

    @property
    def canvas_tokens(self) -> int:
        """Canvas and suffix."""
        return self.denoising.gen_length + len(self.suffix_ids)

    @property
    def kv_tokens(self) -> int:
        """Tokens that need KV cache at admission: visual tokens dropped before the first forward need none."""
        at_first = self.visual_tokens if self.policy is None else self.policy.visual_at_first(self.group_lengths)
        return self.prompt_tokens - self.visual_tokens + at_first + self.canvas_tokens


def plan_request(
    tokenizer: PreTrainedTokenizerBase,
    denoising: DenoisingParams,
    pruning: PruningParams,
    *,
    mask_id: int,
    num_layers: int,
    prompt_tokens: int,
    group_lengths: Sequence[int],
    max_model_len: int,
    draft_ids: tuple[int, ...] | None = None,
) -> RequestPlan:
    """The plan of a request with these parameters and a prompt of this size.

    num_layers: of the language model. prompt_tokens, group_lengths: see `RequestPlan`.
    draft_ids: the tokens of `denoising.draft` where the caller has laid it out; None lays it out here.
    Raises ValueError (`InvalidRequest` for the length) for a request that cannot be served, whatever of it is pruned.
    """
    if draft_ids is None:
        denoising, draft_ids = lay_out(tokenizer, denoising, mask_id)
    groups = tuple(group_lengths)
    plan = RequestPlan(
        denoising=denoising,
        policy=policy_for(pruning, denoising, num_layers, prompt_tokens, groups),
        stop_ids=tuple(_encode(tokenizer, stop) for stop in denoising.stop),
        suffix_ids=_encode(tokenizer, denoising.suffix),
        draft_ids=draft_ids,
        prompt_tokens=prompt_tokens,
        group_lengths=groups,
    )
    _check_length(plan, max_model_len)
    return plan


def _check_length(plan: RequestPlan, max_model_len: int) -> None:
    if plan.prompt_tokens + plan.canvas_tokens <= max_model_len:
        return
    length = Knob("gen_length")
    suffix = f" plus a suffix of {len(plan.suffix_ids)} tokens" if plan.suffix_ids else ""
    raise InvalidRequest(
        f"prompt ({plan.prompt_tokens:,} tokens, {plan.visual_tokens:,} of them visual) plus ",
        length,
        f" {plan.denoising.gen_length}{suffix} exceeds ",
        Knob("max_model_len"),
        f" {max_model_len}; shorten ",
        length,
        " or use a smaller image",
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
