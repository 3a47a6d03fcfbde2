"""How requests end: at a stop string, with an error, and streaming sessions that are refused.

vLLM's scheduler ends most requests by itself; these are the cases where it cannot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request

from redvtp.errors import InvalidRequest

# A character has at most this many bytes, and a token that is not skipped has at least one.
_BYTES_OF_CHARACTER = 4
# Decoders treat the first token of a text differently (a leading space); these stand before the part that counts.
_MARGIN = 4
# Sessions that end without their last message are forgotten after this many others.
_SESSIONS = 1024


def outputs_of(request: Request, outputs: dict[int, EngineCoreOutputs]) -> EngineCoreOutputs:
    """The outputs that go to the request's front-end."""
    return outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))


def attach_report(request: Request, report: dict[str, Any] | None, outputs: dict[int, EngineCoreOutputs]) -> None:
    """Send the report with this step's tokens: the abort that follows has no output of its own."""
    for output in outputs_of(request, outputs).outputs:
        if output.request_id == request.request_id:
            output.kv_transfer_params = report


def end_output(request: Request, error: str | None, report: dict[str, Any] | None) -> EngineCoreOutput:
    """The last output of a request that ends without new tokens. error: why it failed; None when it is complete."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=error,
        events=request.take_events(),
        kv_transfer_params=report,
        trace_headers=request.trace_headers,
    )


def spells_stop(tokenizer: Any, token_ids: Sequence[int], new: int, sampling: SamplingParams | None) -> bool:
    """Whether a stop string may end within the text of the last `new` tokens; only a tail is decoded.

    The canvas is searched for stops as token ids; only the front-end finds one that other tokens spell.
    """
    if sampling is None or not sampling.stop or not new:
        return False
    stops: list[str] = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop
    skipped = set(tokenizer.all_special_ids) if sampling.skip_special_tokens else set()
    wanted = new + _MARGIN + _BYTES_OF_CHARACTER * max(map(len, stops))
    tail: list[int] = []
    for token in reversed(token_ids):
        if len(tail) == wanted:
            break
        if token not in skipped:
            tail.append(token)
    text = tokenizer.decode(
        tail[::-1], skip_special_tokens=sampling.skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return any(stop in text for stop in stops)


class RefusedSessions:
    """Streaming input sessions, which are refused: their later messages come under the same request id."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def refuse(self, request: Request) -> None:
        """Raises InvalidRequest for every message of a session; the last one, not resumable, is then forgotten."""
        session = request.request_id
        if not request.resumable and session not in self._ids:
            return
        self._ids.pop(session, None)
        if request.resumable:
            self._ids[session] = None
            if len(self._ids) > _SESSIONS:
                self._ids.popitem(last=False)
        raise InvalidRequest(
            "streaming input sessions are not supported by diffusion decoding; send the whole prompt at once"
        )

    def forget(self, request_ids: Iterable[str]) -> None:
        """Aborted sessions have no last message."""
        for request_id in request_ids:
            self._ids.pop(request_id, None)
